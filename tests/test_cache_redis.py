"""The cache's second layer in Redis: shared by servers, and missed by none of them when it goes."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from mlx_embeddings_server.cache.memory import MemoryLayer
from mlx_embeddings_server.cache.redis import RedisStore
from mlx_embeddings_server.cache.result_cache import ResultCache
from mlx_embeddings_server.cache.shared import SharedLayer
from mlx_embeddings_server.cache.values import Value
from mlx_embeddings_server.errors import Unavailable
from mlx_embeddings_server.providers.base import Account
from tests.cached import assert_right, cache, computed, embed, metric, until
from tests.redis_server import PASSWORD, RedisServer, needs_redis
from tests.scripted import scripted_server, vector

pytestmark = needs_redis


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def raw(redis: RedisServer) -> Redis:
    """A client that takes keys and values for the bytes that they are."""
    return Redis.from_url(redis.url)


def folders(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    return first, second


def keys(redis: RedisServer) -> list[bytes]:
    with raw(redis) as client:
        return sorted(client.keys())


def test_what_one_server_computed_another_one_answers(redis: RedisServer, tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    with (
        scripted_server(first, cache="yes", cache_url=redis.url) as one,
        scripted_server(second, cache="yes", cache_url=redis.url, cache_ttl="20s") as two,
    ):
        reply = embed(one, "a", "b", encoding_format="base64")
        until(lambda: len(keys(redis)) == 2)
        assert embed(two, "a", "b", encoding_format="base64").json() == reply.json()
        texts = ["b", "new", "a"]
        assert_right(embed(two, *texts), *texts)
        assert computed(two) == 1
        assert cache(two)["layers"]["redis"] == {"hits": 2, "misses": 1, "failures": 0}
        assert metric(two, 'cache_hits_total{layer="redis"}') == 2
        until(lambda: len(keys(redis)) == 3)
        with raw(redis) as client:
            assert sorted(round(client.ttl(key), -1) for key in client.keys("*")) == [20, 3600, 3600]


def test_servers_whose_models_differ_share_nothing(redis: RedisServer, tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    with scripted_server(first, cache="yes", cache_url=redis.url) as one:
        embed(one, "a")
        until(lambda: len(keys(redis)) == 1)
    (first / "toy" / "config.json").write_text('{"model_type": "bert", "layers": 2}')
    with scripted_server(second, cache="yes", cache_url=redis.url, model=first / "toy") as two:
        assert_right(embed(two, "a"), "a")
        assert computed(two) == 1


def test_damaged_and_exchanged_values_are_computed_again(redis: RedisServer, tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    texts = [f"text {number}" for number in range(5)]
    with scripted_server(first, cache="yes", cache_url=redis.url) as one:
        embed(one, *texts)
        until(lambda: len(keys(redis)) == 5)
    with raw(redis) as client:
        a, b, c, d, e = keys(redis)
        values = {key: client.get(key) or b"" for key in (a, b, c)}
        client.mset({a: values[b], b: values[a], c: values[c][:-1], d: b"foreign"})
        client.delete(e)
        client.rpush(e, "no string")
    with scripted_server(second, cache="yes", cache_url=redis.url) as two:
        assert_right(embed(two, *texts), *texts)
        assert computed(two) == 5
        assert embed(two, "another").status_code == 200
        assert two.log.count("was damaged") == 1


def test_requests_go_on_without_a_redis_that_dies_and_use_it_when_it_is_back(
    redis: RedisServer, tmp_path: Path
) -> None:
    with scripted_server(tmp_path, cache="yes", cache_url=redis.url) as server:
        embed(server, "before")
        until(lambda: len(keys(redis)) == 1)
        redis.kill()
        for number in range(20):
            assert_right(embed(server, f"during {number}", "before"), f"during {number}", "before")
        assert server.log.count("cache's layer in redis") <= 2  # reading, writing
        assert server.client.get("/health").status_code == 200
        assert cache(server)["layers"]["redis"]["failures"] > 0
        redis.start()
        time.sleep(2.1)
        embed(server, "after")
        until(lambda: len(keys(redis)) == 1)


def test_a_redis_that_hangs_delays_one_request_for_less_than_half_a_second(redis: RedisServer, tmp_path: Path) -> None:
    with scripted_server(tmp_path, cache="yes", cache_url=redis.url) as server:
        embed(server, "before")
        redis.hang()
        started = time.monotonic()
        assert_right(embed(server, "first"), "first")
        assert time.monotonic() - started < 1  # 0.4, and what the machine is busy with
        started = time.monotonic()
        for number in range(10):
            assert_right(embed(server, f"later {number}"), f"later {number}")
        assert time.monotonic() - started < 1
        redis.go_on()


def test_a_server_starts_without_its_redis_and_tells_no_password(redis: RedisServer, tmp_path: Path) -> None:
    redis.kill()
    with scripted_server(tmp_path, cache="yes", cache_url=redis.url) as server:
        assert_right(embed(server, "a"), "a")
        until(lambda: "is left out" in server.log)
        assert PASSWORD not in server.log + server.client.get("/health").text
    redis.start()


def value(text: str) -> Value:
    return Value.of(vector(text), Account(1, False, None))


def test_clearing_takes_what_is_ours_of_all_layers_and_counts_it_once(redis: RedisServer) -> None:
    one, two, three = (bytes([number]) * 32 for number in range(3))

    async def work() -> int:
        memory = MemoryLayer(entries=10, max_bytes=None, ttl=None)
        layer = SharedLayer(RedisStore(redis.url, ttl=None))
        cache = ResultCache(memory, layer)
        try:
            memory.put(one, value("one"))
            memory.put(two, value("two"))
            layer.put({two: value("two"), three: value("three")})
            while len(await layer.get([two, three])) < 2:
                await asyncio.sleep(0.01)
            removed = await cache.clear()
            assert cache.stats()["size"] == 0 and not await layer.get([two, three])
            return removed
        finally:
            await cache.aclose()

    with raw(redis) as client:
        client.set("somebody else's", 1)
    assert asyncio.run(work()) == 3
    assert keys(redis) == [b"somebody else's"]


def test_a_layer_that_cannot_be_cleared_is_an_error(redis: RedisServer) -> None:
    redis.kill()

    async def work() -> None:
        cache = ResultCache(
            MemoryLayer(entries=1, max_bytes=None, ttl=None), SharedLayer(RedisStore(redis.url, ttl=None))
        )
        try:
            await cache.clear()
        finally:
            await cache.aclose()

    with pytest.raises(Unavailable, match="redis cannot be cleared"):
        asyncio.run(work())
