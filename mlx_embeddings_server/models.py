"""The models that this process serves, by name, and the memory that they share."""

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_embeddings_backends import detect, hub
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_server.engine.turns import DeviceTurns
from mlx_embeddings_server.errors import NotFound, quoted
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.registry import model_specs
from mlx_embeddings_server.served_model import Found, Load, Parts, ServedModel
from mlx_embeddings_server.settings import Settings

# Seconds between two looks whether a model has been idle for long enough.
_IDLE_CHECK = 1.0


class Models:
    """All served models. `load` builds a backend of what was found; tests pass their own."""

    def __init__(self, settings: Settings, metrics: Metrics, load: Load = detect.load) -> None:
        """Find the pinned models' checkpoints, without loading them. Raises `ModelError` or `SettingsError`."""
        self._max_memory = settings.max_memory
        self._by_name: dict[str, ServedModel] = {}
        self._loaded = False
        parts = Parts(metrics, load, settings.max_queue_tokens, DeviceTurns())
        given: dict[str, str] = {}  # aliases
        derived: dict[str, str] = {}
        specs = model_specs(settings)
        for spec in specs:
            with _named(spec.name or spec.source, among=len(specs)):
                found = Found.of(spec) if spec.pinned else None
            name = spec.name
            if found is not None and name is None:
                snapshot = found.checkpoint.snapshot
                name = snapshot.name
                if snapshot.source != "local":
                    # As it was typed, such as hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K.
                    derived[spec.source] = name
                    derived |= {short: name for short, full in hub.ALIASES.items() if full == name}
            assert name is not None, "models of the file have names"
            if name in self._by_name:
                raise ModelError(f"two models would be served as {name!r}: give each a --served-model-name")
            given |= dict.fromkeys(spec.aliases, name)
            self._by_name[name] = ServedModel(name, spec, parts, self._make_room, found)
        if twice := given.keys() & self._by_name.keys():
            raise ModelError(f"{min(twice)!r} is a model's name and another one's alias")
        self._aliases = derived | given  # what nobody wrote gives way

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
        for model in self:
            if model.spec.pinned:
                with _named(model.name, among=len(self._by_name)):
                    model.load_now()
        taken = sum(model.memory_bytes for model in self if model.is_loaded)
        if self._max_memory is not None and taken > self._max_memory:
            raise ModelError(
                f"the models that are loaded at the start take {_megabytes(taken)}, and --max-memory is "
                f"{_megabytes(self._max_memory)}"
            )

    def get(self, name: str) -> ServedModel:
        """By served name or alias. Raises `NotFound` with what there is."""
        try:
            return self._by_name[name if name in self._by_name else self._aliases[name]]
        except KeyError:
            served = ", ".join(self._by_name)
            raise NotFound(
                f"the model {quoted(name)} is not served here; served: {served}", param="model", code="model_not_found"
            ) from None

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._by_name.values())

    async def unload_idle(self) -> None:
        """For ever: unload models that nobody has asked for in their `keep_alive`."""
        while True:
            await asyncio.sleep(_IDLE_CHECK)
            now = time.monotonic()
            idle = [
                model
                for model in self
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
            others = [each for each in self if each is not model and each.held_bytes]
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

    def stop(self) -> None:
        """Fail every request that is not answered yet; the workers end after the batch that runs."""
        for model in self:
            model.stop()

    def close(self, timeout: float = 0) -> bool:
        """Stop, and wait for the workers. False: one still runs a batch, or a model is being loaded."""
        self.stop()
        gc.unfreeze()  # else what the libraries made would never be freed, and nanobind prints a page of leaks
        deadline = time.monotonic() + timeout
        return all([model.close(deadline) for model in self])


@contextmanager
def _named(name: str, *, among: int) -> Iterator[None]:
    """Of several models it has to be said which one cannot be had."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: {error}" if among > 1 else str(error)) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
