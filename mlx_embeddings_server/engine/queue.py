"""Admission: items wait here, bounded by their tokens, until the worker takes them as a batch."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_embeddings_backends.base import Prepared, Row
from mlx_embeddings_server.engine.batcher import pick

# Only the oldest items are looked at when a batch is formed: it bounds the time that the lock is held.
WINDOW = 4096
# Of work that waits of one request, seconds: more is in the way of others, less leaves a fast device idle.
_STEP_SECONDS = 0.05


class QueueFull(Exception):
    """More tokens wait than the bound allows. `retry_after` is in seconds."""

    def __init__(self, waiting: int, bound: int, retry_after: float) -> None:
        super().__init__(f"{waiting} tokens are waiting, the bound is {bound}")
        self.retry_after = retry_after


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place in the queue: its items' vectors arrive one by one, its future is set once."""

    future: asyncio.Future[None]
    rows: list[Row | None]
    left: int
    error: BaseException | None = None
    request_id: str | None = None  # for the log
    admitted: bool = False  # some of its items wait, run or are done
    waiting: int = 0  # tokens of its items in the queue
    promised: int = 0  # tokens of those that are to come, for which there is room
    to_come: int = 0  # their number
    queue_seconds: float = 0.0  # until its last item was taken
    inference_seconds: float = 0.0  # of the longest batch that carried one of its items

    def settle(self) -> None:
        """Wake the waiting request. Called on the event loop."""
        if self.future.done():  # the client left meanwhile
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(None)


@dataclass(slots=True, eq=False)
class Job:
    """One item of one request."""

    prepared: Prepared
    ticket: Ticket
    index: int
    admitted_at: float
    suspect: bool = False  # was in a batch that took the worker down: runs alone, and not a third time

    @property
    def is_wanted(self) -> bool:
        """Whether its request waits for it still: no row yet, no error, and a client that is there."""
        ticket = self.ticket
        return ticket.rows[self.index] is None and ticket.error is None and not ticket.future.done()


@dataclass(slots=True)
class Pace:
    """Tokens a second, as a moving average, from which Retry-After is told."""

    tokens_per_second: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second = rate if not self.tokens_per_second else 0.9 * self.tokens_per_second + 0.1 * rate

    def seconds_for(self, tokens: int) -> float:
        return tokens / self.tokens_per_second if self.tokens_per_second else 1.0


class Queue:
    """Thread-safe: requests admit on the event loop, the worker's threads take.

    `bound` is in tokens. `lock` guards everything; `arrived` says that an item waits, `filled` that a full batch does.
    """

    def __init__(self, bound: int, batch_tokens: int) -> None:
        self.bound = bound
        self.batch_tokens = batch_tokens
        self.pace = Pace()
        self.waiting: list[Job] = []
        self.tokens = 0
        self.promised = 0  # tokens of large requests that are not admitted yet
        self.to_come = 0  # their items
        self.requests = 0  # admitted so far
        self.lock = threading.Lock()
        self.arrived = threading.Condition(self.lock)
        self.filled = threading.Condition(self.lock)

    def check_room(self) -> None:
        """Refuse a request before any work is done for it. Raises `QueueFull`."""
        if self.tokens >= self.bound:
            raise self._full(self.tokens, 0)

    @property
    def backlog_items(self) -> int:
        """That wait, here or to be admitted."""
        return len(self.waiting) + self.to_come

    @property
    def backlog_tokens(self) -> int:
        return self.tokens + self.promised

    @property
    def step(self) -> int:
        """Tokens of one request that are to wait at most: as many as keep the worker busy until it looks for more."""
        return max(1, self.batch_tokens // 2, int(self.pace.tokens_per_second * _STEP_SECONDS))

    def promise(self, ticket: Ticket, tokens: int) -> None:
        """Keep room for a large request, which is admitted in parts. Raises `QueueFull`.

        Such requests are bounded together. Smaller ones are admitted beside them, since these hardly wait for them.
        """
        with self.lock:
            self._check(self.tokens + self.promised, tokens)
            self.promised += tokens
            ticket.promised = tokens
            self.to_come += ticket.left
            ticket.to_come = ticket.left

    def admit(self, prepared: Sequence[Prepared], ticket: Ticket, places: Sequence[int]) -> None:
        """Items that the request has at `places`: all of them or none. Raises `QueueFull`.

        What alone exceeds the bound is admitted when nothing waits: refusing it would be for ever.
        """
        tokens = sum(each.tokens for each in prepared)
        now = time.perf_counter()
        with self.lock:
            if ticket.promised:
                self.promised -= tokens
                ticket.promised -= tokens
                self.to_come -= len(prepared)
                ticket.to_come -= len(prepared)
            else:
                self._check(self.tokens, tokens)
            self.waiting.extend(Job(each, ticket, place, now) for place, each in zip(places, prepared, strict=True))
            self.tokens += tokens
            ticket.waiting += tokens
            self.requests += not ticket.admitted
            ticket.admitted = True
            self.arrived.notify()
            if self.has_full_batch():
                self.filled.notify()

    def _check(self, taken: int, wanted: int) -> None:
        """Raises `QueueFull`."""
        if taken and taken + wanted > self.bound:
            raise self._full(taken, wanted)

    def _full(self, taken: int, wanted: int) -> QueueFull:
        # A quarter of the bound at least, so that those who come back find room and not each other.
        room_wanted = max(taken + wanted - self.bound, self.bound // 4)
        return QueueFull(taken, self.bound, self.pace.seconds_for(room_wanted))

    def take(self) -> list[Job]:
        """The next batch. `lock` must be held, and something must wait."""
        window = self.waiting[:WINDOW]
        oldest = window[0]
        # Suspects are at the front, so those behind a trusted item are trusted too.
        chosen = [0] if oldest.suspect else pick([job.prepared for job in window], self.batch_tokens)
        taken = set(chosen)
        self.waiting[: len(window)] = [job for place, job in enumerate(window) if place not in taken]
        jobs = [window[place] for place in chosen]
        self.tokens -= sum(job.prepared.tokens for job in jobs)
        now = time.perf_counter()
        for job in jobs:
            job.ticket.waiting -= job.prepared.tokens
            job.ticket.queue_seconds = max(job.ticket.queue_seconds, now - job.admitted_at)
        return jobs

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Return jobs to the front, to run alone."""
        with self.lock:
            for job in jobs:
                job.suspect = True
                job.ticket.waiting += job.prepared.tokens
            self.waiting[:0] = jobs
            self.tokens += sum(job.prepared.tokens for job in jobs)

    def discard(self, ticket: Ticket) -> None:
        """Forget what still waits of a request whose client has gone."""
        with self.lock:
            self.promised -= ticket.promised
            self.to_come -= ticket.to_come
            ticket.promised = ticket.to_come = ticket.waiting = 0
            kept = [job for job in self.waiting if job.ticket is not ticket]
            if len(kept) < len(self.waiting):
                self.tokens = sum(job.prepared.tokens for job in kept)
                self.waiting = kept

    def take_all(self) -> list[Job]:
        with self.lock:
            jobs, self.waiting, self.tokens = self.waiting, [], 0
        return jobs

    def has_full_batch(self) -> bool:
        """Whether a batch formed now could hardly grow any more. `lock` must be held."""
        full = self.tokens >= self.batch_tokens or len(self.waiting) >= WINDOW
        return full and bool(self.waiting) and not self.waiting[0].suspect
