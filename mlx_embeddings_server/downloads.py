"""A model's files on their way to this machine."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Literal, TypeVar

from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.progress import Progress

Result = TypeVar("Result")
State = Literal["not_started", "downloading", "ok", "failed"]


class Download(Generic[Result]):
    """Whoever wants it while it runs waits for the same one. `fetch` does it, and raises `ModelError`."""

    def __init__(self, fetch: Callable[[Progress], Coroutine[Any, Any, Result]]) -> None:
        self._fetch = fetch
        self._progress = Progress()
        self._task: asyncio.Task[Result] | None = None

    def start(self) -> asyncio.Task[Result]:
        """Unless it runs or is done: one that failed or broke off is tried again, and goes on where it was."""
        if self._task is None or (self._task.done() and self.state == "failed"):
            self._progress = Progress()
            self._task = asyncio.create_task(self._fetch(self._progress))
            self._task.add_done_callback(_look)
        return self._task

    @property
    def state(self) -> State:
        if self._task is None:
            return "not_started"
        if not self._task.done():
            return "downloading"
        return "failed" if self._task.cancelled() or self._task.exception() is not None else "ok"

    @property
    def reason(self) -> str | None:
        """Why it failed, in words for whoever runs the server."""
        if self.state != "failed" or self._task is None or self._task.cancelled():
            return None
        error = self._task.exception()
        return str(error) if isinstance(error, ModelError) else f"an unexpected error ({type(error).__name__})"

    @property
    def percent(self) -> float | None:
        """Of the bytes that have to be fetched; None: not known how many these are."""
        if self.state == "ok":
            return 100.0
        done, total = self._progress.done, self._progress.total
        # What is done is written to its place then.
        return None if not total else min(99.9, round(100 * done / total, 1))


def _look(task: "asyncio.Task[Any]") -> None:
    """At its exception, or asyncio logs that nobody did."""
    if not task.cancelled():
        task.exception()
