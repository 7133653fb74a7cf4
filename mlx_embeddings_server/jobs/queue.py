"""The queue: huey's, in an SQLite file or in Redis. It says which job comes next, and wakes a worker.

huey removes a message when a worker takes it, so a killed worker's is lost with it. That is why messages are no more
than a job's name, and why lost ones are put again from the records (`worker.py`); one too many does no harm.
"""

import json
import logging
import sqlite3
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from huey import Huey, PriorityRedisHuey, SqliteHuey
from huey.consumer import Consumer
from huey.registry import Message
from huey.serializer import Serializer

_REDIS_TIMEOUT = 5.0  # seconds; more than huey waits for a message
# Seconds between two looks into SQLite, at first and at most. Redis tells by itself.
_POLL_FIRST, _POLL_MOST = 0.05, 0.5

# It logs a line for each message, and failures of jobs are logged here.
logging.getLogger("huey").setLevel(logging.WARNING)


class QueueUnavailable(Exception):
    """What is in the records is put into the queue later."""


class UnusableQueue(Exception):
    """The setting is wrong, or a package is not installed."""


class Queue:
    """Blocks. May be called from several threads."""

    def __init__(self, huey: Huey, errors: tuple[type[Exception], ...], run: Callable[[str], None] | None) -> None:
        """`run` gets a job's uuid on the consumer's thread, and raises nothing. None: jobs are only put in."""
        self._huey = huey
        self._errors = errors

        @huey.task()  # type: ignore[untyped-decorator]
        def expand_reembed(uuid: str) -> None:
            assert run is not None
            run(uuid)

        self._task = expand_reembed

    def put(self, uuid: str, priority: int) -> None:
        """Raises `QueueUnavailable`."""
        try:
            self._huey.enqueue(self._task.s(uuid, priority=-priority))  # huey's largest comes first
        except self._errors as error:
            raise QueueUnavailable(f"{type(error).__name__}: {error}") from error

    def waiting(self) -> set[str]:
        """The uuids of the jobs that are in the queue. Raises `QueueUnavailable`."""
        try:
            return {task.args[0] for task in self._huey.pending()}
        except self._errors as error:
            raise QueueUnavailable(f"{type(error).__name__}: {error}") from error

    def consumer(self) -> Consumer:
        """A thread that takes jobs, one after the other, and huey's scheduler, which has nothing to do here."""
        for thread in ("Worker", "Scheduler"):  # they look again and again; that the queue is away is told by `waiting`
            logging.getLogger(f"huey.consumer.{thread}").addFilter(self._is_news)
        return _Consumer(
            self._huey,
            workers=1,
            periodic=False,
            initial_delay=_POLL_FIRST,
            max_delay=_POLL_MOST,
            scheduler_interval=60,
        )

    def _is_news(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], self._errors)

    def close(self) -> None:
        self._huey.storage.close()


class _Consumer(Consumer):  # type: ignore[misc]
    """The process has a server or a main program of its own that handles signals."""

    def _set_signal_handlers(self) -> None:
        pass


class _JsonSerializer(Serializer):  # type: ignore[misc]
    """huey's own is pickle, by which whoever may write to the Redis could run code here."""

    def _serialize(self, message: Message) -> bytes:
        eta = message.eta and message.eta.isoformat()
        return json.dumps([message.id, message.name, eta, message.priority, message.args]).encode()

    def _deserialize(self, data: bytes) -> Message:
        id, name, eta, priority, arguments = json.loads(bytes(data))
        eta = eta and datetime.fromisoformat(eta)
        return Message(
            id=id, name=name, eta=eta, retries=0, retry_delay=0, priority=priority, args=arguments, kwargs={}
        )


def open_queue(url: str | None, folder: Path, name: str, run: Callable[[str], None] | None) -> Queue:
    """By URL in Redis, under `name`; else in a file in the folder. Raises `UnusableQueue`."""
    options: dict[str, Any] = {"results": False, "serializer": _JsonSerializer()}
    if url is None:
        try:
            huey = SqliteHuey(name, filename=str(folder / "queue.sqlite3"), fsync=True, timeout=10, **options)
        except sqlite3.Error as error:
            raise UnusableQueue(f"{folder / 'queue.sqlite3'}: {error}") from error
        return Queue(huey, (sqlite3.Error,), run)
    try:
        import redis
    except ImportError as error:
        raise UnusableQueue("needs redis: install it with `uv sync --extra redis`, or `pip install redis`") from error
    pool = redis.ConnectionPool.from_url(url, socket_timeout=_REDIS_TIMEOUT, socket_connect_timeout=_REDIS_TIMEOUT)
    huey = PriorityRedisHuey(name, connection_pool=pool, **options)
    return Queue(huey, (redis.RedisError, OSError), run)
