"""The models that this process serves, by name."""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mlx_embeddings_backends import checkpoints, detect, hub
from mlx_embeddings_backends.base import Backend, LoadOptions, ModelInfo
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.hub import Snapshot
from mlx_embeddings_server.engine.engine import Engine
from mlx_embeddings_server.errors import NotFound, quoted
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.providers.local import LocalProvider
from mlx_embeddings_server.settings import Settings

log = logging.getLogger(__name__)

Load = Callable[[detect.Choice, Path, LoadOptions], Backend]


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

    def __init__(self, settings: Settings, metrics: Metrics, load: Load = detect.load) -> None:
        """Find the checkpoints, without loading them. Raises `ModelError`."""
        names = settings.served_model_name
        if names and len(names) != len(settings.model):
            raise ModelError(
                f"--served-model-name was given {len(names)} times and --model {len(settings.model)} times: "
                "give one name for each model, in the same order, or none"
            )
        if len(settings.model) > 1 and (settings.adapter or settings.pretrained):
            raise ModelError("--adapter and --pretrained belong to one model: give one --model with them")
        self._by_name: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False
        for place, model in enumerate(settings.model):
            checkpoint = checkpoints.find(
                model, revision=settings.revision, pretrained=settings.pretrained, adapters=settings.adapter
            )
            snapshot = checkpoint.snapshot
            name = names[place] if names else snapshot.name
            if name in self._by_name:
                raise ModelError(f"two models would be served as {name!r}: give each a --served-model-name")
            choice = detect.choose(
                checkpoint.folder,
                settings.backend,
                base=checkpoint.base,
                has_adapters=bool(checkpoint.adapters),
                allow_unverified=settings.allow_unverified,
            )
            options = LoadOptions(
                settings.device, settings.dtype, settings.max_image_tokens, checkpoint.base, checkpoint.adapters
            )
            engine = Engine(
                name,
                partial(load, choice, checkpoint.folder, options),
                queue_tokens=settings.max_queue_tokens,
                batch_tokens=settings.max_batch_tokens,
                observe=partial(metrics.observe_batch, name),
            )
            if not names and snapshot.source != "local":
                self._aliases[model] = name  # as it was typed, such as hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K
                self._aliases |= {short: name for short, full in hub.ALIASES.items() if full == name}
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
                "%d tokens at most, takes %s, gives %s vectors%s",
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
                f", adapters {', '.join(info.adapters)}" if info.adapters else "",
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
