"""What is refused before any store is asked, and whom a collection belongs to: the same for all stores."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from mlx_embeddings_server.stores.base import (
    CollectionNotFound,
    Document,
    EmbeddedDocument,
    InvalidFilter,
    InvalidName,
    InvalidValue,
    Mismatch,
    StoreError,
)
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import DIMENSION, MINI, OTHER, opened, run, text, vector

_numbers = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    with opened("qdrant", tmp_path_factory.mktemp("qdrant")) as store:
        yield store


@pytest.fixture
def owner(store: VectorStore) -> str:
    """Who has no collection yet."""
    return f"owner {next(_numbers)}"


@pytest.fixture
def notes(store: VectorStore, owner: str) -> str:
    """The name of a collection with three documents."""
    run(store.create(owner, "notes", MINI))
    run(store.upsert(owner, "notes", MINI, [text(number, metadata={"year": 2020 + number}) for number in range(3)]))
    return "notes"


@pytest.mark.parametrize(
    "name",
    [
        "", "ab", "a" * 513, ".notes", "notes-", "../notes", "no/tes", "no\\tes", "no tes", "notes\n", "nótes",
        "ｎotes", "no\0tes", "notes\ud800", "a" * 100_000,
    ],
)  # fmt: skip
def test_names_that_are_not_allowed_are_refused_with_the_rule(store: VectorStore, owner: str, name: str) -> None:
    for work in (store.create(owner, name, MINI), store.get(owner, name), store.delete(owner, name)):
        with pytest.raises(InvalidName, match="3 to 512 characters") as raised:
            run(work)
        assert len(raised.value.message) < 400
    assert run(store.all_of(owner)) == []


@pytest.mark.parametrize(
    "other",
    ["Ada", "ada ", "../ada", "ada/notes", "ａda", "a\u0301da", "\ud800", "ada\0", "a" * 1000, "%", "ada'; --"],
)
def test_no_owner_reaches_anothers_collections(store: VectorStore, owner: str, other: str) -> None:
    first, second = f"ada{owner}", other + owner
    run(store.create(first, "notes", MINI))
    run(store.upsert(first, "notes", MINI, [text(1)]))
    for work in (
        store.get(second, "notes"),
        store.delete(second, "notes"),
        store.documents(second, "notes", ids=["id-1"]),
        store.query(second, "notes", MINI, vector(1)),
        store.upsert(second, "notes", MINI, [text(2)]),
        store.delete_documents(second, "notes", ids=["id-1"]),
    ):
        with pytest.raises(CollectionNotFound):
            run(work)
    assert run(store.all_of(second)) == []
    run(store.create(second, "notes", OTHER))
    assert [each.facts for each in run(store.all_of(first))] == [MINI]
    run(store.delete(second, "notes"))
    assert run(store.stats(first, "notes")).count == 1


@pytest.mark.parametrize("wrong", ["", "a" * 1025])
def test_owners_without_a_name_or_with_an_endless_one_are_refused(store: VectorStore, wrong: str) -> None:
    with pytest.raises(InvalidName, match="1 to 1024 bytes"):
        run(store.all_of(wrong))


def test_a_deletion_without_ids_and_filter_deletes_nothing(store: VectorStore, owner: str, notes: str) -> None:
    for work in (
        store.delete_documents(owner, notes),
        store.delete_documents(owner, notes, where={}),
        store.delete_documents(owner, notes, ids=["id-1"], where={"year": 2021}),
    ):
        with pytest.raises(InvalidValue, match="by ids, or by where"):
            run(work)
    assert run(store.delete_documents(owner, notes, ids=[])) == 0
    assert run(store.stats(owner, notes)).count == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": "example/large"}, "source example/large instead of example/mini"),
        ({"revision": "fff"}, "revision fff instead of abc123"),
        ({"provider": "openai"}, "provider openai instead of local"),
        ({"dimension": 4}, "dimension 4 instead of 8"),
        ({"prompt": "passage: "}, "prompt 'passage: ' instead of ''"),
        ({"output": "multi_vector"}, "output multi_vector instead of dense"),
    ],
)
def test_vectors_of_another_model_are_refused(
    store: VectorStore, owner: str, notes: str, change: dict[str, object], told: str
) -> None:
    facts = replace(MINI, **change)  # type: ignore[arg-type]
    with pytest.raises(Mismatch, match=told):
        run(store.upsert(owner, notes, facts, [text(7)]))
    with pytest.raises(Mismatch, match=told):
        run(store.query(owner, notes, facts, vector(7)))
    assert run(store.stats(owner, notes)).count == 3


@pytest.mark.parametrize(
    ("vectors", "error"),
    [
        (vector(1, 4), Mismatch),
        (np.stack([vector(1)]), Mismatch),
        (np.zeros(0, np.float32), Mismatch),
        (np.full(DIMENSION, np.nan, np.float32), InvalidValue),
        (np.full(DIMENSION, np.inf, np.float32), InvalidValue),
        (np.zeros(DIMENSION, np.float32), InvalidValue),
        (vector(1) * np.float32(1e20), InvalidValue),
        (vector(1) * np.float32(1e-25), InvalidValue),
    ],
)
def test_vectors_that_would_damage_the_index_are_refused_before_any_is_stored(
    store: VectorStore, owner: str, notes: str, vectors: np.ndarray[tuple[int, ...], np.dtype[np.float32]], error: type
) -> None:
    with pytest.raises(error, match=r"documents\[1\]"):
        run(store.upsert(owner, notes, MINI, [text(7), replace(text(8), vectors=vectors)]))
    with pytest.raises(error, match="query"):
        run(store.query(owner, notes, MINI, vectors))
    assert run(store.stats(owner, notes)).count == 3


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (Document("", "t"), r"documents\[1\].id must have 1 to 512 bytes"),
        (Document("ü" * 257, "t"), r"documents\[1\].id must have 1 to 512 bytes"),
        (Document("\ud800", "t"), r"documents\[1\].id is no valid Unicode"),
        (Document("id-7", "t"), r"documents\[1\].id is 'id-7', which is there twice"),
        (Document("a"), r"documents\[1\] has neither text nor image"),
        (Document("a", "", ""), r"documents\[1\] has neither text nor image"),
        (Document("a", "\ud800"), "no valid Unicode"),
        (Document("a", "x" * 25_200_000), "the most is 25165824"),
        (Document("a", "t", None, {"": 1}), "keys have 1 to 255 bytes"),
        (Document("a", "t", None, {"$eq": 1}), "do not begin with"),
        (Document("a", "t", None, {"chroma:document": "x"}), "do not begin with"),
        (Document("a", "t", None, {"#x": "y"}), "do not begin with"),
        (Document("a", "t", None, {"mlx-embeddings:text": "x"}), "do not begin with"),
        (Document("a", "t", None, {"n": 2**63}), "64 bits"),
        (Document("a", "t", None, {"n": float("nan")}), "finite"),
        (Document("a", "t", None, {"n": [1]}), "a text, a number, true or false"),  # type: ignore[dict-item]
        (Document("a", "t", None, {"n": None}), "a text, a number, true or false"),  # type: ignore[dict-item]
        (Document("a", "t", None, {str(n): n for n in range(65)}), "65 keys"),
    ],
)
def test_documents_that_cannot_be_kept_are_refused(
    store: VectorStore, owner: str, notes: str, document: Document, told: str
) -> None:
    with pytest.raises(InvalidValue, match=told):
        run(store.upsert(owner, notes, MINI, [text(7), EmbeddedDocument(document, vector(1))]))
    assert run(store.stats(owner, notes)).count == 3


def test_an_id_that_is_there_twice_is_refused(store: VectorStore, owner: str, notes: str) -> None:
    for work in (
        store.documents(owner, notes, ids=["id-1", "id-7", "id-7"]),
        store.delete_documents(owner, notes, ids=["id-1", "id-7", "id-7"]),
    ):
        with pytest.raises(InvalidValue, match=r"ids\[2\] is 'id-7', which is there twice") as raised:
            run(work)
        assert raised.value.param == "ids"
    assert run(store.stats(owner, notes)).count == 3


@pytest.mark.parametrize("number", [0, -1, 1001])
def test_results_and_pages_are_bounded(store: VectorStore, owner: str, notes: str, number: int) -> None:
    for work in (
        store.query(owner, notes, MINI, vector(1), n_results=number),
        store.documents(owner, notes, limit=number),
        store.documents(owner, notes, offset=-1),
    ):
        with pytest.raises(InvalidValue):
            run(work)


@pytest.mark.parametrize("where", [{"year": {"$regex": "2"}}, [1], {"$not": [{"a": 1}]}, {"year": None}])
def test_filters_that_are_none_are_refused(store: VectorStore, owner: str, notes: str, where: object) -> None:
    for work in (
        store.query(owner, notes, MINI, vector(1), where=where),
        store.documents(owner, notes, where=where),
        store.delete_documents(owner, notes, where=where),
    ):
        with pytest.raises(InvalidFilter, match="where"):
            run(work)


def test_errors_say_which_status_they_are(store: VectorStore, owner: str) -> None:
    with pytest.raises(StoreError) as raised:
        run(store.get(owner, "unknown"))
    assert (raised.value.status, raised.value.code) == (404, "collection_not_found")
