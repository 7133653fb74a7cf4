"""What a user named, by id, path or open_clip's names, to the folders that a backend loads: model, base, adapters."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_embeddings_backends import detect, hub
from mlx_embeddings_backends.errors import ModelError, ModelNotFound
from mlx_embeddings_backends.hub import Snapshot
from mlx_embeddings_backends.progress import Progress

_HUB_PREFIX = "hf-hub:"  # open_clip's, before ids of the hub


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The folders of one model to serve."""

    snapshot: Snapshot  # of what was named: its name, its revision, where it came from
    folder: Path  # to load: the snapshot's, or where that is an AdapterHub adapter its base's
    base: Path | None = None  # where the folder holds a LoRA adapter: that of the model it changes
    adapters: Mapping[str, Path] = field(default_factory=dict)  # AdapterHub's, by name, the default first


def find(
    model: str,
    *,
    revision: str | None = None,
    pretrained: str | None = None,
    adapters: Sequence[str] = (),
    progress: Progress | None = None,
) -> Checkpoint:
    """Find or download `model` and what it stands on. Raises `ModelError`.

    `pretrained` is open_clip's tag of the weights, `model` then its name of the architecture. `adapters` are
    `NAME=ID_OR_PATH`; where `model` itself is an AdapterHub adapter it comes before them. What is fetched is added to
    `progress`.
    """
    snapshot = _snapshot(model, revision, pretrained, progress)
    named = {
        name: hub.resolve(place, None, progress).path for name, _, place in (each.partition("=") for each in adapters)
    }
    for name, folder in named.items():
        adapter = detect.read_adapter(folder)
        if adapter is None or adapter.kind != "adapterhub":
            raise ModelError(f"--adapter {name}: the folder holds no AdapterHub adapter")
    adapter = detect.read_adapter(snapshot.path)
    if adapter is None:
        return Checkpoint(snapshot, snapshot.path, adapters=named)
    base = _base(snapshot, adapter, progress)
    if adapter.kind == "peft":
        if named:
            raise ModelError("--adapter is for AdapterHub adapters, and --model names a LoRA adapter")
        return Checkpoint(snapshot, snapshot.path, base=base)
    if adapter.name in named:
        raise ModelError(f"--adapter {adapter.name}: that is the name of --model itself, choose another")
    return Checkpoint(snapshot, base, adapters={adapter.name: snapshot.path, **named})


def _snapshot(model: str, revision: str | None, pretrained: str | None, progress: Progress | None) -> Snapshot:
    if pretrained is not None:
        # Only now: open_clip imports torch, which takes seconds.
        tags = importlib.import_module("mlx_embeddings_backends.torch.open_clip_tags")
        return hub.resolve(tags.pretrained_repository(model, pretrained), revision, progress)
    try:
        return hub.resolve(model.removeprefix(_HUB_PREFIX), revision, progress)
    except ModelNotFound as error:
        if _is_open_clip_architecture(model):
            raise ModelNotFound(
                f"{model!r} is open_clip's name of an architecture: say which weights it is to have, such as --model "
                "ViT-B-32 --pretrained laion2b_s34b_b79k"
            ) from error
        raise


def _is_open_clip_architecture(model: str) -> bool:
    spec = importlib.util.find_spec("open_clip")  # none of its code is run
    folders = (spec.submodule_search_locations if spec else None) or ()
    names = (file.stem for folder in folders for file in Path(folder, "model_configs").glob("*.json"))
    return model.replace("/", "-") in names


def _base(snapshot: Snapshot, adapter: detect.Adapter, progress: Progress | None) -> Path:
    """The folder of the model that the adapter in `snapshot` changes."""
    if snapshot.source != "local" and Path(adapter.base).expanduser().is_dir():
        raise ModelError(f"the adapter {snapshot.name} names a folder of this machine as its base model, not a hub id")
    return hub.resolve(adapter.base, adapter.revision, progress).path
