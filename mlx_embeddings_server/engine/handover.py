"""From the worker's thread to the event loop: requests that are done, and a moment to take in what follows."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

from mlx_embeddings_server.engine.queue import Queue, Ticket

# Rounds of the event loop without a new request, after which the answered clients are taken to have nothing to ask.
# Some 0.2 ms where the loop has nothing else to do. And the most, in seconds, that a worker waits for that.
QUIET_ROUNDS = 20
LONGEST = 0.02


class Handover:
    """Wakes requests, and tells the worker when the event loop has come to rest.

    A worker that started the next batch at once would take half of the waiting clients, and fight with the event loop
    for the processor and the interpreter's lock while that answers the other half: on two cores, with 32 clients of one
    short text each, throughput was a third lower. An idle server does not wait here: its loop is at rest already.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._at_rest = threading.Event()

    def settle(self, tickets: Iterable[Ticket]) -> None:
        """Wake the tickets' requests. From any thread: one call an event loop, not one a request."""
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[Ticket]] = defaultdict(list)
        for ticket in tickets:
            by_loop[ticket.future.get_loop()].append(ticket)
        for loop, answered in by_loop.items():
            self._at_rest.clear()
            with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(self._wake, loop, answered)

    def wait(self) -> None:
        """Block until as many requests have come as were answered, or none comes for a moment."""
        self._at_rest.wait(LONGEST)

    def _wake(self, loop: asyncio.AbstractEventLoop, answered: list[Ticket]) -> None:
        for ticket in answered:
            ticket.settle()
        admitted = self._queue.requests
        self._poll(loop, admitted + len(answered), admitted, 0)

    def _poll(self, loop: asyncio.AbstractEventLoop, enough: int, before: int, quiet: int) -> None:
        """Once a round of the loop, which reads and answers requests in between."""
        admitted = self._queue.requests
        quiet = quiet + 1 if admitted == before else 0
        if admitted >= enough or quiet > QUIET_ROUNDS:
            self._at_rest.set()
        else:
            loop.call_soon(self._poll, loop, enough, admitted, quiet)
