"""Takes back the work of clients who have gone."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

Result = TypeVar("Result")

# Seconds between two looks. Most requests are answered before the first: they cost no more than an entry in a dict.
INTERVAL = 0.25


class ClientGone(Exception):
    """The client closed the connection before its answer was there."""


class DisconnectWatcher:
    """One task that looks after all waiting requests, where a task for each would cost as much as the request."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Task[object], Request] = {}
        self._gone: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            for task, request in list(self._waiting.items()):
                if task not in self._gone and await request.is_disconnected():
                    self._gone.add(task)
                    task.cancel()

    async def until_gone(self, request: Request, work: Awaitable[Result]) -> Result:
        """The result of `work`, cancelled when the client leaves. The body must have been read. Raises `ClientGone`."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = request
        try:
            return await work
        except asyncio.CancelledError:
            if task not in self._gone:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            del self._waiting[task]
            self._gone.discard(task)
