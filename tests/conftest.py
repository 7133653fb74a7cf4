"""Servers that many tests share: started once in a run, and by each of pytest-xdist's workers that needs them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.server import MINILM, Server

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """all-MiniLM-L6-v2, the real one, in float32."""
    with Server("--model", MINILM, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def reference_texts() -> list[str]:
    return list(json.loads((DATA / "minilm" / "texts.json").read_text())["texts"])


@pytest.fixture(scope="session")
def reference_vectors() -> NDArray[np.float32]:
    """sentence-transformers' vectors of `reference_texts`, float32, [9, 384]."""
    return load_file(DATA / "minilm" / "expected.safetensors")["embeddings"]
