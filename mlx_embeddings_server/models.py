"""The models that this process serves, by name."""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mlx_embeddings_backends import detect, hub
from mlx_embeddings_backends.base import Backend, LoadOptions, ModelInfo
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.hub import Snapshot
from mlx_embeddings_server.engine.engine import Engine
from mlx_embeddings_server.errors import NotFound, quoted
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.providers.local import LocalProvider
from mlx_embeddings_server.settings import Settings

log = logging.getLogger(__name__)

Load = Callable[[detect.Choice, Snapshot, LoadOptions], Backend]


def load_backend(choice: detect.Choice, snapshot: Snapshot, options: LoadOptions) -> Backend:
    return detect.load(choice, snapshot.path, options)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under the name that requests call it by."""

    name: str
    snapshot: Snapshot
    choice: detect.Choice
    provider: LocalProvider
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Engine:
        return self.provider.engine

    @property
    def info(self) -> ModelInfo:
        return self.provider.engine.info


class Models:
    """All served models. `load` builds a backend of what was found; tests pass their own."""

    def __init__(self, settings: Settings, metrics: Metrics, load: Load = load_backend) -> None:
        """Find the checkpoints, without loading them. Raises `ModelError`."""
        names = settings.served_model_name
        if names and len(names) != len(settings.model):
            raise ModelError(
                f"--served-model-name was given {len(names)} times and --model {len(settings.model)} times: "
                "give one name for each model, in the same order, or none"
            )
        self._by_name: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False
        for place, model in enumerate(settings.model):
            snapshot = hub.resolve(model, settings.revision)
            name = names[place] if names else snapshot.name
            if name in self._by_name:
                raise ModelError(f"two models would be served as {name!r}: give each a --served-model-name")
            base = _base(snapshot)
            choice = detect.choose(
                snapshot.path, settings.backend, base=base, allow_unverified=settings.allow_unverified
            )
            options = LoadOptions(settings.device, settings.dtype, settings.max_image_tokens, base)
            engine = Engine(
                name,
                partial(load, choice, snapshot, options),
                queue_tokens=settings.max_queue_tokens,
                batch_tokens=settings.max_batch_tokens,
                observe=partial(metrics.observe_batch, name),
            )
            if not names and snapshot.source != "local":  # a short form of the id, such as all-MiniLM-L6-v2
                self._aliases[model] = name
            self._by_name[name] = ServedModel(name, snapshot, choice, LocalProvider(engine))
            metrics.watch_queue(name, engine.queue)

    def load(self) -> None:
        """Load and warm up every model; returns when all can answer. Does nothing twice. Raises `ModelError`."""
        if self._loaded:
            return
        self._loaded = True
        for model in self:
            info = model.engine.load()
            log.info(
                "serving %s: revision %s from %s, backend %s (%s), device %s, dtype %s, %d dimensions, "
                "%d tokens at most, takes %s, gives %s vectors",
                model.name,
                model.snapshot.revision or "unknown",
                model.snapshot.source,
                info.backend,
                model.choice.reason if model.choice.verified else f"{model.choice.reason}, not verified",
                info.device,
                info.dtype,
                info.dimensions,
                info.max_tokens,
                " and ".join(info.modalities),
                info.output,
            )

        # What the libraries made while loading stays: looking through it all for garbage, again and again, would stop
        # the server for a third of a second each time.
        gc.collect()
        gc.freeze()

    def get(self, name: str) -> ServedModel:
        """By served name. Raises `NotFound` with what there is."""
        try:
            return self._by_name[self._aliases.get(name, name)]
        except KeyError:
            served = ", ".join(self._by_name)
            raise NotFound(
                f"the model {quoted(name)} is not served here; served: {served}", param="model", code="model_not_found"
            ) from None

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._by_name.values())

    def stop(self) -> None:
        """Fail every request that is not answered yet; the workers end after the batch that runs."""
        for model in self:
            model.engine.stop()

    def close(self, timeout: float = 0) -> bool:
        """Stop, and wait for the workers. False: one still runs a batch."""
        self.stop()
        for model in self:
            model.provider.close()
        gc.unfreeze()  # else what the libraries made would never be freed, and nanobind prints a page of leaks
        deadline = time.monotonic() + timeout
        return all([model.engine.join(max(0.0, deadline - time.monotonic())) for model in self])


def _base(snapshot: Snapshot) -> Path | None:
    """Where `snapshot` is an adapter: the folder of the model that it changes."""
    base = detect.base_of(snapshot.path)
    if base is None:
        return None
    name, revision = base
    if snapshot.source != "local" and Path(name).expanduser().is_dir():
        raise ModelError(f"the adapter {snapshot.name} names a folder of this machine as its base model, not a hub id")
    return hub.resolve(name, revision).path
