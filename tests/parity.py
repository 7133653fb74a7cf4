"""Vectors of our backend beside those of sentence-transformers, from one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, DType, Item, LoadOptions, Truncate

Rows = NDArray[np.float32]  # [texts, dimensions]


def load(
    folder: Path,
    dtype: DType | Literal["auto"] = "float32",
    device: str = "cpu",
    backend: Literal["torch", "mlx"] = "torch",
) -> Backend:
    choice = detect.choose(folder, backend, allow_unverified=backend == "mlx")
    return detect.load(choice, folder, LoadOptions(device=device, dtype=dtype))


def reference(folder: Path) -> SentenceTransformer:
    """The same folder as sentence-transformers loads it, in float32 on the CPU."""
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).float().eval()


def embed(backend: Backend, items: Sequence[Item | str], truncate: Truncate = "none") -> Rows:
    """All items in one padded batch, as `run` gives them."""
    made = [item if isinstance(item, Item) else Item(item) for item in items]
    rows = backend.run(backend.collate(backend.prepare(made, truncate)))
    assert isinstance(rows, np.ndarray)
    return rows


def embed_singly(backend: Backend, items: Sequence[Item | str], truncate: Truncate = "none") -> Rows:
    return np.concatenate([embed(backend, [item], truncate) for item in items])


def unit(rows: Rows) -> Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def distance(rows: Rows, others: Rows) -> float:
    """The largest difference of any component of the normalised rows. NaN where there is one."""
    assert rows.shape == others.shape
    return float(np.abs(unit(rows) - unit(others)).max())


def cosines(rows: Rows, others: Rows) -> Rows:
    """Of each row with its counterpart, [texts]."""
    return np.asarray((unit(rows).astype(np.float64) * unit(others)).sum(axis=1), dtype=np.float32)
