"""A job is interrupted where it waits for a model or for vectors, and nowhere else: what a store has begun it ends."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Reason = Literal["cancelled", "stopped"]


class Interrupted(Exception):
    """The job is to end now: it was cancelled, or the process ends."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class Interruption:
    """Of one job. The first reason holds."""

    def __init__(self) -> None:
        self._reason: Reason | None = None
        self._happened = asyncio.Event()

    def interrupt(self, reason: Reason) -> None:
        self._reason = self._reason or reason
        self._happened.set()

    def check(self) -> None:
        """Raises `Interrupted`."""
        if self._reason is not None:
            raise Interrupted(self._reason)

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. Raises `Interrupted`; the work is cancelled then."""
        task, happened = asyncio.ensure_future(work), asyncio.ensure_future(self._happened.wait())
        try:
            await asyncio.wait([task, happened], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            happened.cancel()
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
        self.check()
        raise AssertionError("only an interruption ends the wait")
