"""Servers that many tests share: started once in a run, and by each of pytest-xdist's workers that needs them."""

import atexit
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.server import ALL_THREADS, MINILM, Server

DATA = Path(__file__).parent / "data"

# Workers side by side, and the servers they start, compute tiny models: on one thread each, as threads that wait for
# one another on processors that others use took a third of the time. A run in one process (`-n 0`) has all threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers() -> int:
    """On few cores more than one for each: many tests wait, for servers that they start and for times to pass."""
    return max(4, os.cpu_count() or 1)


# What test modules import is half a million objects that stay: the collector need not look through them while they
# come, nor again and again later, which took a tenth of the tests' time and more.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


# At the very end, behind the collections that pytest makes when it is done; or nanobind prints a page of leaks.
atexit.register(gc.unfreeze)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """all-MiniLM-L6-v2, the real one, in float32, on all threads."""
    with Server("--model", MINILM, "--dtype", "float32", environment=ALL_THREADS) as server:
        yield server


@pytest.fixture(scope="session")
def reference_texts() -> list[str]:
    return list(json.loads((DATA / "minilm" / "texts.json").read_text())["texts"])


@pytest.fixture(scope="session")
def reference_vectors() -> NDArray[np.float32]:
    """sentence-transformers' vectors of `reference_texts`, float32, [9, 384]."""
    return load_file(DATA / "minilm" / "expected.safetensors")["embeddings"]
