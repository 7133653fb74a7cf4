"""Servers that many tests share: started once in a run, and by each of pytest-xdist's workers that needs them."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.server import MINILM, Server

DATA = Path(__file__).parent / "data"

# What test modules import is half a million objects that stay: the collector need not look through them while they
# come, nor again and again later, which took a tenth of the tests' time and more.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind prints a page of leaks


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
