"""Collections in each of the stores: what every one of them has to do."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from mlx_embeddings_server.stores.base import (
    PARTS,
    CollectionExists,
    CollectionNotFound,
    Document,
    EmbeddedDocument,
    Excerpt,
    InvalidValue,
    Mismatch,
    Scalar,
)
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import KINDS, MINI, OTHER, PAGES, opened, run, text, vector

_numbers = count()


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    with opened(request.param, tmp_path_factory.mktemp(request.param)) as store:
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


def test_a_collection_keeps_its_metadata_and_what_made_its_vectors(store: VectorStore, owner: str) -> None:
    made = run(store.create(owner, "my.notes_1-a", MINI, {"domain": "news", "shared": False, "weight": 0.5}))
    found = run(store.get(owner, "my.notes_1-a"))
    assert found == made and found.facts == MINI and found.current.number == 1 and found.filling is None
    assert found.metadata == {"domain": "news", "shared": False, "weight": 0.5}
    assert run(store.stats(owner, "my.notes_1-a")).count == 0


def test_collections_are_listed_by_name_and_deleted_ones_are_not(store: VectorStore, owner: str) -> None:
    for name in ("second", "first", "third"):
        run(store.create(owner, name, MINI))
    run(store.delete(owner, "third"))
    assert [each.name for each in run(store.all_of(owner))] == ["first", "second"]
    for work in (store.get(owner, "third"), store.stats(owner, "third"), store.delete(owner, "third")):
        with pytest.raises(CollectionNotFound, match="third"):
            run(work)


def test_a_deleted_collection_can_be_created_anew_and_is_empty(store: VectorStore, owner: str, notes: str) -> None:
    run(store.delete(owner, notes))
    run(store.create(owner, notes, OTHER))
    assert run(store.stats(owner, notes)).count == 0 and run(store.get(owner, notes)).facts == OTHER


def test_a_name_that_is_taken_is_refused(store: VectorStore, owner: str, notes: str) -> None:
    with pytest.raises(CollectionExists, match="'notes' already"):
        run(store.create(owner, notes, OTHER))
    assert run(store.get(owner, notes)).facts == MINI


def test_of_two_creations_at_once_exactly_one_wins(store: VectorStore, owner: str) -> None:
    async def create_all() -> list[object]:
        creations = (store.create(owner, "wanted", MINI, {"place": place}) for place in range(6))
        return list(await asyncio.gather(*creations, return_exceptions=True))

    made = run(create_all())
    assert sum(isinstance(each, CollectionExists) for each in made) == 5, made
    winner = next(each for each in made if not isinstance(each, Exception))
    assert run(store.get(owner, "wanted")) == winner
    assert run(store.clean_up()) == 0  # the losers' indexes are gone already


def test_the_longest_names_are_taken(store: VectorStore, owner: str) -> None:
    longest = "a" * 512
    run(store.create(owner, longest, MINI))
    run(store.upsert(owner, longest, MINI, [text(1)]))
    assert run(store.stats(owner, longest)).count == 1


def test_names_that_differ_in_case_are_two_collections(store: VectorStore, owner: str, notes: str) -> None:
    run(store.create(owner, "Notes", MINI))
    assert run(store.stats(owner, "Notes")).count == 0 and run(store.stats(owner, notes)).count == 3


def test_documents_come_back_as_they_were_stored(store: VectorStore, owner: str) -> None:
    metadata: dict[str, Scalar] = {
        "text": "a ü 漢 'quote\"", "year": 2024, "big": 2**53 + 1, "share": 0.25, "whole": 3.0, "yes": True,
        "no": False, "with.dot": "d", "with space": "s", "[0]": "b", '"quoted"': "q", "x-": "x", "ключ": 1,
        "null\0": "",
    }  # fmt: skip
    documents = [
        Document("plain", "A text.\nTwo lines.", None, metadata),
        Document("URL", None, "https://example.com/a b.png?x=1", {"n": 1}),
        Document("data/URI ü\n", "a caption", "data:image/png;base64," + "A" * 300_000, {}),
        Document("a" * 512, "x" * 200_000, None, {}),
    ]
    run(store.create(owner, "kept", MINI))
    stored = [EmbeddedDocument(each, vector(place)) for place, each in enumerate(documents)]
    run(store.upsert(owner, "kept", MINI, stored))
    ids = [each.id for each in reversed(documents)]
    found = run(store.documents(owner, "kept", ids=[*ids[:2], "unknown", *ids[2:]]))
    assert found == documents[::-1]
    some = run(store.documents(owner, "kept", ids=ids, excerpt=Excerpt(("text",))))
    assert some == [Document(each.id, each.text) for each in documents[::-1]]
    some = run(store.documents(owner, "kept", ids=ids, excerpt=Excerpt(("image", "metadata"))))
    assert some == [Document(each.id, None, each.image, each.metadata) for each in documents[::-1]]
    kinds = {key: type(value) for key, value in found[-1].metadata.items()}
    assert kinds == {key: type(value) for key, value in metadata.items()}


def test_an_upsert_replaces_all_of_a_document(store: VectorStore, owner: str, notes: str) -> None:
    run(store.upsert(owner, notes, MINI, [EmbeddedDocument(Document("id-1", None, "https://a/b"), vector(9))]))
    assert run(store.documents(owner, notes, ids=["id-1"])) == [Document("id-1", None, "https://a/b", {})]
    assert run(store.stats(owner, notes)).count == 3
    assert run(store.documents(owner, notes, where={"year": 2021})) == []
    (hit,) = run(store.query(owner, notes, MINI, vector(9), n_results=1))
    assert hit.document.id == "id-1" and hit.score == pytest.approx(1, abs=1e-5)
    run(store.upsert(owner, notes, MINI, [text(1, words="again", metadata={"month": 5})]))
    assert run(store.documents(owner, notes, ids=["id-1"])) == [Document("id-1", "again", None, {"month": 5})]


def test_a_query_gives_the_nearest_with_their_cosines(store: VectorStore, owner: str) -> None:
    run(store.create(owner, "many", MINI))
    vectors = np.stack([vector(number) for number in range(60)])
    scales = np.linspace(0.1, 20, 60, dtype=np.float32)  # cosine: lengths do not count
    stored = [
        replace(text(number), vectors=row * scale)
        for number, (row, scale) in enumerate(zip(vectors, scales, strict=True))
    ]
    run(store.upsert(owner, "many", MINI, stored))
    query = vector(1000) * 7
    hits = run(store.query(owner, "many", MINI, query, n_results=10))
    cosines = vectors @ query / np.linalg.norm(query)
    assert [hit.document.id for hit in hits] == [f"id-{number}" for number in np.argsort(-cosines)[:10]]
    assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:10], atol=1e-5)
    assert_allclose([hit.distance or 0 for hit in hits], 1 - np.sort(cosines)[::-1][:10], atol=1e-5)
    assert len(run(store.query(owner, "many", MINI, query, n_results=1000))) == 60
    (same,) = run(store.query(owner, "many", MINI, vectors[7], n_results=1, excerpt=Excerpt(())))
    assert same.document == Document("id-7") and same.score == pytest.approx(1, abs=1e-6)
    assert same.score <= 1 and same.distance is not None and same.distance >= 0  # whatever rounding says


def test_an_empty_collection_has_no_hits(store: VectorStore, owner: str) -> None:
    run(store.create(owner, "empty", MINI))
    assert run(store.query(owner, "empty", MINI, vector(1))) == []
    assert run(store.documents(owner, "empty")) == []
    assert run(store.delete_documents(owner, "empty", ids=["id-1"])) == 0


def test_pages_of_documents_have_each_of_them_once(store: VectorStore, owner: str) -> None:
    run(store.create(owner, "many", MINI))
    run(store.upsert(owner, "many", MINI, [text(number, metadata={"odd": number % 2}) for number in range(25)]))
    pages = [run(store.documents(owner, "many", limit=10, offset=offset)) for offset in (0, 10, 20, 30)]
    assert [len(page) for page in pages] == [10, 10, 5, 0]
    assert {each.id for page in pages for each in page} == {f"id-{number}" for number in range(25)}
    odd = [run(store.documents(owner, "many", where={"odd": 1}, limit=7, offset=offset)) for offset in (0, 7)]
    assert sorted(each.id for page in odd for each in page) == sorted(f"id-{number}" for number in range(1, 25, 2))


def test_documents_that_are_too_much_together_are_refused_and_one_alone_never_is(
    store: VectorStore, owner: str
) -> None:
    run(store.create(owner, "long", MINI))
    stored = [text(number, words="ü" * 500, metadata={"a" * 100: "b" * 100}) for number in range(40)]
    run(store.upsert(owner, "long", MINI, stored))
    for parts, size in ((PARTS, 1200), (("text",), 1000), (("metadata",), 200)):
        enough, less = Excerpt(parts, 40 * size), Excerpt(parts, 40 * size - 1)
        assert len(run(store.documents(owner, "long", excerpt=enough))) == 40
        assert len(run(store.query(owner, "long", MINI, vector(1), n_results=40, excerpt=enough))) == 40
        for work in (
            store.documents(owner, "long", excerpt=less),
            store.documents(owner, "long", ids=[f"id-{number}" for number in range(40)], excerpt=less),
            store.query(owner, "long", MINI, vector(1), n_results=40, excerpt=less),
        ):
            with pytest.raises(InvalidValue, match=f"more than {40 * size - 1} bytes together.*include") as raised:
                run(work)
            assert raised.value.code == "reply_too_large"
    assert len(run(store.documents(owner, "long", limit=1, excerpt=Excerpt(most_bytes=1)))) == 1


def test_documents_are_deleted_by_id_or_by_filter(store: VectorStore, owner: str, notes: str) -> None:
    assert run(store.delete_documents(owner, notes, ids=["id-0", "unknown"])) == 1
    assert run(store.delete_documents(owner, notes, where={"year": {"$gte": 2022}})) == 1
    assert [each.id for each in run(store.documents(owner, notes))] == ["id-1"]
    assert [hit.document.id for hit in run(store.query(owner, notes, MINI, vector(0)))] == ["id-1"]


def test_the_same_model_under_another_served_name_is_the_same(store: VectorStore, owner: str, notes: str) -> None:
    renamed = replace(MINI, model="renamed")
    run(store.upsert(owner, notes, renamed, [text(7)]))
    assert run(store.query(owner, notes, renamed, vector(7)))[0].document.id == "id-7"


def test_more_documents_than_one_request_takes_are_all_stored(store: VectorStore, owner: str) -> None:
    run(store.create(owner, "big", MINI))
    amount = 140 if store.name == "qdrant" else 5600  # one request: 128, and Chroma's own limit of 5461
    run(store.upsert(owner, "big", MINI, [text(number) for number in range(amount)]))
    assert run(store.stats(owner, "big")).count == amount
    assert run(store.query(owner, "big", MINI, vector(amount - 1), n_results=1))[0].document.id == f"id-{amount - 1}"


def test_documents_that_are_too_large_for_one_request_together_are_all_stored(store: VectorStore, owner: str) -> None:
    run(store.create(owner, "large", MINI))
    image = "data:image/png;base64," + "A" * 12_000_000  # a Chroma server takes 40 MB at once
    stored = [EmbeddedDocument(Document(str(number), None, image), vector(number)) for number in range(4)]
    run(store.upsert(owner, "large", MINI, stored))
    assert run(store.stats(owner, "large")).count == 4
    (found,) = run(store.documents(owner, "large", ids=["3"]))
    assert found.image == image


def test_many_writers_at_once_lose_nothing(store: VectorStore, owner: str) -> None:
    run(store.create(owner, "shared", MINI))

    async def write_all() -> None:
        batches = ([text(10 * writer + number) for number in range(5)] for writer in range(8))
        await asyncio.gather(*(store.upsert(owner, "shared", MINI, batch) for batch in batches))

    run(write_all())
    assert run(store.stats(owner, "shared")).count == 40


def test_a_write_that_nobody_waits_for_is_done_to_its_end(store: VectorStore, owner: str, notes: str) -> None:
    async def leave() -> None:
        writing = asyncio.ensure_future(store.upsert(owner, notes, MINI, [text(number) for number in range(50, 70)]))
        await asyncio.sleep(0)  # it has begun
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        while (await store.stats(owner, notes)).count < 23:
            await asyncio.sleep(0.01)

    run(leave())


def test_chroma_refuses_multi_vector_models_and_names_qdrant(store: VectorStore, owner: str) -> None:
    if store.name == "qdrant":
        run(store.create(owner, "pages", PAGES))
        return
    with pytest.raises(Mismatch, match="use Qdrant for multi-vector models"):
        run(store.create(owner, "pages", PAGES))
    assert run(store.all_of(owner)) == []


@pytest.mark.parametrize("kind", ["chroma", "qdrant"])
def test_what_is_stored_is_there_after_a_restart(kind: str, tmp_path: Path) -> None:
    for round in range(2):
        store = open_store(kind, tmp_path)
        if round == 0:
            run(store.create("ada", "notes", MINI, {"a": 1}))
            run(store.upsert("ada", "notes", MINI, [text(1, metadata={"a": 1}), text(2)]))
        assert run(store.get("ada", "notes")).metadata == {"a": 1}
        assert run(store.query("ada", "notes", MINI, vector(1)))[0].document.metadata == {"a": 1}
        store.close()
        store.close()
