"""Metadata filters: what is refused, and that each store finds what plain Python finds."""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from mlx_embeddings_server.stores.base import Scalar
from mlx_embeddings_server.stores.filters import MAX_DEPTH, Comparison, FilterProblem, Group, parse_where
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import KINDS, MINI, opened, run, text, vector

DOCUMENTS: list[dict[str, Scalar]] = [
    {"year": 2020, "kind": "news", "draft": True},
    {"year": 2021, "kind": "news", "draft": False, "share": 0.5},
    {"year": 2021.0, "kind": "letter", "share": 1},
    {"year": 2022.5, "kind": "", "share": -3.25},
    {"year": "2021", "draft": 1},
    {"year": True, "draft": 0, "with.dot": "a", 'a "b" [0]': 1},
    {"big": 2**53 + 1, "kind": "News"},
    {"big": 2**53, "with": "dot", "x-": "x"},
    {},
]

FILTERS: list[dict[str, Any]] = [
    {"year": 2021},
    {"year": 2021.0},
    {"year": "2021"},
    {"year": True},
    {"year": 1},
    {"draft": 1},
    {"draft": True},
    {"draft": {"$ne": True}},
    {"draft": {"$ne": 0}},
    {"kind": ""},
    {"kind": {"$eq": "news"}},
    {"kind": {"$ne": "news"}},
    {"unknown": {"$ne": "x"}},
    {"unknown": "x"},
    {"year": {"$gt": 2020}},
    {"year": {"$gte": 2021}},
    {"year": {"$lt": 2022}},
    {"year": {"$lte": 2021.0}},
    {"year": {"$gt": 2020.5, "$lt": 2022}},
    {"share": {"$lt": 0}},
    {"share": {"$gte": 0.5}},
    {"year": {"$in": [2020, 2021]}},
    {"year": {"$in": [2020, 2022.5]}},
    {"year": {"$in": ["2021"]}},
    {"year": {"$nin": [2021]}},
    {"kind": {"$nin": ["news", "letter"]}},
    {"draft": {"$in": [True]}},
    {"draft": {"$nin": [True, False]}},
    {"big": 2**53},
    {"big": 2**53 + 1},
    {"big": {"$in": [2**53 + 1, 5]}},
    {"big": {"$ne": 2**53 + 1}},
    {"with.dot": "a"},
    {'a "b" [0]': 1},
    {"x-": "x"},
    {"kind": "news", "draft": False},
    {"$and": [{"kind": "news"}, {"year": {"$gte": 2021}}]},
    {"$and": [{"kind": "news"}]},
    {"$or": [{"kind": "letter"}, {"draft": True}]},
    {"$or": [{"$and": [{"kind": "news"}, {"draft": True}]}, {"share": {"$lt": 0}}], "year": {"$ne": 2020}},
    {"$and": [{"$or": [{"year": 2020}, {"year": 2021}]}, {"$or": [{"kind": "letter"}, {"draft": {"$ne": True}}]}]},
]

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le,
}  # fmt: skip


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def equal(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def passes(where: Mapping[str, Any], metadata: Mapping[str, Scalar]) -> bool:
    """What the filter means, in plain Python."""
    return all(holds(key, condition, metadata) for key, condition in where.items())


def holds(key: str, condition: Any, metadata: Mapping[str, Scalar]) -> bool:
    if key in ("$and", "$or"):
        return (all if key == "$and" else any)(passes(part, metadata) for part in condition)
    if not isinstance(condition, Mapping):
        condition = {"$eq": condition}
    there, value = key in metadata, metadata.get(key)
    for name, operand in condition.items():
        if name in COMPARE:
            found = there and is_number(value) and COMPARE[name](value, operand)
        else:
            operands = operand if name in ("$in", "$nin") else [operand]
            found = there and any(equal(value, each) for each in operands)
            found = not found if name in ("$ne", "$nin") else found
        if not found:
            return False
    return True


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    with opened(request.param, tmp_path_factory.mktemp(request.param)) as store:
        run(store.create("ada", "notes", MINI))
        stored = [text(number, metadata=metadata) for number, metadata in enumerate(DOCUMENTS)]
        run(store.upsert("ada", "notes", MINI, stored))
        yield store


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_a_filter_passes_the_documents_that_it_means(store: VectorStore, where: dict[str, Any]) -> None:
    wanted = {f"id-{number}" for number, metadata in enumerate(DOCUMENTS) if passes(where, metadata)}
    hits = run(store.query("ada", "notes", MINI, vector(0), n_results=100, where=where))
    assert {hit.document.id for hit in hits} == wanted
    assert {each.id for each in run(store.documents("ada", "notes", where=where))} == wanted


def test_the_filters_of_these_tests_pass_some_and_hold_back_some() -> None:
    empty = [str(where) for where in ({"unknown": "x"}, {"year": 1})]
    for where in FILTERS:
        passed = sum(passes(where, metadata) for metadata in DOCUMENTS)
        assert (passed == 0) == (str(where) in empty) and passed <= len(DOCUMENTS), where


def test_a_filter_among_many_documents_gives_as_many_results_as_asked(store: VectorStore) -> None:
    run(store.create("ada", "many", MINI))
    run(store.upsert("ada", "many", MINI, [text(number, metadata={"group": number % 20}) for number in range(120)]))
    hits = run(store.query("ada", "many", MINI, vector(5000), n_results=6, where={"group": 7}))
    nearest = sorted(range(7, 120, 20), key=lambda number: -float(vector(number) @ vector(5000)))
    assert [hit.document.id for hit in hits] == [f"id-{number}" for number in nearest]
    run(store.delete("ada", "many"))


def nested(levels: int) -> dict[str, Any]:
    where: dict[str, Any] = {"a": 1}
    for _ in range(levels - 1):
        where = {"$and": [where, {"b": 2}]}
    return where


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ([], "where must be an object"),
        ("year", "where must be an object"),
        ({"year": {"$regex": "2"}}, r"where.year.\$regex: there is no operator '\$regex'; known: \$eq, \$ne"),
        ({"year": {"gte": 2}}, "no operator 'gte'"),
        ({"$not": {"a": 1}}, r"no operator '\$not'"),
        ({"$and": {"a": 1}}, r"where.\$and must be a list"),
        ({"$or": []}, r"where.\$or must be a list of one or more"),
        ({"$or": [{"a": 1}, 3]}, r"where.\$or\[1\] must be an object"),
        ({"$or": [{"a": 1}, {}]}, r"where.\$or\[1\] is empty"),
        ({"a": None}, "where.a.\\$eq must be a text, a number, true or false"),
        ({"a": [1]}, "must be a text, a number"),
        ({"a": {}}, "where.a is empty"),
        ({"": 1}, "a key is empty"),
        ({"chroma:document": "x"}, "begins with '#', 'chroma:' or 'mlx-embeddings:'"),
        ({"#document": "x"}, "begins with '#', 'chroma:' or 'mlx-embeddings:'"),
        ({"a": {"$gt": "x"}}, r"where.a.\$gt must be a number"),
        ({"a": {"$gt": True}}, "must be a number"),
        ({"a": {"$in": []}}, "one or more values"),
        ({"a": {"$in": 3}}, "one or more values"),
        ({"a": {"$in": [1, "x"]}}, "all texts, all numbers, or all true or false"),
        ({"a": {"$in": [1, True]}}, "all texts, all numbers, or all true or false"),
        ({"a": float("nan")}, "finite"),
        ({"a": 2**63}, "64 bits"),
        ({"a": "\ud800"}, "Unicode"),
        ({"a\ud800": "x"}, "Unicode"),
        (nested(MAX_DEPTH + 1), "nested deeper than 8 levels"),
        (nested(900), "nested deeper than 8 levels"),
        ({"$or": [{"a": n} for n in range(101)]}, "more than 100 conditions"),
        ({"a": {"$in": list(range(1001))}}, "more than 1000 values"),
        ({"a" * 100_000: {"$x": 1}}, "no operator"),
    ],
)
def test_what_is_no_filter_is_refused_by_name(where: object, told: str) -> None:
    with pytest.raises(FilterProblem, match=told) as raised:
        parse_where(where)
    assert len(str(raised.value)) < 400


def test_filters_are_parsed_to_their_shortest_form() -> None:
    assert parse_where(None) is None and parse_where({}) is None
    one = Comparison("a", "$eq", (1,))
    assert parse_where({"a": 1}) == parse_where({"$and": [{"a": {"$eq": 1}}]}) == one
    assert parse_where({"a": 1, "b": {"$in": ["x"]}}) == Group("$and", (one, Comparison("b", "$in", ("x",))))
    assert parse_where(nested(MAX_DEPTH)) is not None
