"""Values in Redis, under keys that begin with `mlx-embeddings:`."""

import asyncio
from collections.abc import Mapping, Sequence, Set
from typing import cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from mlx_embeddings_server.cache.shared import SCHEMES, UnusableStore

_PREFIX = b"mlx-embeddings:cache:"
_TIMEOUT = 0.3  # seconds without an answer
_CONNECTIONS = 32
_BYTES_AT_ONCE = 4_000_000  # of one round trip that writes
_KEYS_AT_ONCE = 1000  # of one that clears


class RedisStore:
    """One round trip to read, one for each few megabytes to write; keys that other programs have are left alone."""

    name = "redis"
    failures = (RedisError, OSError, ValueError, TypeError)  # what is no Redis may answer anything

    def __init__(self, url: str, *, ttl: float | None) -> None:
        self._milliseconds = None if ttl is None else max(1, round(ttl * 1000))
        try:
            self._pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=_TIMEOUT,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
            # Of an option that it does not know it is only told here.
            self._pool.make_connection()
            if self._pool.connection_kwargs.get("decode_responses"):
                raise ValueError
        except (TypeError, ValueError):  # its words may have a part of the password
            message = f"must be {SCHEMES}; in a password / is written %2F, ? %3F, # %23 and @ %40"
            raise UnusableStore(message) from None
        self._redis = Redis(connection_pool=self._pool)

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        found = await self._redis.mget([_PREFIX + key for key in keys])
        if not isinstance(found, list) or len(found) != len(keys):
            raise RedisError("another answer than values")
        return [each if isinstance(each, bytes) else None for each in found]

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        batch: dict[bytes, bytes] = {}
        size = 0
        for key, data in values.items():
            batch[_PREFIX + key] = data
            size += len(data)
            if size > _BYTES_AT_ONCE:
                await self._put_batch(batch)
                batch, size = {}, 0
                await asyncio.sleep(0)
        if batch:
            await self._put_batch(batch)

    async def _put_batch(self, batch: Mapping[bytes, bytes]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key, data in batch.items():
                pipeline.set(key, data, px=self._milliseconds)
            await pipeline.execute()

    async def clear(self, held: Set[bytes]) -> int:
        removed, cursor = 0, 0
        while True:
            cursor, named = await self._redis.scan(cursor, match=_PREFIX + b"*", count=_KEYS_AT_ONCE)
            keys = cast("list[bytes]", named)
            async with self._redis.pipeline(transaction=False) as pipeline:
                ours = [key for key in keys if key.removeprefix(_PREFIX) in held]
                others = [key for key in keys if key.removeprefix(_PREFIX) not in held]
                for several in (ours, others):
                    if several:
                        pipeline.unlink(*several)
                counts = await pipeline.execute()
            removed += counts[-1] if others else 0
            if not cursor:
                return removed

    async def aclose(self) -> None:
        await self._redis.aclose()
        await self._pool.disconnect()
