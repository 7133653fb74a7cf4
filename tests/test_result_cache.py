"""What the cache does with computations that go wrong, or whose model changes under them."""

import asyncio
import time
import tracemalloc
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise

import numpy as np
import pytest

from mlx_embeddings_backends.base import Item, Row
from mlx_embeddings_backends.errors import InputError
from mlx_embeddings_server.cache.memory import MemoryLayer
from mlx_embeddings_server.cache.result_cache import ResultCache
from mlx_embeddings_server.cache.shared import SharedLayer, Watch
from mlx_embeddings_server.cache.values import OVERHEAD_BYTES, Value, encode
from mlx_embeddings_server.engine.queue import QueueFull
from mlx_embeddings_server.engine.worker import InferenceFailed, NonFiniteVector, WorkerLost
from mlx_embeddings_server.providers.base import (
    Account,
    CircuitOpen,
    InputRefused,
    ProviderBusy,
    ProviderFailed,
    Timings,
    Vectors,
)
from tests.engines import run
from tests.scripted import vector


class Model:
    """It fails with `failure` while there is one, and waits until `gate` is open."""

    def __init__(self) -> None:
        self.identity: bytes | None = b"first"
        self.gate = asyncio.Event()
        self.failure: Exception | None = None
        self.calls = self.at_once = self.most_at_once = 0

    async def compute(self, items: Sequence[Item]) -> Vectors:
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
            await asyncio.sleep(0.01)
            if self.failure is not None:
                raise self.failure
            rows = [vector(str(item.content)) for item in items]
            return Vectors(list(rows), [Account(1, False, None)] * len(rows), Timings(0.0, 0.0, 0.0))
        finally:
            self.at_once -= 1


async def embed(cache: ResultCache, model: Model, text: str = "text") -> None:
    vectors = await cache.embed(model, [Item(text)], "none", model.compute)
    assert isinstance(vectors.rows[0], np.ndarray)
    assert vectors.rows[0].tobytes() == vector(text).tobytes()


def new_cache() -> ResultCache:
    return ResultCache(MemoryLayer(entries=10, max_bytes=None, ttl=None))


@pytest.mark.parametrize(
    "failure",
    [InputError(0, "wrong"), InferenceFailed("fails"), NonFiniteVector(), InputRefused("no"), QueueFull(9, 9, 1)],
)
def test_after_a_failure_those_who_waited_compute_side_by_side_and_not_one_after_the_other(failure: Exception) -> None:
    async def work() -> None:
        cache, model = new_cache(), Model()
        model.failure = failure
        tasks = [asyncio.create_task(embed(cache, model)) for _ in range(6)]
        await asyncio.sleep(0.01)
        assert model.calls == 1
        model.gate.set()
        failures = await asyncio.gather(*tasks, return_exceptions=True)
        assert failures == [failure] * 6
        assert (model.calls, model.most_at_once) == (6, 5)
        model.failure = None
        await embed(cache, model)

    run(work())


async def outcomes(cache: ResultCache, model: Model, *requests: Sequence[str]) -> list[object]:
    """Of requests of which the others come while the first one computes."""
    model.gate.clear()
    tasks = []
    for texts in requests:
        items = [Item(text) for text in texts]
        tasks.append(asyncio.create_task(cache.embed(model, items, "none", model.compute)))
        await asyncio.sleep(0.01)
    model.gate.set()
    return [*await asyncio.gather(*tasks, return_exceptions=True)]


@pytest.mark.parametrize(
    "failure",
    [ProviderFailed("slow", is_temporary=True, retry_after=3.0), CircuitOpen("open"), ProviderBusy("busy")],
    ids=lambda failure: type(failure).__name__,
)
def test_when_the_provider_fails_those_who_waited_fail_with_it_at_once(failure: Exception) -> None:
    async def work() -> None:
        cache, model = new_cache(), Model()
        model.failure = failure
        failures = await outcomes(cache, model, ["a", "b"], ["b"], ["a"])
        assert model.calls == 1
        for each in failures:
            assert isinstance(each, Exception) and type(each) is type(failure)
            assert (str(each), vars(each)) == (str(failure), vars(failure))
        assert len(set(map(id, failures))) == 3  # a traceback is of one request
        model.failure = None
        await embed(cache, model, "a")

    run(work())


