"""A model's files, found on this machine or brought to it."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from mlx_embeddings_backends import checkpoints, detect
from mlx_embeddings_backends.checkpoints import Checkpoint
from mlx_embeddings_backends.progress import Progress
from mlx_embeddings_server.registry import ModelSpec

_WEIGHTS: Final = frozenset((".safetensors", ".bin", ".pt", ".pth"))


@dataclass(frozen=True, slots=True)
class Found:
    """A model's files on this machine, and what will load them."""

    checkpoint: Checkpoint
    choice: detect.Choice

    @classmethod
    def of(cls, spec: ModelSpec, progress: Progress | None = None) -> Self:
        """Downloads what is not here. Raises `ModelError`."""
        checkpoint = checkpoints.find(
            spec.source,
            revision=spec.revision,
            pretrained=spec.pretrained,
            adapters=spec.adapters,
            progress=progress,
        )
        choice = detect.choose(
            checkpoint.folder,
            spec.backend,
            base=checkpoint.base,
            has_adapters=bool(checkpoint.adapters),
            allow_unverified=spec.allow_unverified,
            kind=spec.kind,
        )
        return cls(checkpoint, choice)

    @property
    def weight_bytes(self) -> int:
        """Of the files, which is about what the model will take. Many folders have the same weights as pickles, too."""
        checkpoint = self.checkpoint
        folders = {checkpoint.folder, *([checkpoint.base] if checkpoint.base else ()), *checkpoint.adapters.values()}
        sizes: defaultdict[Path, dict[bool, int]] = defaultdict(lambda: {True: 0, False: 0})
        for file in {file for folder in folders for file in folder.rglob("*") if file.suffix in _WEIGHTS}:
            sizes[file.parent][file.suffix == ".safetensors"] += file.stat().st_size
        return sum(of_folder[True] or of_folder[False] for of_folder in sizes.values())
