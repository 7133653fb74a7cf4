"""Scores of our rerankers beside those of sentence-transformers, from one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from torch import nn

from mlx_embeddings_backends.base import Item, Pair
from tests.checkpoints import WORDS

Scores = NDArray[np.float32]


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS[:-1], count))


def items(pairs: Sequence[tuple[str, str]], prompt: str = "") -> list[Item]:
    return [Item(Pair(*pair), prompt) for pair in pairs]


def reference(folder: Path) -> CrossEncoder:
    library: CrossEncoder = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    return library


def raw(library: CrossEncoder, pairs: Sequence[tuple[str, str]], **options: Any) -> Scores:
    """The library's scores without an activation, [pairs, 1]."""
    return np.asarray(library.predict(list(pairs), activation_fn=nn.Identity(), **options))[:, None]


def largest(difference: Scores) -> float:
    return float(np.abs(difference).max())