def test_who_waited_for_an_input_under_which_the_worker_died_fails_and_for_one_beside_it_computes() -> None:
    async def work() -> None:
        cache, model = new_cache(), Model()
        model.failure = WorkerLost("it died")
        assert [str(each) for each in await outcomes(cache, model, ["killer"], ["killer"])] == ["it died"] * 2
        assert model.calls == 1
        await outcomes(cache, model, ["killer", "innocent"], ["innocent"])
        assert model.calls == 3

    run(work())


def test_when_the_first_leaves_one_of_those_who_waited_computes() -> None:
    async def work() -> None:
        cache, model = new_cache(), Model()
        tasks = [asyncio.create_task(embed(cache, model)) for _ in range(6)]
        await asyncio.sleep(0.01)
        for task in tasks[:2]:  # who computes, and one of those who wait
            task.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(*tasks[2:])
        assert (model.calls, model.most_at_once) == (2, 1)

    run(work())


def test_what_a_model_gives_that_was_loaded_anew_meanwhile_is_not_kept() -> None:
    async def work() -> None:
        cache, model = new_cache(), Model()
        task = asyncio.create_task(embed(cache, model))
        await asyncio.sleep(0.01)
        model.identity = b"second"
        model.gate.set()
        await task
        assert cache.stats()["size"] == 0
        await embed(cache, model)
        assert (model.calls, cache.stats()["size"]) == (2, 1)

    run(work())


def test_a_model_without_an_identity_is_computed_every_time() -> None:
    async def work() -> None:
        cache, model = new_cache(), Model()
        model.identity = None
        model.gate.set()
        await embed(cache, model)
        await embed(cache, model)
        assert (model.calls, cache.stats()["size"]) == (2, 0)

    run(work())


@pytest.mark.parametrize("count", [1, 1000])
def test_clearing_leaves_nothing_and_says_how_much_it_was(count: int) -> None:
    async def work() -> None:
        cache, model = ResultCache(MemoryLayer(entries=2000, max_bytes=None, ttl=None)), Model()
        model.gate.set()
        await cache.embed(model, [Item(str(number)) for number in range(count)], "none", model.compute)
        assert await cache.clear() == count
        assert (cache.stats()["size"], cache.stats()["bytes"]) == (0, 0)

    run(work())


def test_a_layer_that_fails_is_told_once_and_asked_by_one_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch("redis")
    for _ in range(10):
        watch.failed(OSError("refused"))
    assert [record.message for record in caplog.records] == [
        "the cache's layer in redis is left out until it works again: OSError refused"
    ]
    assert not watch.may_try()
    watch.worked()
    assert watch.may_try()


class Stuck:
    """A store that answers nothing, as a file system of a network may."""

    name = "disk"
    failures = (OSError,)

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        await asyncio.sleep(60)
        return [None for _ in keys]

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        await asyncio.sleep(60)

    async def clear(self, held: Set[bytes]) -> int:
        return 0

    async def aclose(self) -> None:
        pass


def test_a_store_that_answers_nothing_is_waited_for_once_and_not_for_long() -> None:
    async def work() -> float:
        layer = SharedLayer(Stuck())
        cache, model = ResultCache(MemoryLayer(entries=100, max_bytes=None, ttl=None), layer), Model()
        model.gate.set()
        started = time.monotonic()
        for number in range(10):
            await embed(cache, model, str(number))
        await cache.aclose()
        return time.monotonic() - started

    assert run(work()) < 1.5  # 0.4 for reading, 0.4 for writing at the end


def value(text: str) -> Value:
    return Value.of(vector(text), Account(1, False, None))


class Kept:
    """A store in this process. Reading ends while `reading` is open, writing while `writing` is, clearing so too."""

    name = "redis"
    failures = (OSError,)

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.reading, self.writing, self.clearing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for gate in (self.reading, self.writing, self.clearing):
            gate.set()

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        found = [self.values.get(key) for key in keys]
        await self.reading.wait()
        return found

    async def put(self, values: Mapping[bytes, bytes]) -> None:
        await self.writing.wait()
        self.values |= values

    async def clear(self, held: Set[bytes]) -> int:
        await self.clearing.wait()
        count = len(self.values.keys() - held)
        self.values.clear()
        return count

    async def aclose(self) -> None:
        pass


