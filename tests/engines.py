"""Engines of this process with a backend that tells what is done with it."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Backend, Item, Prepared
from mlx_embeddings_server.engine.engine import Engine, Outcome
from tests.scripted import ScriptedBackend, vector

Result = TypeVar("Result")
PATIENCE = 30.0  # seconds


class Observed(ScriptedBackend):
    """Writes down what is called, on which thread; `gate` holds `run` up while it is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.collated = threading.Event()  # set by each `collate`; tests clear it
        self.batches: list[list[str]] = []
        self.at_once = self.most_at_once = 0
        self.threads = {threading.get_ident()}  # that constructed and ran it

    def collate(self, batch: Sequence[Prepared]) -> list[str]:
        self.collated.set()
        return super().collate(batch)

    def run(self, batch: list[str]) -> NDArray[np.float32]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.threads.add(threading.get_ident())
        self.batches.append(batch)
        self.running.set()
        assert self.gate.wait(PATIENCE)
        try:
            return super().run(batch)
        finally:
            self.at_once -= 1


@contextmanager
def loaded(
    load: Callable[[], Backend] = Observed, *, queue_tokens: int = 100_000, batch_tokens: int = 16
) -> Iterator[Engine]:
    engine = Engine("toy", load, queue_tokens=queue_tokens, batch_tokens=batch_tokens)
    engine.load()
    backend = engine.backend
    if isinstance(backend, Observed):  # forget the warm-up
        backend.batches.clear()
        backend.running.clear()
        backend.collated.clear()
    try:
        yield engine
    finally:
        if isinstance(backend, Observed):
            backend.gate.set()
        engine.stop()
        assert engine.join(PATIENCE)


def observed(engine: Engine) -> Observed:
    backend = engine.backend
    assert isinstance(backend, Observed)
    return backend


def embed(engine: Engine, *texts: str) -> Awaitable[Outcome]:
    return engine.run(ScriptedBackend().prepare([Item(text) for text in texts]))


def run(work: Awaitable[Result]) -> Result:
    async def limited() -> Result:
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def hold(engine: Engine) -> asyncio.Task[Outcome]:
    """Close the gate with one item behind it: what comes next waits until the gate is opened."""
    backend = observed(engine)
    backend.gate.clear()
    backend.running.clear()
    held = asyncio.ensure_future(embed(engine, "held"))
    await until(backend.running.is_set)
    return held


def expected(*texts: str) -> NDArray[np.float32]:
    return np.stack([vector(text) for text in texts])
