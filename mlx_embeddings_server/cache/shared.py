"""The second layer: bytes that several servers share, or that outlive one. Without it all goes on, only slower."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from mlx_embeddings_server.cache.values import NotWritable, Value, decode, encode

log = logging.getLogger(__name__)

SCHEMES = "redis://HOST:PORT/DB, rediss://HOST:PORT/DB, unix:///PATH of a socket, or file:///PATH of a folder"

_PATIENCE = 0.4  # seconds for an answer: what is computed takes less, or not much more
_CLEAR_PATIENCE = 60.0
_PAUSE = 2.0  # seconds after a failure in which it is not asked
_LOG_PAUSE = 60.0
# Values that wait to be written, all requests together. Beyond it they are not.
_MOST_PENDING_BYTES = 64_000_000
_INLINE_BYTES = 100_000  # that are written or read without a thread


class UnusableStore(Exception):
    """The second layer cannot be had as it was asked for. The message says what to type."""


class Store(Protocol):
    """Bytes by keys of 32 bytes. All methods raise one of `failures` when it cannot be reached."""

    @property
    def name(self) -> str: ...

    @property
    def failures(self) -> tuple[type[Exception], ...]: ...

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]: ...

    async def put(self, values: Mapping[bytes, bytes]) -> None: ...

    async def clear(self, held: Set[bytes]) -> int:
        """Remove everything that is this program's. How many it were, those of `held` aside."""

    async def aclose(self) -> None: ...


def open_store(url: str, *, ttl: float | None, disk_bytes: int | None) -> Store:
    """The layer at `url`; nothing is sent yet. Raises `UnusableStore`."""
    scheme = url.partition(":")[0].lower()
    try:
        if scheme in ("redis", "rediss", "unix"):
            from mlx_embeddings_server.cache.redis import RedisStore

            return RedisStore(url, ttl=ttl)
        if scheme == "file":
            from mlx_embeddings_server.cache.disk import DiskStore

            return DiskStore(_path(url), ttl=ttl, max_bytes=disk_bytes)
    except ImportError as error:
        extra = "disk-cache" if scheme == "file" else "redis"
        needed = f"it needs a package that is not installed: pip install 'mlx-embeddings-server[{extra}]'"
        raise UnusableStore(needed) from error
    raise UnusableStore(f"must begin with {SCHEMES}")


def _path(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.strip("/"):
        raise UnusableStore("must be file:///PATH of a folder")
    return Path(path)


class Watch:
    """Whether something that fails is to be asked again yet, and what the log is told of it."""

    def __init__(self, name: str) -> None:
        self.failures = 0
        self._name = name
        self._is_failing = False
        self._next_try = 0.0
        self._next_log: dict[str, float] = {}

    def may_try(self) -> bool:
        """While it fails one caller may, once in a while: the others would wait for nothing."""
        if not self._is_failing:
            return True
        now = time.monotonic()
        if now < self._next_try:
            return False
        self._next_try = now + _PAUSE
        return True

    def failed(self, error: Exception) -> None:
        self.failures += 1
        self._is_failing, self._next_try = True, time.monotonic() + _PAUSE
        self.warn(f"is left out until it works again: {type(error).__name__} {str(error)[:200]}")

    def worked(self) -> None:
        self._is_failing = False

    def warn(self, what: str) -> None:
        """Each kind of warning once a minute."""
        now, kind = time.monotonic(), what.partition(":")[0]
        if now >= self._next_log.get(kind, 0.0):
            self._next_log[kind] = now + _LOG_PAUSE
            log.warning("the cache's layer in %s %s", self._name, what)


class SharedLayer:
    """A store that may fail, be slow, or hold what somebody else wrote: nobody waits long for it, or is misled."""

    def __init__(self, store: Store) -> None:
        self.name = store.name
        self._store = store
        self.errors: tuple[type[Exception], ...] = (TimeoutError, *store.failures)
        self._reading, self._writing = Watch(store.name), Watch(store.name)
        self._pending: set[asyncio.Task[None]] = set()
        self._pending_bytes = 0

    @property
    def failures(self) -> int:
        return self._reading.failures + self._writing.failures

    async def get(self, keys: Sequence[bytes]) -> dict[bytes, Value]:
        """Those that it has."""
        if not self._reading.may_try():
            return {}
        try:
            async with asyncio.timeout(_PATIENCE):
                found = await self._store.get(keys)
        except self.errors as error:
            self._reading.failed(error)
            return {}
        self._reading.worked()
        written = {key: data for key, data in zip(keys, found, strict=True) if data is not None}
        if sum(map(len, written.values())) > _INLINE_BYTES:
            values = await asyncio.to_thread(_decode_all, written)
        else:
            values = _decode_all(written)
        if len(values) < len(written):
            self._reading.warn("holds what this server did not write, or what was damaged: it is passed over")
        return values

    def put(self, values: Mapping[bytes, Value]) -> None:
        """Soon, and without anybody waiting for it."""
        size = sum(value.nbytes for value in values.values())
        if self._pending_bytes + size > _MOST_PENDING_BYTES or not self._writing.may_try():
            return
        self._pending_bytes += size
        task = asyncio.create_task(self._write(values, size))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _write(self, values: Mapping[bytes, Value], size: int) -> None:
        try:
            if size > _INLINE_BYTES:
                written = await asyncio.to_thread(_encode_all, values)
            else:
                written = _encode_all(values)
            if len(written) < len(values):
                self._writing.warn("is not given what has numbers of a type that it does not know")
            async with asyncio.timeout(10 * _PATIENCE):  # nobody waits for it
                await self._store.put(written)
            self._writing.worked()
        except self.errors as error:
            self._writing.failed(error)
        finally:
            self._pending_bytes -= size

    async def clear(self, held: Set[bytes]) -> int:
        """As the store does, also what is about to be written. Raises one of `errors`."""
        async with asyncio.timeout(_CLEAR_PATIENCE):
            if self._pending:
                await asyncio.wait(set(self._pending))
            return await self._store.clear(held)

    async def aclose(self) -> None:
        """Write what is to be written, and end."""
        if self._pending:
            await asyncio.wait(self._pending, timeout=_PATIENCE)
        for task in self._pending:
            task.cancel()
        await self._store.aclose()


def _encode_all(values: Mapping[bytes, Value]) -> dict[bytes, bytes]:
    """Those that can be written."""
    written: dict[bytes, bytes] = {}
    for key, value in values.items():
        with suppress(NotWritable):
            written[key] = encode(key, value)
    return written


def _decode_all(written: Mapping[bytes, bytes]) -> dict[bytes, Value]:
    found = ((key, decode(key, data)) for key, data in written.items())
    return {key: value for key, value in found if value is not None}
