"""The one thread that touches the device: loads the model, runs batches, and starts over when the device is lost."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from mlx_embeddings_backends.base import Backend, Row, Rows, SparseVector
from mlx_embeddings_backends.errors import DeviceLost, ModelError
from mlx_embeddings_server.engine.handover import Handover
from mlx_embeddings_server.engine.queue import Job, Queue, Ticket
from mlx_embeddings_server.engine.turns import DeviceTurns, Turns
from mlx_embeddings_server.logs import TOLD_IN_FULL, without_words

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "dead", "stopped"]

# A worker gives up when so many loads in a row have failed; these are the seconds before each. One that succeeds starts
# the count anew: what kills the worker after that is an input, and no input does so more than twice.
RESTART_PAUSES = (0.0, 1.0, 5.0, 15.0)


class InferenceFailed(Exception):
    """The model raised on this item, alone in its batch."""


class NonFiniteVector(Exception):
    """The model gave a NaN or an infinity for this item."""


class WorkerLost(Exception):
    """The worker died under this item, or before it came to it."""


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What one batch was: for the metrics."""

    items: int
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A batch made ready while another ran. `collated` is None where joining it failed: the worker finds out why."""

    jobs: list[Job]
    collated: Any | None


class Worker:
    """Owns the backend, and runs a batch when `turns` lets its device. `observe` is called after each batch, from the
    worker's thread."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Backend],
        queue: Queue,
        observe: Callable[[BatchStats], None],
        turns: DeviceTurns,
    ) -> None:
        self.state: State = "starting"
        self.reason: str | None = None
        self.restarts = 0
        self.backend: Backend | None = None
        self._load = load
        self._queue = queue
        self._handover = Handover(queue)
        self._observe = observe
        self._turns = turns
        self._ahead: _Ahead | None = None
        self._collating: list[Job] = []
        self._running: list[Job] = []
        self._stopping = False
        self._stopped = threading.Event()  # the same, to wait for
        self._failed_in_a_row = 0
        self._first_load: BaseException | None = None
        self._settled = threading.Event()  # the first load has succeeded or failed
        self._threads = [
            threading.Thread(target=self._live, name=f"worker-{name}", daemon=True),
            threading.Thread(target=self._prepare_ahead, name=f"prepare-{name}", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_until_loaded(self) -> Backend:
        """Block until the model is loaded and warm. Raises `ModelError`."""
        self._settled.wait()
        error = self._first_load
        if isinstance(error, ModelError):
            raise error
        if error is not None:
            raise ModelError(f"the model could not be loaded: {type(error).__name__}: {error}") from error
        assert self.backend is not None
        return self.backend

    def stop(self) -> None:
        """End after the batch that runs. Every request that is not answered yet is failed, at once."""
        with self._queue.lock:
            self._stopping = True
            self._stopped.set()
            self._queue.arrived.notify_all()
            self._queue.filled.notify_all()
        self._fail_everything(WorkerLost("the server is shutting down"))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the threads' end after `stop`, so many seconds at most. False: the batch that runs takes longer."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive():
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # The worker's thread

    def _live(self) -> None:
        while not self._stopping:
            try:
                self._load_and_warm()
                self._settled.set()
                self._serve()
            except BaseException as error:  # whatever killed this life, the next one may be sound
                if not self._settled.is_set():
                    self.state, self._first_load = "dead", error
                    self._settled.set()
                    return
                if not self._rise_again(error):
                    return
        self.state, self.backend = "stopped", None
        self._fail_everything(WorkerLost("the server is shutting down"))

    def _load_and_warm(self) -> None:
        backend = self._load()
        turns = self._turns.of(backend.info.device)
        turns.take()
        try:
            backend.warm_up()
        finally:
            turns.pass_on()
        self.backend = backend
        self._failed_in_a_row = 0
        self.state, self.reason = "ready", None

    def _rise_again(self, error: BaseException) -> bool:
        """Put the batch that ran back in the queue and say whether to load again."""
        ran, self._running = self._running, []
        # A failing batch is run in parts: some of its requests may be done.
        self._handover.settle({job.ticket for job in ran if job.ticket.left == 0 or job.ticket.error is not None})
        unfinished = [job for job in ran if job.is_wanted]
        lost = {job.ticket for job in unfinished if job.suspect}
        self._answer(lost, WorkerLost("the worker died twice under this input"))
        self._queue.put_back([job for job in unfinished if not job.suspect])
        self._failed_in_a_row += 1
        # Everybody may read it: what killed the worker may quote its input, and what a load fails with names files.
        self.reason = type(error).__name__
        log.error(
            "the worker died, attempt %d to restart it",
            self._failed_in_a_row,
            exc_info=without_words(error) if ran else error,
            extra={"request_ids": _request_ids(unfinished)} if ran else TOLD_IN_FULL,
        )
        if self._failed_in_a_row > len(RESTART_PAUSES):
            self.state = "dead"
            self._fail_everything(WorkerLost("the model's worker is dead"))
            return False
        self.state, self.backend = "restarting", None
        self.restarts += 1
        self._stopped.wait(RESTART_PAUSES[self._failed_in_a_row - 1])
        return True

    def _serve(self) -> None:
        backend = self.backend
        assert backend is not None
        turns = self._turns.of(backend.info.device)
        while (batch := self._next(turns)) is not None:
            started = time.perf_counter()
            try:
                done = self._run(backend, batch.jobs, batch.collated)
            finally:
                turns.pass_on()
            seconds = time.perf_counter() - started
            self._running = []
            self._record(batch.jobs, seconds)
            self._handover.settle(done)
            if done and not self._has_work():
                self._handover.wait()

    def _has_work(self) -> bool:
        """Whether the next batch would be a full one."""
        with self._queue.lock:
            return self._ahead is not None or bool(self._collating) or self._queue.has_full_batch()

    def _next(self, turns: Turns) -> _Ahead | None:
        """The batch made ready, else one formed now, with the device's turn; blocks until there are both. None: stop.

        Where another worker runs, the batch is formed after it: what comes meanwhile joins.
        """
        queue = self._queue
        while True:
            with queue.lock:
                while not self._stopping and not self._can_run():
                    queue.arrived.wait()
                if self._stopping:
                    return None
                if turns.take_if_free():
                    return self._form()
            turns.take()
            with queue.lock:
                if not self._stopping and self._can_run():
                    return self._form()
            turns.pass_on()  # those who asked have gone meanwhile

    def _can_run(self) -> bool:
        """Whether there is a batch. The queue's lock must be held."""
        return self._ahead is not None or (bool(self._queue.waiting) and not self._collating)

    def _form(self) -> _Ahead:
        """The queue's lock must be held, and there must be one."""
        queue = self._queue
        if self._ahead is not None:
            batch, self._ahead = self._ahead, None
        else:
            batch = _Ahead(queue.take(), None)
        self._running = batch.jobs
        if queue.has_full_batch():
            queue.filled.notify()
        return batch

    def _run(self, backend: Backend, jobs: list[Job], collated: Any | None) -> set[Ticket]:
        """Fill the jobs' tickets; returns the complete ones. A failing batch is halved until the bad item is alone."""
        try:
            rows = backend.run(backend.collate([job.prepared for job in jobs]) if collated is None else collated)
        except DeviceLost:
            raise
        except Exception as error:  # whatever the model raises: other items must not suffer for it
            if len(jobs) > 1:
                half = len(jobs) // 2
                return self._run(backend, jobs[:half], None) | self._run(backend, jobs[half:], None)
            log.error(
                "the model failed on one input of %d tokens",
                jobs[0].prepared.tokens,
                exc_info=without_words(error),
                extra={"request_id": jobs[0].ticket.request_id},
            )
            failure = InferenceFailed(str(error))
            failure.__cause__ = error
            return _fail(jobs[0].ticket, failure)
        return _fill(jobs, rows)

    def _record(self, jobs: Sequence[Job], seconds: float) -> None:
        tokens = [job.prepared.tokens for job in jobs]
        padded = len(tokens) * max(tokens)
        self._queue.pace.observe(sum(tokens), seconds)
        for ticket in {job.ticket for job in jobs}:
            ticket.inference_seconds = max(ticket.inference_seconds, seconds)
        self._observe(BatchStats(len(tokens), sum(tokens), padded, seconds))

    def _answer(self, tickets: set[Ticket], error: BaseException) -> None:
        done: set[Ticket] = set()
        for ticket in tickets:
            done |= _fail(ticket, error)
        self._handover.settle(done)

    def _fail_everything(self, error: BaseException) -> None:
        jobs = self._queue.take_all()
        with self._queue.lock:
            jobs += self._running + self._collating
            if self._ahead is not None:
                jobs += self._ahead.jobs
                self._ahead = None
        self._answer({job.ticket for job in jobs}, error)

    # The thread that makes the next batch ready while one runs

    def _prepare_ahead(self) -> None:
        """Only full batches: one that could still grow is formed when the worker is free, and not before."""
        queue = self._queue
        while True:
            with queue.lock:
                while not self._stopping and not self._can_prepare_ahead():
                    queue.filled.wait()
                backend = self.backend
                if self._stopping:
                    return
                if backend is None:  # lost a moment ago
                    continue
                jobs = self._collating = queue.take()
            try:
                collated = backend.collate([job.prepared for job in jobs])
            except BaseException:  # the worker meets the same error, and splits the batch or starts over
                collated = None
            with queue.lock:
                self._ahead, self._collating = _Ahead(jobs, collated), []
                queue.arrived.notify()

    def _can_prepare_ahead(self) -> bool:
        return bool(self._running) and self._ahead is None and self._queue.has_full_batch()


def _fill(jobs: Sequence[Job], rows: Rows) -> set[Ticket]:
    done: set[Ticket] = set()
    for job, row, is_finite in zip(jobs, rows, _are_finite(rows), strict=True):
        ticket = job.ticket
        if not is_finite:
            done |= _fail(ticket, NonFiniteVector("the model gave NaN or infinity"))
            continue
        ticket.rows[job.index] = row
        ticket.left -= 1
        if ticket.left == 0:
            done.add(ticket)
    return done


def _are_finite(rows: Rows) -> Sequence[bool]:
    """Of each item."""
    if isinstance(rows, np.ndarray):
        return cast("list[bool]", np.isfinite(rows).all(axis=1).tolist())
    return list(map(_is_finite, rows))


def _is_finite(row: Row) -> bool:
    match row:
        case Mapping():
            return all(map(_is_finite, row.values()))
        case SparseVector():
            return bool(np.isfinite(row.values).all())
    return bool(np.isfinite(row).all())


def _request_ids(jobs: Sequence[Job]) -> list[str]:
    return sorted({job.ticket.request_id for job in jobs if job.ticket.request_id is not None})


def _fail(ticket: Ticket, error: BaseException) -> set[Ticket]:
    """The first error is the request's; there is nothing to settle twice."""
    if ticket.error is not None:
        return set()
    ticket.error = error
    return {ticket}
