"""Joins queue and worker: prepared items in, float32 vectors out."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from mlx_embeddings_backends.base import Backend, ModelInfo, Prepared, Row
from mlx_embeddings_server.engine.queue import Queue, QueueFull, Ticket
from mlx_embeddings_server.engine.turns import DeviceTurns
from mlx_embeddings_server.engine.worker import BatchStats, State, Worker, WorkerLost

# Seconds between two looks whether there is room again for the rest of a request.
_ROOM_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one request's items gave, in their order."""

    rows: list[Row]
    queue_seconds: float
    inference_seconds: float


class Request:
    """Items of one request, admitted as they get ready: the first run while the last are still being prepared."""

    def __init__(self, engine: "Engine", ticket: Ticket) -> None:
        self._engine = engine
        self._ticket = ticket

    @property
    def has_failed(self) -> bool:
        """Whether one of its items has: those that are not prepared yet need not be."""
        return self._ticket.error is not None

    def admit(self, prepared: Sequence[Prepared], places: Sequence[int]) -> None:
        """Items that the request has at `places`. Raises `QueueFull` or `WorkerLost`."""
        self._engine.queue.admit(prepared, self._ticket, places)
        if self._engine.state in (
            "dead",
            "stopped",
        ):  # after admitting: a worker that dies later fails what waits itself
            raise WorkerLost("the model's worker is dead")

    async def admit_when_there_is_room(self, prepared: Sequence[Prepared], places: Sequence[int]) -> None:
        """The same, but a full queue refuses only the request's first items: what has begun is carried through."""
        while True:
            try:
                return self.admit(prepared, places)
            except QueueFull:
                if not self._ticket.admitted:
                    raise
            await asyncio.sleep(_ROOM_PAUSE)

    async def result(self) -> Outcome:
        """Wait for all items. Raises what failed the first of them."""
        ticket = self._ticket
        await ticket.future
        return Outcome(cast(list[Row], ticket.rows), ticket.queue_seconds, ticket.inference_seconds)


class Engine:
    """One model, its queue and its worker.

    `queue_tokens` bounds the tokens that wait; `batch_tokens` the padded tokens of a batch (None: the backend knows).
    `observe` is called from the worker's thread after each batch. `turns` are shared with the other models' workers.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Backend],
        *,
        queue_tokens: int,
        batch_tokens: int | None = None,
        observe: Callable[[BatchStats], None] = lambda stats: None,
        turns: DeviceTurns | None = None,
    ) -> None:
        self._batch_tokens = batch_tokens
        self.queue = Queue(queue_tokens, batch_tokens or 1)
        self._worker = Worker(name, load, self.queue, observe, turns or DeviceTurns())
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

    @contextmanager
    def request(self, items: int) -> Iterator[Request]:
        """A request of so many items. Leaving takes what still waits of it out of the queue."""
        ticket = Ticket(asyncio.get_running_loop().create_future(), rows=[None] * items, left=items)
        try:
            yield Request(self, ticket)
        finally:
            if ticket.left:  # cancelled, or an item failed: the others are not wanted any more
                self.queue.discard(ticket)
                if not ticket.future.cancel() and not ticket.future.cancelled():
                    ticket.future.exception()  # looked at: else asyncio logs that nobody did

    async def run(self, prepared: Sequence[Prepared]) -> Outcome:
        """A request whose items are all prepared. Raises `QueueFull`, or what failed the first of them."""
        with self.request(len(prepared)) as request:
            request.admit(prepared, range(len(prepared)))
            return await request.result()

    def unload(self) -> None:
        """End the worker and drop the model. Blocks until then; nothing may be waiting."""
        self.stop()
        self._worker.join()

    def stop(self) -> None:
        """Fail every request that is not answered yet; the worker ends after the batch that runs."""
        self._worker.stop()

    def join(self, timeout: float) -> bool:
        """Wait for the worker's end after `stop`. False: it still runs a batch."""
        return self._worker.join(timeout)
