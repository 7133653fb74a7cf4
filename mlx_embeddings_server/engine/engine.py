"""Joins queue and worker: prepared items in, float32 rows out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Backend, ModelInfo, Prepared
from mlx_embeddings_server.engine.queue import Queue, Ticket
from mlx_embeddings_server.engine.worker import BatchStats, State, Worker, WorkerLost


@dataclass(frozen=True, slots=True)
class Rows:
    """One request's vectors, in the order of its items: float32, [items, dimensions]."""

    vectors: NDArray[np.float32]
    queue_seconds: float
    inference_seconds: float


class Engine:
    """One model, its queue and its worker.

    `queue_tokens` bounds the tokens that wait; `batch_tokens` the padded tokens of a batch (None: the backend knows).
    `observe` is called from the worker's thread after each batch.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Backend],
        *,
        queue_tokens: int,
        batch_tokens: int | None = None,
        observe: Callable[[BatchStats], None] = lambda stats: None,
    ) -> None:
        self._batch_tokens = batch_tokens
        self.queue = Queue(queue_tokens, batch_tokens or 1)
        self._worker = Worker(name, load, self.queue, observe)
        self._info: ModelInfo | None = None

    def load(self) -> ModelInfo:
        """Start the worker and wait until the model is loaded and warm. Raises `ModelError`."""
        self._worker.start()
        self._info = self._worker.wait_until_loaded().info
        self.queue.batch_tokens = self._batch_tokens or self._info.batch_tokens
        return self._info

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "load() comes first"
        return self._info

    @property
    def state(self) -> State:
        return self._worker.state

    @property
    def reason(self) -> str | None:
        """Why the worker is not ready, in words."""
        return self._worker.reason

    @property
    def restarts(self) -> int:
        return self._worker.restarts

    @property
    def backend(self) -> Backend:
        """For `prepare`. Raises `WorkerLost` while there is none."""
        backend = self._worker.backend
        if backend is None:
            raise WorkerLost(
                "the model is being loaded again" if self.state == "restarting" else "the model is not loaded"
            )
        return backend

    async def run(self, prepared: Sequence[Prepared]) -> Rows:
        """Wait for the rows of all items. Raises `QueueFull`, or what failed the first of them.

        Cancelling takes the items that still wait out of the queue.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(future, rows=[None] * len(prepared), left=len(prepared))
        self.queue.admit(prepared, ticket)
        if self.state in ("dead", "stopped"):  # after admitting: a worker that dies later fails what waits itself
            self.queue.discard(ticket)
            raise WorkerLost("the model's worker is dead")
        try:
            await future
        except BaseException:  # cancelled, or one item failed: the others are not wanted any more
            self.queue.discard(ticket)
            raise
        vectors = np.stack([row for row in ticket.rows if row is not None])
        return Rows(vectors, ticket.queue_seconds, ticket.inference_seconds)

    def stop(self) -> None:
        """Fail every request that is not answered yet; the worker ends after the batch that runs."""
        self._worker.stop()

    def join(self, timeout: float) -> bool:
        """Wait for the worker's end after `stop`. False: it still runs a batch."""
        return self._worker.join(timeout)
