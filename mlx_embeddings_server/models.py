"""The models that this process serves, by name, and the memory that they share."""

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from mlx_embeddings_backends import detect, hub
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_server.allow_list import AllowList
from mlx_embeddings_server.engine.turns import DeviceTurns
from mlx_embeddings_server.errors import ApiError, NotFound
from mlx_embeddings_server.fallbacks import Fallbacks
from mlx_embeddings_server.found import Found
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.names import Names
from mlx_embeddings_server.providers.endpoint import Endpoint
from mlx_embeddings_server.registry import model_specs, provider_specs
from mlx_embeddings_server.remote_model import RemoteModel
from mlx_embeddings_server.served_model import Load, Parts, ServedModel
from mlx_embeddings_server.settings import Settings, SettingsError

# Seconds between two looks whether a model has been idle for long enough.
_IDLE_CHECK = 1.0


class Models:
    """All served models. `load` builds a backend of what was found; tests pass their own."""

    def __init__(
        self, settings: Settings, metrics: Metrics, load: Load = detect.load, *, only_checks: bool = False
    ) -> None:
        """Find the pinned models' checkpoints, without loading them. Raises `ModelError` or `SettingsError`.

        `only_checks`: what the settings say of models must fit together; neither checkpoints nor keys are looked for.
        """
        self._max_memory = settings.max_memory
        self._local: list[ServedModel] = []
        self._loaded = False
        names: dict[str, Model] = {}
        providers = provider_specs(settings, with_keys=not only_checks)
        self.providers: Mapping[str, Endpoint] = {name: Endpoint(spec.endpoint) for name, spec in providers.items()}
        keeps = settings.cache or settings.collections is not None
        parts = Parts(metrics, load, settings.max_queue_tokens, DeviceTurns(), keep_results=keeps)
        given: dict[str, str] = {}  # aliases
        derived: dict[str, str] = {}
        specs = model_specs(settings)
        for spec in specs:
            if spec.is_remote:
                assert spec.name is not None, "models of the file have names"
                given |= dict.fromkeys(spec.aliases, spec.name)
                names[spec.name] = RemoteModel(spec.name, spec, self.providers[spec.provider])
                continue
            with _named(spec.name or spec.source, among=len(specs)):
                found = Found.of(spec) if spec.pinned and not only_checks else None
            name = spec.name
            if only_checks and name is None:
                name = hub.ALIASES.get(spec.source, spec.source)
            if found is not None and name is None:
                snapshot = found.checkpoint.snapshot
                name = snapshot.name
                if snapshot.source != "local":
                    # As it was typed, such as hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K.
                    derived[spec.source] = name
                    derived |= {short: name for short, full in hub.ALIASES.items() if full == name}
            assert name is not None, "models of the file have names"
            if name in names:
                raise ModelError(f"two models would be served as {name!r}: give each a --served-model-name")
            given |= dict.fromkeys(spec.aliases, name)
            names[name] = model = ServedModel(name, spec, parts, self._make_room, found)
            self._local.append(model)
        if twice := given.keys() & names.keys():
            raise ModelError(f"{min(twice)!r} is a model's name and another one's alias")
        # Of aliases, what nobody wrote gives way.
        self._names = Names(names, derived | given, providers, self.providers)
        self._fallbacks = Fallbacks(self._names)
        self.allow_list = AllowList(self._names, settings.allowed_models, settings.allowed_providers)
        self._default = self._named_default(settings.default_model)

    def load(self) -> None:
        """Load and warm up the pinned models; returns when they can answer. Does nothing twice. Raises `ModelError`."""
        if self._loaded:
            return
        self._loaded = True
        try:
            self._load_pinned()
        except ModelError:
            self.close()
            raise

    def _load_pinned(self) -> None:
        for model in self._local:
            if model.spec.pinned:
                with _named(model.name, among=len(self._local)):
                    model.load_now()
        self._fallbacks.check()
        taken = sum(model.memory_bytes for model in self._local if model.is_loaded)
        if self._max_memory is not None and taken > self._max_memory:
            raise ModelError(
                f"the models that are loaded at the start take {_megabytes(taken)}, and --max-memory is "
                f"{_megabytes(self._max_memory)}"
            )

    def get(self, name: str, provider: str | None = None, *, remembers: bool = False) -> Model:
        """By served name, alias or PROVIDER:MODEL; with a `provider`, of its models. Raises `NotFound`.

        What its provider elsewhere calls it will do, too, if no other model is called so. A name that nobody has is
        looked for at the default model's provider.
        """
        try:
            return self._names.get(name, provider, remembers=remembers)
        except NotFound:
            says_where = provider is not None or self._names.provider_of(name.partition(":")[0]) is not None
            if says_where or self._default is None or not self._default.spec.is_remote:
                raise
            with suppress(NotFound):  # the first one says more
                return self._names.get(name, self._default.spec.provider, remembers=remembers)
            raise

    def asked(self, name: str, provider: str | None = None, *, remembers: bool = True) -> Model:
        """The same, for whoever wants to use it. Raises `PermissionDenied` for what is not allowed."""
        model = self.get(name, provider, remembers=remembers)
        self.allow_list.check(model)
        return model

    @property
    def default(self) -> Model | None:
        """That of --default-model."""
        return self._default

    @property
    def default_or_first(self) -> Model | None:
        """Without --default-model the first that may be used; None, where the listed ones may not."""
        return self._default or next(self.usable(), None)

    def _named_default(self, name: str | None) -> Model | None:
        """Raises `SettingsError`."""
        if name is None:
            return None
        try:
            model = self._names.get(name, remembers=False)
            self.allow_list.check(model)
        except ApiError as error:
            raise SettingsError(f"--default-model: {error}") from error
        return self._names.listed(model)

    @property
    def provider_names(self) -> Sequence[str]:
        """`local`, and those of the file."""
        return self._names.providers

    def provider_of(self, name: str) -> str | None:
        """The provider that a request means by the name: `local`, its other name, or one of the file."""
        return self._names.provider_of(name)

    def usable(self) -> Iterator[Model]:
        """Those of the listed ones that are allowed."""
        return filter(self.allow_list.allows, self)

    def fallbacks_of(self, model: Model) -> Sequence[Model]:
        """What is tried in its place, in this order."""
        return list(filter(self.allow_list.allows, self._fallbacks.of(model)))

    def __iter__(self) -> Iterator[Model]:
        """All that are listed: those of the flags and the file, and those that providers are allowed to serve."""
        return iter(self._names)

    async def unload_idle(self) -> None:
        """For ever: unload models that nobody has asked for in their `keep_alive`."""
        while True:
            await asyncio.sleep(_IDLE_CHECK)
            now = time.monotonic()
            idle = [
                model
                for model in self._local
                if model.spec.keep_alive is not None
                and not model.spec.pinned
                and model.is_loaded
                and not model.users
                and now - model.used_at >= model.spec.keep_alive
            ]
            await asyncio.gather(*(model.unload() for model in idle))

    async def _make_room(self, model: ServedModel, needed: int) -> None:
        """Unload others until there is room for `model`: the least recently used first, none that is pinned.

        Called before the model's load, and after it with what it really takes. Raises `ModelError`.
        """
        while self._max_memory is not None:
            others = [each for each in self._local if each is not model and each.held_bytes]
            left = self._max_memory - sum(each.held_bytes for each in others if each.spec.pinned)
            if needed > left:  # before anything leaves for its sake
                pinned = f", of which pinned models leave {_megabytes(left)}" if left < self._max_memory else ""
                raise ModelError(
                    f"it takes about {_megabytes(needed)}, and --max-memory is {_megabytes(self._max_memory)}{pinned}"
                )
            unpinned = [each for each in others if not each.spec.pinned]
            if sum(each.held_bytes for each in unpinned) + needed <= left:
                break
            if (leaving := next((each for each in unpinned if each.state == "unloading"), None)) is not None:
                await leaving.until_gone()
                continue
            if model.reserved_bytes:  # two that are being loaded must not wait for each other: the later one sees to it
                unpinned = [each for each in unpinned if each.is_loaded]
                if not unpinned:
                    break
            await min(unpinned, key=lambda each: (each.users > 0 or each.reserved_bytes > 0, each.used_at)).unload()
        model.reserved_bytes = needed

    async def aclose(self) -> None:
        """Close the connections to other servers."""
        for endpoint in self.providers.values():
            await endpoint.aclose()

    def stop(self) -> None:
        """Fail every request that is not answered yet; the workers end after the batch that runs. On the event loop."""
        for endpoint in self.providers.values():
            endpoint.stop()
        self._stop_workers()

    def _stop_workers(self) -> None:
        for model in self._local:
            model.stop()

    def close(self, timeout: float = 0) -> bool:
        """Stop, and wait for the workers. False: one still runs a batch, or a model is being loaded."""
        self._stop_workers()
        gc.unfreeze()  # else what the libraries made would never be freed, and nanobind prints a page of leaks
        deadline = time.monotonic() + timeout
        return all([model.close(deadline) for model in self._local])


@contextmanager
def _named(name: str, *, among: int) -> Iterator[None]:
    """Of several models it has to be said which one cannot be had."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: {error}" if among > 1 else str(error)) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
