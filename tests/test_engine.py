"""Queue, batcher and worker together, in this process, with backends that tell what is done with them."""

import asyncio
import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Backend, Item, Prepared
from mlx_embeddings_backends.errors import DeviceLost, ModelError, ModelNotFound
from mlx_embeddings_server.engine.engine import Engine, Outcome
from mlx_embeddings_server.engine.queue import QueueFull
from mlx_embeddings_server.engine.worker import BatchStats, InferenceFailed, NonFiniteVector, WorkerLost
from tests.engines import PATIENCE, Observed, embed, expected, hold, loaded, observed, run, until
from tests.scripted import ScriptedBackend

# Order and threads


def test_rows_come_in_the_order_of_the_items_under_many_requests() -> None:
    chance = random.Random(0)
    requests = [
        [f"text {number} {place} " + "word " * chance.randrange(40) for place in range(chance.randint(1, 30))]
        for number in range(200)
    ]

    async def work(engine: Engine) -> list[Outcome]:
        return await asyncio.gather(*(embed(engine, *texts) for texts in requests))

    with loaded(batch_tokens=256) as engine:
        backend = observed(engine)
        for texts, result in zip(requests, run(work(engine)), strict=True):
            assert {np.asarray(row).dtype for row in result.rows} == {np.dtype(np.float32)}
            assert_array_equal(result.rows, expected(*texts))
        assert sorted(sum(backend.batches, [])) == sorted(sum(requests, []))  # each item once
        assert backend.most_at_once == 1
        assert all(len(batch) * max(len(text.split()) for text in batch) <= 256 for batch in backend.batches)
        assert len(backend.threads) == 1 and threading.get_ident() not in backend.threads
        assert engine.queue.tokens == 0


def test_the_next_full_batch_is_made_ready_while_one_runs() -> None:
    async def work(engine: Engine) -> None:
        backend = observed(engine)
        held = await hold(engine)
        backend.collated.clear()
        partly = asyncio.ensure_future(embed(engine, *["small batch"] * 7))  # 14 of 16 tokens: may grow
        await asyncio.sleep(0.1)
        assert not backend.collated.is_set()
        rest = asyncio.ensure_future(embed(engine, "makes it full"))
        await until(backend.collated.is_set)
        assert len(backend.batches) == 1 and not held.done()  # the first still runs
        await until(lambda: not engine.queue.waiting or len(engine.queue.waiting) < 8)
        backend.gate.set()
        await asyncio.gather(held, partly, rest)
        assert backend.most_at_once == 1

    with loaded() as engine:
        run(work(engine))


def test_an_idle_engine_runs_a_single_item_at_once() -> None:
    with loaded(batch_tokens=10_000) as engine:
        assert run(embed(engine, "alone")).queue_seconds < 1
        assert observed(engine).batches == [["alone"]]


def test_each_batch_is_observed() -> None:
    stats: list[BatchStats] = []
    engine = Engine("toy", ScriptedBackend, queue_tokens=1000, batch_tokens=16, observe=stats.append)
    engine.load()
    run(embed(engine, "one two three", "one"))
    engine.stop()
    assert engine.join(PATIENCE)
    assert [(each.items, each.tokens, each.padded_tokens) for each in stats] == [(2, 4, 6)]


# Admission


def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        fits = asyncio.ensure_future(embed(engine, "a b c d", "e f g h"))
        await until(lambda: engine.queue.tokens == 8)
        with pytest.raises(QueueFull) as full:
            await embed(engine, "i", "j k")
        assert full.value.retry_after > 0
        assert len(engine.queue.waiting) == 2 and engine.queue.tokens == 8
        more = asyncio.ensure_future(embed(engine, "i", "j"))
        await until(lambda: engine.queue.tokens == 10)
        observed(engine).gate.set()
        assert_array_equal((await fits).rows, expected("a b c d", "e f g h"))
        assert_array_equal((await more).rows, expected("i", "j"))
        assert len((await held).rows) == 1
        assert len((await embed(engine, *["larger than the bound"] * 9)).rows) == 9

    with loaded(queue_tokens=10, batch_tokens=100) as engine:
        run(work(engine))


def test_the_bound_holds_under_many_requests() -> None:
    most = 0

    async def one(engine: Engine, text: str) -> bool:
        nonlocal most
        try:
            result = await embed(engine, text)
        except QueueFull:
            return False
        finally:
            most = max(most, engine.queue.tokens)
        assert_array_equal(result.rows, expected(text))
        return True

    async def work(engine: Engine) -> list[bool]:
        held = await hold(engine)
        requests = [asyncio.ensure_future(one(engine, f"text number {number}")) for number in range(200)]
        await until(lambda: sum(request.done() for request in requests) >= 150)
        observed(engine).gate.set()
        await held
        return await asyncio.gather(*requests)

    with loaded(queue_tokens=90, batch_tokens=9) as engine:
        served = run(work(engine))
        assert 30 <= sum(served) <= 30 + 3 and most <= 90  # and one batch that was made ready


# Cancelling


def test_cancelling_takes_waiting_items_out_of_the_queue() -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        gone = asyncio.ensure_future(embed(engine, "gone 1", "gone 2"))
        stays = asyncio.ensure_future(embed(engine, "stays"))
        await until(lambda: len(engine.queue.waiting) == 3)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert [job.prepared.payload for job in engine.queue.waiting] == ["stays"]
        assert engine.queue.tokens == 1
        observed(engine).gate.set()
        await asyncio.gather(held, stays)
        assert observed(engine).batches == [["held"], ["stays"]]

    with loaded() as engine:
        run(work(engine))


