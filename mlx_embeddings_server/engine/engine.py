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
from mlx_embeddings_server.request_record import current_id

# Seconds between two looks whether there is room again for the rest of a request.
_ROOM_PAUSE = 0.01
# A request of so many batches or more is admitted in parts.
_PARTS_FROM = 2


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

    def promise(self, tokens: int) -> None:
        """Keep room for all of a large request, which then is admitted in parts. Raises `QueueFull`."""
        self._engine.queue.promise(self._ticket, tokens)

    async def until_in_turn(self) -> None:
        """While enough of its items wait: more would only be in the way of other requests."""
        while self._ticket.waiting >= self._engine.queue.step and not self.has_failed:
            await asyncio.sleep(_ROOM_PAUSE)

    async def admit_when_there_is_room(self, prepared: Sequence[Prepared], places: Sequence[int]) -> None:
        """The same, but a full queue refuses only the request's first items: what has begun is carried through."""
        await self.until_in_turn()
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
        return Outcome(cast("list[Row]", ticket.rows), ticket.queue_seconds, ticket.inference_seconds)


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
        future = asyncio.get_running_loop().create_future()
        ticket = Ticket(future, rows=[None] * items, left=items, request_id=current_id())
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
            parts = _parts(prepared, self.queue.batch_tokens)
            if len(parts) > 1:
                request.promise(sum(each.tokens for each in prepared))
            for places in parts:
                await request.until_in_turn()
                if request.has_failed:
                    break
                request.admit([prepared[place] for place in places], places)
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


def _parts(prepared: Sequence[Prepared], batch_tokens: int) -> list[Sequence[int]]:
    """Places of items that are admitted together: all, or of a large request those of about a batch, like in length."""
    if len(prepared) == 1 or sum(each.tokens for each in prepared) <= _PARTS_FROM * batch_tokens:
        return [range(len(prepared))]
    parts: list[Sequence[int]] = []
    part: list[int] = []
    # The longest first: what does not fit into memory shows at once.
    for place in sorted(range(len(prepared)), key=lambda place: (str(prepared[place].group), -prepared[place].tokens)):
        if part and (len(part) + 1) * prepared[part[0]].tokens > batch_tokens:
            parts.append(part)
            part = []
        part.append(place)
    return [*parts, part]
