"""What tells a loaded model from every other one whose vectors may differ."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from mlx_embeddings_backends import hub
from mlx_embeddings_backends.base import Kind, ModelInfo
from mlx_embeddings_backends.checkpoints import Checkpoint
from mlx_embeddings_server import __version__
from mlx_embeddings_server.cache.keys import canonical

_COMMIT = re.compile(r"[0-9a-f]{40}")


def files_of(checkpoint: Checkpoint) -> bytes:
    """A hash over the files that decide the model's vectors: equal on machines that have equal files, wherever.

    Of a folder of the Hugging Face cache the commit says what is in the files; others are read. Blocks: reading takes
    about a second for each 1.5 GB. Raises `OSError`.
    """
    parts = (
        _folder(checkpoint.folder),
        None if checkpoint.base is None else _folder(checkpoint.base),
        tuple((name, _folder(folder)) for name, folder in checkpoint.adapters.items()),  # the first is the default
    )
    return hashlib.sha256(canonical(parts)).digest()


def identity_of(
    files: bytes, info: ModelInfo, implementation: str, kind: Kind | None, max_image_tokens: int | None
) -> bytes:
    """`files` is of `files_of`; `implementation` the backend's import string.

    Backend, kind of device and dtype are part of it: each rounds otherwise, and servers that share a cache would hand
    each other vectors that they do not compute themselves. So is this program's version.
    """
    device = info.device.partition(":")[0]
    computed_by = (__version__, implementation, info.backend, device, info.dtype)
    return hashlib.sha256(canonical((files, computed_by, kind, max_image_tokens))).digest()


def _folder(folder: Path) -> tuple[object, ...]:
    """Of the files that are served, and of no others: their names, and what is in them."""
    names = hub.needed(str(file.relative_to(folder).as_posix()) for file in _files(folder))
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        # Which of its files are here matters too: without modules.json a model is another one.
        sizes = tuple((name, (folder / name).stat().st_size) for name in names)
        return "commit", folder.parent.parent.name, folder.name, sizes
    return "files", tuple((name, _digest(folder / name)) for name in names)


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
