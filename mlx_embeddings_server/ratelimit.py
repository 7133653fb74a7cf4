"""What a caller may have in a minute: requests, counted before they are worked on, and tokens, counted after.

Windows are fixed: a caller's minute begins with his first request. Counters are this process's, or Redis has them for
several servers together; while Redis does not answer, each server counts by itself.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from cachetools import TTLCache
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage, Storage
from limits.errors import StorageError

from mlx_embeddings_server.errors import RateLimitExceeded

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

DEFAULT_REQUESTS: Final = 600
DEFAULT_TOKENS: Final = 1_000_000

_WINDOW: Final = 60  # seconds
_MOST_COUNTERS: Final = 65_536  # beyond it those that began first are forgotten
_REDIS_TIMEOUT: Final = 0.5  # seconds
_REDIS_PAUSE: Final = 5.0  # seconds that it is not asked in after it has failed
_REDIS_CONNECTIONS: Final = 32
# What is no Redis may answer anything.
_FAILURES: Final = (StorageError, OSError, TimeoutError, ValueError, TypeError)


@dataclass(slots=True)
class _Window:
    expires: float  # seconds since 1970
    count: int = 0


class WindowStorage(Storage):
    """Counters of this process. That of `limits` looks through all callers at each request: 1.8 ms for 10,000."""

    STORAGE_SCHEME = None
    base_exceptions = ()

    def __init__(self, *, most: int = _MOST_COUNTERS, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._clock = clock
        self._windows: TTLCache[str, _Window] = TTLCache(most, _WINDOW, timer=clock)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(self._clock() + expiry)
        window.count += amount
        return window.count

    async def get(self, key: str) -> int:
        window = self._windows.get(key)
        return 0 if window is None else window.count

    async def get_expiry(self, key: str) -> float:
        window = self._windows.get(key)
        return self._clock() if window is None else window.expires

    async def check(self) -> bool:
        return True

    async def reset(self) -> int:
        count = len(self._windows)
        self._windows.clear()
        return count

    async def clear(self, key: str) -> None:
        self._windows.pop(key, None)


class Counters:
    """Those of `shared` while it answers; where there is none, or it does not, our own."""

    def __init__(self, shared: "RedisCounters | None" = None) -> None:
        self._shared = shared
        self._own = WindowStorage()
        self._away_until: float | None = None

    async def add(self, item: RateLimitItem, caller: str, amount: int = 1) -> int:
        """The count with these."""
        key = item.key_for(caller)
        return await self._ask(lambda storage: storage.incr(key, item.get_expiry(), amount))

    async def count(self, item: RateLimitItem, caller: str) -> int:
        key = item.key_for(caller)
        return await self._ask(lambda storage: storage.get(key))

    async def seconds_left(self, item: RateLimitItem, caller: str) -> int:
        """Whole ones, after which the window is over: Redis rounds to the nearest."""
        key = item.key_for(caller)
        expires = await self._ask(lambda storage: storage.get_expiry(key))
        return min(max(1, math.ceil(expires - time.time() + 0.5)), item.get_expiry())

    async def aclose(self) -> None:
        if self._shared is not None:
            await self._shared.aclose()

    async def _ask(self, question: Callable[[Storage], Awaitable[Answer]]) -> Answer:
        if self._shared is None or (self._away_until is not None and time.monotonic() < self._away_until):
            return await question(self._own)
        try:
            async with asyncio.timeout(_REDIS_TIMEOUT):
                answer = await question(self._shared.storage)
            if not isinstance(answer, int | float):
                raise TypeError("another answer than a number")
        except _FAILURES as error:
            self._note_away(error)
            return await question(self._own)
        if self._away_until is not None:
            self._away_until = None
            log.info("%s answers again: rate limits are counted there", self._shared.name)
        return answer

    def _note_away(self, error: Exception) -> None:
        assert self._shared is not None
        if self._away_until is None:
            cause = error.storage_error if isinstance(error, StorageError) else error
            why = str(cause) or type(cause).__name__
            log.warning("%s does not answer (%s): rate limits are counted here till it does", self._shared.name, why)
        self._away_until = time.monotonic() + _REDIS_PAUSE


class RedisCounters:
    """`name` is for the log: the URL without its password."""

    def __init__(self, url: str) -> None:
        """Connects when it is asked. Raises `ImportError` without the extra, and `ValueError` for what is no URL."""
        from redis.asyncio import BlockingConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import ConnectionError

        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] or parts.path}"
        self._pool = BlockingConnectionPool.from_url(
            url.replace("redis+unix:", "unix:", 1),
            max_connections=_REDIS_CONNECTIONS,
            timeout=_REDIS_TIMEOUT,
            socket_timeout=_REDIS_TIMEOUT,
            socket_connect_timeout=_REDIS_TIMEOUT,
            # For a connection that Redis has closed meanwhile. What took too long may have been counted.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
        )
        try:
            self._pool.make_connection()  # of an option that it does not know it is only told here
        except TypeError:
            raise ValueError("an option is not known") from None
        options: dict[str, Any] = {"connection_pool": self._pool}
        self.storage: Storage = RedisStorage(
            f"async+{url}", wrap_exceptions=True, implementation="redispy", key_prefix="mlx-embeddings", **options
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class RateLimits:
    """Of each caller. 0 is no limit."""

    def __init__(self, counters: Counters, *, requests: int, tokens: int) -> None:
        self._counters = counters
        self.refused = {"requests": 0, "tokens": 0}  # requests since the start, by the limit that they met
        self._requests = RateLimitItemPerMinute(requests, namespace="requests") if requests else None
        self._tokens = RateLimitItemPerMinute(tokens, namespace="tokens") if tokens else None

    async def admit(self, caller: str) -> dict[str, str]:
        """Counts a request; headers that tell what is left. Raises `RateLimitExceeded`."""
        headers: dict[str, str] = {}
        if self._tokens is not None:
            used = await self._counters.count(self._tokens, caller)
            headers |= _headers("Tokens", self._tokens, used)
            if used >= self._tokens.amount:
                raise await self._exceeded("tokens", self._tokens, caller, headers)
        if self._requests is not None:
            used = await self._counters.add(self._requests, caller)
            headers |= _headers("Requests", self._requests, used)
            if used > self._requests.amount:
                raise await self._exceeded("requests", self._requests, caller, headers)
        return headers

    async def charge(self, caller: str, tokens: int) -> dict[str, str]:
        """Headers that tell what is left. More than that may have been taken: it is noticed at the next request."""
        if self._tokens is None or not tokens:
            return {}
        return _headers("Tokens", self._tokens, await self._counters.add(self._tokens, caller, tokens))

    async def aclose(self) -> None:
        await self._counters.aclose()

    async def _exceeded(
        self, what: str, item: RateLimitItem, caller: str, headers: dict[str, str]
    ) -> RateLimitExceeded:
        self.refused[what] += 1
        seconds = await self._counters.seconds_left(item, caller)
        message = f"each caller may have {item.amount} {what} a minute: try again in {seconds} s"
        return RateLimitExceeded(message, headers={"Retry-After": str(seconds)} | headers)


def _headers(what: str, item: RateLimitItem, used: int) -> dict[str, str]:
    """Named as OpenAI's."""
    left = max(0, item.amount - used)
    return {f"X-RateLimit-Limit-{what}": str(item.amount), f"X-RateLimit-Remaining-{what}": str(left)}
