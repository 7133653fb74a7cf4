"""A request whose items get ready one after the other, as images do; and turns on a device."""

import asyncio
import threading
import time

import pytest
from numpy.testing import assert_array_equal

from mlx_embeddings_backends.base import Item, Prepared
from mlx_embeddings_server.engine.engine import Engine
from mlx_embeddings_server.engine.queue import QueueFull
from mlx_embeddings_server.engine.turns import Device, Turns
from mlx_embeddings_server.engine.worker import InferenceFailed
from tests.engines import embed, expected, hold, loaded, observed, run, until
from tests.scripted import ScriptedBackend


def prepared(*texts: str) -> list[Prepared]:
    return ScriptedBackend().prepare([Item(text) for text in texts])


def test_vectors_are_in_the_order_of_the_items_whichever_was_ready_first() -> None:
    async def work(engine: Engine) -> None:
        with engine.request(3) as request:
            request.admit(prepared("c"), [2])
            request.admit(prepared("b", "a"), [1, 0])
            assert_array_equal((await request.result()).rows, expected("a", "b", "c"))

    with loaded() as engine:
        run(work(engine))


def test_the_first_items_run_before_the_last_are_ready() -> None:
    async def work(engine: Engine) -> None:
        backend = observed(engine)
        with engine.request(2) as request:
            request.admit(prepared("early"), [0])
            await until(lambda: ["early"] in backend.batches)
            request.admit(prepared("late"), [1])
            assert_array_equal((await request.result()).rows, expected("early", "late"))

    with loaded() as engine:
        run(work(engine))


def test_a_full_queue_refuses_what_begins_and_not_what_has_begun() -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        with engine.request(2) as request:
            await request.admit_when_there_is_room(prepared("one two three"), [0])
            others = asyncio.ensure_future(embed(engine, "four five"))
            await asyncio.sleep(0)
            with engine.request(1) as late, pytest.raises(QueueFull):
                await late.admit_when_there_is_room(prepared("too much"), [0])
            rest = asyncio.ensure_future(request.admit_when_there_is_room(prepared("six seven"), [1]))
            await asyncio.sleep(0.1)
            assert not rest.done() and engine.queue.tokens == 5
            observed(engine).gate.set()
            await asyncio.gather(held, others, rest)
            assert_array_equal((await request.result()).rows, expected("one two three", "six seven"))

    with loaded(queue_tokens=5) as engine:
        run(work(engine))


def test_leaving_takes_what_waits_out_of_the_queue() -> None:
    async def work(engine: Engine) -> None:
        held = await hold(engine)
        with pytest.raises(ZeroDivisionError), engine.request(2) as request:
            request.admit(prepared("never run"), [0])
            raise ZeroDivisionError  # an image that comes later cannot be decoded, say
        assert engine.queue.tokens == 0
        observed(engine).gate.set()
        await held
        assert observed(engine).batches == [["held"]]

    with loaded() as engine:
        run(work(engine))


def test_an_item_that_fails_is_told_before_the_last_is_ready() -> None:
    async def work(engine: Engine) -> None:
        with engine.request(2) as request:
            request.admit(prepared("fail on purpose"), [0])
            await until(lambda: request.has_failed)
            with pytest.raises(InferenceFailed):
                await request.result()

    with loaded() as engine:
        run(work(engine))


def test_the_turn_goes_to_who_had_one_longest_ago_and_then_in_the_order_of_asking() -> None:
    device, given = Device(), list[str]()
    turns = {name: Turns(device) for name in ("busy", "first", "second", "before")}

    def take(name: str) -> None:
        turns[name].take()
        given.append(name)
        turns[name].pass_on()

    for name in ("before", "busy"):
        turns[name].take()
        turns[name].pass_on()
    turns["second"].take()
    assert not turns["first"].take_if_free()
    threads = [threading.Thread(target=take, args=(name,)) for name in ("busy", "before", "first")]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # until it waits
    turns["second"].pass_on()
    for thread in threads:
        thread.join(10)
    assert given == ["first", "before", "busy"]
    assert turns["first"].take_if_free()
