"""The first layer: values in this process."""

import math
import sys
import time
from collections.abc import Callable, Set

from cachetools import TTLCache

from mlx_embeddings_server.cache.values import Value


class MemoryLayer:
    """Bounded in entries, bytes and age; what was not asked for the longest goes first. For one thread.

    `ttl` is in seconds; None for `ttl` or `max_bytes` is no bound.
    """

    def __init__(
        self, *, entries: int, max_bytes: int | None, ttl: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_entries = entries
        self.max_bytes = max_bytes
        self.ttl = ttl
        self._values: TTLCache[bytes, Value] = TTLCache(
            sys.maxsize if max_bytes is None else max_bytes,
            math.inf if ttl is None else ttl,
            clock,
            lambda value: value.nbytes,
        )

    def get(self, key: bytes) -> Value | None:
        try:
            return self._values[key]
        except KeyError:
            return None

    def put(self, key: bytes, value: Value) -> None:
        """What alone is larger than the bound is not kept."""
        if value.nbytes > self._values.maxsize:
            return
        while len(self._values) >= self.max_entries and key not in self._values:
            self._values.popitem()
        self._values[key] = value

    def has_room_for(self, entries: int, nbytes: int) -> bool:
        """Whether so much could be kept at the same time, with nothing else."""
        return entries <= self.max_entries and nbytes <= self._values.maxsize

    def expire(self) -> None:
        """Drop what is too old: else it goes when something new comes."""
        self._values.expire()

    def keys(self) -> Set[bytes]:
        return set(self._values)

    def clear(self) -> None:
        self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        return int(self._values.currsize)
