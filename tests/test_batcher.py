"""The schedule, as a property of any queue."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_embeddings_backends.base import Prepared
from mlx_embeddings_server.engine.batcher import pick

items = st.builds(
    Prepared, payload=st.none(), tokens=st.integers(1, 600), truncated=st.just(False), group=st.integers(0, 2)
)
queues = st.lists(items, min_size=1, max_size=60)
budgets = st.integers(1, 2048)


def padded(batch: list[Prepared]) -> int:
    return len(batch) * max(item.tokens for item in batch)


@given(queues, budgets)
def test_every_item_goes_exactly_once(queue: list[Prepared], budget: int) -> None:
    waiting, gone = list(enumerate(queue)), []
    while waiting:
        chosen = pick([item for _, item in waiting], budget)
        assert len(set(chosen)) == len(chosen)
        gone += [waiting[place][0] for place in chosen]
        waiting = [each for place, each in enumerate(waiting) if place not in set(chosen)]
    assert sorted(gone) == list(range(len(queue)))


@given(queues, budgets)
def test_the_oldest_item_is_in_the_next_batch(queue: list[Prepared], budget: int) -> None:
    assert 0 in pick(queue, budget)


@given(queues, budgets)
def test_a_batch_keeps_the_budget_unless_it_is_one_oversized_item(queue: list[Prepared], budget: int) -> None:
    batch = [queue[place] for place in pick(queue, budget)]
    assert padded(batch) <= budget or len(batch) == 1


@given(queues, budgets)
def test_a_batch_is_of_one_group(queue: list[Prepared], budget: int) -> None:
    assert {queue[place].group for place in pick(queue, budget)} == {queue[0].group}


@given(queues, budgets)
def test_no_item_that_would_have_fitted_is_left(queue: list[Prepared], budget: int) -> None:
    chosen = pick(queue, budget)
    batch = [queue[place] for place in chosen]
    for place, item in enumerate(queue):
        if place not in chosen and item.group == queue[0].group:
            assert padded([*batch, item]) > budget


def test_an_oversized_item_does_not_stall_those_behind_it() -> None:
    queue = [Prepared(None, tokens=5000), Prepared(None, tokens=10), Prepared(None, tokens=10)]
    assert pick(queue, 2048) == [0]
    assert sorted(pick(queue[1:], 2048)) == [0, 1]


def test_the_nearest_in_length_join_first() -> None:
    queue = [Prepared(None, tokens=tokens) for tokens in (100, 10, 400, 99, 101, 50)]
    assert sorted(pick(queue, 303)) == [0, 3, 4]
