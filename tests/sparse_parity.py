"""Sparse vectors of our backend beside those of sentence-transformers, from one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder

from mlx_embeddings_backends.base import Backend, Item, Role, SparseVector, Truncate
from tests.checkpoints import WORDS

TOLERANCE = 1e-5
TEXTS = [
    "river",
    "the quick brown fox jumps over the lazy dog",
    "Stone and light, silent and broken: the mountain in winter.",
    "unknownly spelled wörds",
    " ".join(WORDS[:40]),
    "a golden letter",
    "the sea",
    "golden moon",  # as long as the one before
]

Rows = NDArray[np.float32]  # [texts, dimensions]


def reference(folder: Path) -> SparseEncoder:
    return SparseEncoder(str(folder), device="cpu", local_files_only=True)


def embed(backend: Backend, items: Sequence[Item | str], truncate: Truncate = "none") -> list[SparseVector]:
    """All items in one batch."""
    made = [item if isinstance(item, Item) else Item(item) for item in items]
    vectors = backend.run(backend.collate(backend.prepare(made, truncate)))
    return [cast("SparseVector", vector) for vector in vectors]


def dense(vectors: Sequence[SparseVector], dimensions: int) -> Rows:
    rows = np.zeros((len(vectors), dimensions), dtype=np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        assert [vector.indices.dtype, vector.values.dtype] == [np.dtype(np.int32), np.dtype(np.float32)]
        assert (np.diff(vector.indices) > 0).all() and vector.values.all()
        row[vector.indices] = vector.values
    return rows


def rows(backend: Backend, items: Sequence[Item | str], truncate: Truncate = "none") -> Rows:
    """All items in one batch."""
    return dense(embed(backend, items, truncate), backend.info.dimensions)


def rows_singly(backend: Backend, items: Sequence[Item | str]) -> Rows:
    return np.concatenate([rows(backend, [item]) for item in items])


def expected(library: SparseEncoder, texts: Sequence[str], role: Role | None = None, **options: Any) -> Rows:
    encode: Any = {"query": library.encode_query, "document": library.encode_document, None: library.encode}[role]
    tensor: torch.Tensor = encode(list(texts), convert_to_sparse_tensor=True, **options)
    return cast("Rows", tensor.to_dense().numpy())


def check(backend: Backend, library: SparseEncoder, role: Role | None = None, **options: Any) -> None:
    """All texts in a batch and each alone, and that both say which dimensions they do not have.

    `options` are `Item`'s, and by the same names those of the library's `encode`.
    """
    items = [Item(text, role=role, **options) for text in TEXTS]
    wanted = expected(library, TEXTS, role, **options)
    assert backend.info.dimensions == wanted.shape[1]
    for found in (rows(backend, items), rows_singly(backend, items)):
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
        assert np.maximum(np.abs(found), np.abs(wanted))[(found != 0) != (wanted != 0)].max(initial=0) < 1e-6


def cosines(found: Rows, wanted: Rows) -> Rows:
    """Of each row with its counterpart."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return cast("Rows", (found * wanted).sum(axis=1) / lengths)