def test_cancelling_what_runs_harms_no_other() -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        held.cancel()
        stays = asyncio.ensure_future(embed(engine, "stays"))
        await asyncio.sleep(0)
        observed(engine).gate.set()
        assert_array_equal((await stays).rows, expected("stays"))

    with loaded() as engine:
        run(work(engine))


# Failing items


@pytest.mark.parametrize(("bad", "error"), [("fail", InferenceFailed), ("nan", NonFiniteVector)])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_bad_item_alone_fails(bad: str, error: type[Exception], place: int) -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        texts = [f"text {number}" for number in range(8)]
        texts[place] = bad
        requests = [asyncio.ensure_future(embed(engine, text)) for text in texts]
        several = asyncio.ensure_future(embed(engine, "good 1", bad, "good 2"))
        await until(lambda: len(engine.queue.waiting) == 11)
        observed(engine).gate.set()
        results = await asyncio.gather(held, several, *requests, return_exceptions=True)
        assert isinstance(results[1], error) and isinstance(results.pop(place + 2), error)
        for text, result in zip([each for each in texts if each != bad], results[2:], strict=True):
            assert isinstance(result, Outcome)
            assert_array_equal(result.rows, expected(text))
        assert not engine.queue.waiting and engine.state == "ready" and engine.restarts == 0

    with loaded(batch_tokens=100) as engine:
        run(work(engine))


def test_what_was_done_before_the_worker_died_is_not_lost() -> None:
    """A batch that fails is run in parts: one part is done, the next takes the device with it."""

    async def work(engine: Engine) -> None:
        held = await hold(engine)
        # Halves: [good, fail, first] and [second, lost, last]. The first is through when the device goes.
        requests = [
            asyncio.ensure_future(embed(engine, *texts))
            for texts in (("good",), ("fail",), ("first", "second"), ("lost",), ("last",))
        ]
        await until(lambda: len(engine.queue.waiting) == 6)
        observed(engine).gate.set()
        good, failed, both, lost, last = await asyncio.gather(*requests, return_exceptions=True)
        await held
        assert isinstance(failed, InferenceFailed) and isinstance(lost, WorkerLost)
        for texts, result in ((("good",), good), (("first", "second"), both), (("last",), last)):
            assert isinstance(result, Outcome), result
            assert_array_equal(result.rows, expected(*texts))
        await until(lambda: engine.state == "ready")
        assert engine.restarts == 2

    with loaded(batch_tokens=100) as engine:
        run(work(engine))


def test_many_inputs_that_kill_the_worker_do_not_end_it() -> None:
    async def work(engine: Engine) -> None:
        killers = [embed(engine, f"lost {number}") for number in range(6)]
        *lost, good = await asyncio.gather(*killers, embed(engine, "good"), return_exceptions=True)
        assert {type(result) for result in lost} == {WorkerLost}
        assert isinstance(good, Outcome), good
        await until(lambda: engine.state == "ready")

    with loaded(ScriptedBackend, batch_tokens=100) as engine:
        run(work(engine))


def test_a_collate_that_fails_is_the_items_own_failure() -> None:
    class Picky(Observed):
        def collate(self, batch: Sequence[Prepared]) -> list[str]:
            if any(prepared.payload == "odd" for prepared in batch):
                raise ValueError("odd")
            return super().collate(batch)

    async def work(engine: Engine) -> None:
        held = await hold(engine)
        requests = [asyncio.ensure_future(embed(engine, text)) for text in [*"abcdefgh", "odd", *"ijklmnopq"]]
        observed_gate = observed(engine).gate
        await asyncio.sleep(0.05)
        observed_gate.set()
        results = await asyncio.gather(held, *requests, return_exceptions=True)
        assert [isinstance(result, Outcome) for result in results] == [True] * 9 + [False] + [True] * 9
        assert isinstance(results[9], InferenceFailed)

    with loaded(Picky) as engine:
        run(work(engine))


# Loading and stopping


@pytest.mark.parametrize(
    ("error", "message"), [(ModelNotFound("no such model"), "no such model"), (OSError("disk"), "OSError: disk")]
)
def test_a_first_load_that_fails_is_told(error: Exception, message: str) -> None:
    def load() -> Backend:
        raise error

    engine = Engine("toy", load, queue_tokens=10)
    with pytest.raises(ModelError, match=message):
        engine.load()
    assert engine.state == "dead"
    with pytest.raises(WorkerLost):
        run(embed(engine, "late"))
    engine.stop()
    assert engine.join(PATIENCE)


def test_a_backend_that_cannot_warm_up_is_not_served() -> None:
    class Broken(ScriptedBackend):
        def run(self, batch: list[str]) -> NDArray[np.float32]:
            raise DeviceLost("no device")

    with pytest.raises(ModelError, match="no device"):
        Engine("toy", Broken, queue_tokens=10).load()


def test_stopping_fails_what_is_not_answered_and_does_not_hang() -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        # More than two batches: one is made ready, the others wait.
        waiting = [asyncio.ensure_future(embed(engine, f"text {number}")) for number in range(30)]
        await until(lambda: 0 < len(engine.queue.waiting) < 30)
        engine.stop()
        results = await asyncio.gather(held, *waiting, return_exceptions=True)  # though the batch still runs
        assert {type(result) for result in results} == {WorkerLost}
        assert not engine.join(0)
        observed(engine).gate.set()
        assert await asyncio.to_thread(engine.join, PATIENCE)
        assert engine.state == "stopped"
        with pytest.raises(WorkerLost):
            await embed(engine, "late")
        engine.stop()

    with loaded() as engine:
        run(work(engine))


def test_a_stopped_engine_has_no_backend_to_prepare_with() -> None:
    with loaded() as engine:
        assert [each.tokens for each in engine.backend.prepare([Item("one two")])] == [2]
    with pytest.raises(WorkerLost, match="not loaded"):
        _ = engine.backend
