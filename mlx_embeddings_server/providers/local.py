"""A model of this process: tokenises off the event loop where that takes long, and runs through the engine."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Item, Truncate
from mlx_embeddings_server.engine.engine import Engine

# Up to so many characters or token ids, tokenising takes less than handing it to another thread and back.
INLINE_LENGTH = 2000


@dataclass(frozen=True, slots=True)
class Vectors:
    """Raw rows of the items, in their order, and what they took."""

    rows: NDArray[np.float32]  # [items, dimensions]
    tokens: list[int]
    truncated: list[bool]
    tokenize_seconds: float
    queue_seconds: float
    inference_seconds: float


class LocalProvider:
    """One engine as a source of vectors."""

    name = "local"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tokenizing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    async def embed(self, items: Sequence[Item], truncate: Truncate) -> Vectors:
        """Raises `QueueFull` before any work is done, a backend's `InputError`, or what failed the run."""
        self.engine.queue.check_room()
        backend = self.engine.backend
        started = time.perf_counter()
        if sum(len(item.content) + len(item.prompt) for item in items) <= INLINE_LENGTH:
            prepared = backend.prepare(items, truncate)
        else:
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._tokenizing, backend.prepare, items, truncate)
        tokenize_seconds = time.perf_counter() - started
        rows = await self.engine.run(prepared)
        return Vectors(
            rows=rows.vectors,
            tokens=[each.tokens for each in prepared],
            truncated=[each.truncated for each in prepared],
            tokenize_seconds=tokenize_seconds,
            queue_seconds=rows.queue_seconds,
            inference_seconds=rows.inference_seconds,
        )

    def close(self) -> None:
        self.engine.stop()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
