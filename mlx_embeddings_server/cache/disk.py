"""Values in a folder, by diskcache (SQLite, and a file for each large one)."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from diskcache import Cache, Disk, Timeout
from diskcache.core import MODE_BINARY, MODE_RAW

from mlx_embeddings_server.cache.shared import UnusableStore

Result = TypeVar("Result")

_FOLDER = "mlx-embeddings-cache"  # below the user's: what else is there is not ours to clear
_TIMEOUT = 0.3  # seconds for another process that holds the database
_FILE_BYTES = 32_768  # from which on a value has a file of its own
# Values of one transaction, until whose end each of them removes ten others while the folder is too large.
_AT_ONCE = 20


class BytesDisk(Disk):  # type: ignore[misc]  # diskcache has no types
    """Bytes alone, and none outside its folder: diskcache itself would unpickle, which runs what a file says."""

    def put(self, key: object) -> tuple[memoryview, bool]:
        if type(key) is not bytes:
            raise TypeError("keys are bytes")
        return sqlite3.Binary(key), True

    def get(self, key: object, raw: bool) -> bytes:
        if not raw or not isinstance(key, bytes):
            raise TypeError("keys are bytes")
        return key

    def store(self, value: object, read: bool, key: object = None) -> Any:
        if type(value) is not bytes:
            raise TypeError("values are bytes")
        return super().store(value, False, key)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        """Of what is not bytes nothing, which is no value."""
        if mode == MODE_RAW and isinstance(value, bytes):
            return value
        if mode == MODE_BINARY and filename and self._is_inside(filename):
            return bytes(super().fetch(mode, filename, None, False))
        return b""

    def remove(self, file_path: str) -> None:
        if self._is_inside(file_path):
            super().remove(file_path)

    def _is_inside(self, filename: str) -> bool:
        folder = Path(self._directory).resolve()
        return (folder / filename).resolve().is_relative_to(folder)


class DiskStore:
    """`max_bytes`: the oldest go first; None is no bound. Reads wait for no write: each has a thread of its own."""

    name = "disk"
    failures: tuple[type[Exception], ...] = (sqlite3.Error, OSError, Timeout)

    def __init__(self, folder: Path, *, ttl: float | None, max_bytes: int | None) -> None:
        self._ttl = ttl
        own = folder.expanduser().absolute() / _FOLDER
        try:
            own.mkdir(mode=0o700, parents=True, exist_ok=True)  # vectors tell something of the texts
            self._cache = Cache(
                os.fspath(own),
                timeout=_TIMEOUT,
                disk=BytesDisk,
                disk_min_file_size=_FILE_BYTES,
                eviction_policy="least-recently-stored",  # reading writes nothing
                size_limit=(1 << 62) if max_bytes is None else max_bytes,
            )
            self._cache.close()  # this thread's connection
        except (OSError, sqlite3.Error, Timeout) as error:
            raise UnusableStore(f"the folder cannot be used: {error}") from error
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="cache-read")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="cache-write")

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        return await _in(self._reading, lambda: [self._cache.get(key) for key in keys])

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        def write() -> None:
            # One transaction takes a quarter of the time; but files are outside of it, and would stay if it failed.
            small = [(key, data) for key, data in values.items() if len(data) < _FILE_BYTES]
            for start in range(0, len(small), _AT_ONCE):
                with self._cache.transact():
                    for key, data in small[start : start + _AT_ONCE]:
                        self._cache.set(key, data, expire=self._ttl)
            for key, data in values.items():
                if len(data) >= _FILE_BYTES:
                    self._cache.set(key, data, expire=self._ttl)

        await _in(self._writing, write)

    async def clear(self, held: Set[bytes]) -> int:
        def clear() -> int:
            twice = sum(key in self._cache for key in held)
            return int(self._cache.clear()) - twice

        return await _in(self._writing, clear)

    async def aclose(self) -> None:
        for threads in (self._reading, self._writing):
            threads.submit(self._cache.close)
            threads.shutdown(wait=False)


async def _in(threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