def cache_with(store: Kept) -> ResultCache:
    return ResultCache(MemoryLayer(entries=10, max_bytes=None, ttl=None), SharedLayer(store))


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_was_begun_before_a_clear_is_answered_and_not_kept_and_nobody_new_waits_for_it() -> None:
    async def work() -> None:
        store = Kept()
        cache, model, other = cache_with(store), Model(), Model()
        first, waiting = (asyncio.create_task(embed(cache, model)) for _ in range(2))
        await turns()
        assert await cache.clear() == 0
        later = asyncio.create_task(embed(cache, other))
        await turns()
        assert (model.calls, other.calls) == (1, 1)
        model.gate.set()
        await asyncio.gather(first, waiting)
        await turns()
        assert (model.calls, cache.stats()["size"], cache.stats()["joined"]) == (1, 0, 1)
        assert not store.values
        other.gate.set()
        await later
        await turns()
        assert (cache.stats()["size"], len(store.values)) == (1, 1)

    run(work())


@pytest.mark.parametrize("when", ["reading", "clearing"])
def test_what_was_read_from_the_second_layer_before_it_was_cleared_is_not_kept(when: str) -> None:
    async def work() -> None:
        store = Kept()
        cache, model = cache_with(store), Model()
        model.gate.set()
        await embed(cache, model)
        await turns()
        assert len(store.values) == 1
        cache = cache_with(store)
        gate: asyncio.Event = getattr(store, when)
        gate.clear()
        embedding = embed(cache, model)
        tasks: list[asyncio.Task[object]] = []
        for each in (embedding, cache.clear()) if when == "reading" else (cache.clear(), embedding):
            tasks.append(asyncio.create_task(each))
            await turns()
        gate.set()
        await asyncio.gather(*tasks)
        assert (model.calls, cache.stats()["size"], store.values) == (1, 0, {})

    run(work())


def test_what_is_about_to_be_written_is_cleared_too() -> None:
    async def work() -> None:
        store = Kept()
        cache, model = cache_with(store), Model()
        store.writing.clear()
        model.gate.set()
        await embed(cache, model)
        clearing = asyncio.create_task(cache.clear())
        await turns()
        store.writing.set()
        assert await clearing == 1
        await turns()
        assert store.values == {}

    run(work())


def test_a_value_of_a_type_that_is_not_written_keeps_no_other_from_being_written() -> None:
    async def work() -> None:
        store = Kept()
        layer = SharedLayer(store)
        known, strange = value("known"), Value.of(np.zeros(4, np.uint8), Account(1, False, None))
        layer.put({b"strange": strange, b"known": known})
        await turns()
        assert store.values == {b"known": encode(b"known", known)}

    run(work())


async def embed_rows(cache: ResultCache, rows: Sequence[Row]) -> Vectors:
    async def compute(items: Sequence[Item]) -> Vectors:
        return Vectors(list(rows), [Account(1, False, None)] * len(rows), Timings(0.0, 0.0, 0.0))

    return await cache.embed(Model(), [Item(str(number)) for number in range(len(rows))], "none", compute)


def test_others_have_their_turn_for_each_few_megabytes_that_are_kept() -> None:
    async def work() -> tuple[int, int]:
        cache = ResultCache(MemoryLayer(entries=100, max_bytes=None, ttl=None))
        seen: list[int] = []

        async def watch() -> None:
            while True:
                seen.append(cache.stats()["bytes"])
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await embed_rows(cache, list(np.zeros((40, 250_000), np.float32)))
        watching.cancel()
        return max(later - sooner for sooner, later in pairwise(seen)), cache.stats()["bytes"]

    step, size = run(work())
    assert size > 40_000_000
    assert step < 6_000_000


def test_no_more_is_copied_than_the_memory_may_keep() -> None:
    rows = list(np.ones((50, 250_000), np.float32))
    room = 10 * (1_000_000 + 2 * OVERHEAD_BYTES)

    async def work(cache: ResultCache) -> None:
        tracemalloc.start()
        vectors = await embed_rows(cache, rows)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 10_000_000 < most < 12_000_000
        assert all(np.array_equal(row, rows[0]) for row in vectors.rows if isinstance(row, np.ndarray))
        assert 10_000_000 < cache.stats()["bytes"] <= room

    run(work(ResultCache(MemoryLayer(entries=100, max_bytes=room, ttl=None))))
    run(work(ResultCache(MemoryLayer(entries=10, max_bytes=None, ttl=None))))
