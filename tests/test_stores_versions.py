"""Re-embedding: a collection's next version is filled while the current one serves, and takes its place at once."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from mlx_embeddings_server.stores.base import (
    CollectionExists,
    CollectionNotFound,
    InvalidValue,
    Mismatch,
    StoreUnavailable,
    Version,
)
from mlx_embeddings_server.stores.catalog import Catalog
from mlx_embeddings_server.stores.collections import Collections
from mlx_embeddings_server.stores.qdrant import QdrantIndex
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import KINDS, MINI, OTHER, PAGES, again, opened, re_embed, run, text, vector, vector_of

_numbers = count()


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    with opened(request.param, tmp_path_factory.mktemp(request.param)) as store:
        yield store


@pytest.fixture
def owner(store: VectorStore) -> str:
    """With a collection `notes` of twelve documents."""
    owner = f"owner {next(_numbers)}"
    run(store.create(owner, "notes", MINI, {"a": 1}))
    run(store.upsert(owner, "notes", MINI, [text(number, metadata={"n": number}) for number in range(12)]))
    return owner


async def fill_all(store: VectorStore, owner: str, version: Version) -> None:
    waiting = await store.waiting(owner, "notes", version)
    found = await store.documents(owner, "notes", ids=[each.id for each in waiting])
    await store.fill(version, waiting, again(found, version.facts))


def test_a_re_embedded_collection_has_the_same_documents_and_the_new_models_vectors(
    store: VectorStore, owner: str
) -> None:
    before = run(store.documents(owner, "notes"))
    run(re_embed(store, owner, "notes", OTHER, at_once=5))
    found = run(store.get(owner, "notes"))
    assert found.facts == OTHER and found.current.number == 2 and found.filling is None and found.metadata == {"a": 1}
    after = run(store.documents(owner, "notes"))
    assert sorted(after, key=lambda each: each.id) == sorted(before, key=lambda each: each.id)
    (hit,) = run(store.query(owner, "notes", OTHER, vector_of("text 7", 4), n_results=1))
    assert hit.document.id == "id-7" and hit.score == pytest.approx(1, abs=1e-5)
    assert run(store.clean_up()) == 0  # the first version's index is gone


def test_the_current_version_serves_while_the_next_is_filled(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    run(fill_all(store, owner, version))
    found = run(store.get(owner, "notes"))
    assert found.facts == MINI and found.filling == version and version.number == 2
    assert run(store.query(owner, "notes", MINI, vector(7)))[0].document.id == "id-7"
    with pytest.raises(Mismatch, match="holds vectors of mini"):
        run(store.query(owner, "notes", OTHER, vector(7, 4)))
    assert run(store.stats(owner, "notes")).count == 12


def test_a_version_that_lacks_documents_does_not_take_over(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    waiting = run(store.waiting(owner, "notes", version))
    assert sorted(each.id for each in waiting) == sorted(f"id-{number}" for number in range(12))
    some = run(store.documents(owner, "notes", ids=[each.id for each in waiting[:11]]))
    run(store.fill(version, waiting[:11], again(some, OTHER)))
    assert run(store.switch(owner, "notes", version)) is False
    assert run(store.get(owner, "notes")).facts == MINI
    assert run(store.waiting(owner, "notes", version)) == waiting[11:]


def test_what_is_written_while_a_version_is_filled_is_taken_over(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    run(fill_all(store, owner, version))
    run(store.upsert(owner, "notes", MINI, [text(3, words="changed", metadata={"n": 33}), text(99, words="added")]))
    assert run(store.delete_documents(owner, "notes", ids=["id-4"])) == 1
    assert run(store.delete_documents(owner, "notes", where={"n": 5})) == 1
    assert run(store.switch(owner, "notes", version)) is False
    waiting = {each.id for each in run(store.waiting(owner, "notes", version))}
    assert waiting == {"id-3", "id-99", "id-4", "id-5"}
    run(re_embed(store, owner, "notes", OTHER))
    found = {each.id: each for each in run(store.documents(owner, "notes"))}
    assert len(found) == 11 and not {"id-4", "id-5"} & found.keys()
    assert found["id-3"].text == "changed" and found["id-3"].metadata == {"n": 33}
    for words, id in (("changed", "id-3"), ("added", "id-99")):
        (hit,) = run(store.query(owner, "notes", OTHER, vector_of(words, 4), n_results=1))
        assert hit.document.id == id and hit.score == pytest.approx(1, abs=1e-5)


def test_a_document_that_changes_between_reading_and_filling_waits_again(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    run(fill_all(store, owner, version))
    run(store.upsert(owner, "notes", MINI, [text(3, words="second")]))
    waiting = run(store.waiting(owner, "notes", version))
    read = run(store.documents(owner, "notes", ids=["id-3"]))
    run(store.upsert(owner, "notes", MINI, [text(3, words="third")]))
    run(store.fill(version, waiting, again(read, OTHER)))
    assert [each.id for each in run(store.waiting(owner, "notes", version))] == ["id-3"]
    run(re_embed(store, owner, "notes", OTHER))
    assert run(store.documents(owner, "notes", ids=["id-3"]))[0].text == "third"
    assert run(store.query(owner, "notes", OTHER, vector_of("third", 4)))[0].document.id == "id-3"


def test_nothing_acknowledged_is_lost_under_writes_during_a_re_embedding(store: VectorStore, owner: str) -> None:
    acknowledged: dict[str, str] = {}

    async def write() -> None:
        for turn in range(70):
            document = text(turn % 30, words=f"turn {turn}")
            try:
                await store.upsert(owner, "notes", MINI, [document])
            except Mismatch:  # the other model serves now
                return
            acknowledged[document.document.id] = f"turn {turn}"

    async def both() -> None:
        writing = asyncio.ensure_future(write())
        while len(acknowledged) < 5:
            await asyncio.sleep(0.005)
        await re_embed(store, owner, "notes", OTHER, at_once=4)
        await writing

    run(both())
    assert run(store.get(owner, "notes")).facts == OTHER
    found = {each.id: each.text for each in run(store.documents(owner, "notes", limit=100))}
    assert {id: found.get(id) for id in acknowledged} == acknowledged
    for id, words in list(acknowledged.items())[-3:]:
        assert run(store.query(owner, "notes", OTHER, vector_of(words, 4)))[0].document.id == id


def test_queries_during_the_switch_are_answered_or_told_of_the_other_model(store: VectorStore, owner: str) -> None:
    async def ask() -> list[str]:
        answers: list[str] = []
        while not answers or answers[-1] != "other":
            try:
                hits = await store.query(owner, "notes", MINI, vector(7), n_results=1)
                answers.append(hits[0].document.id)
            except Mismatch:
                answers.append("other")
        return answers

    async def both() -> list[str]:
        asking = [asyncio.ensure_future(ask()) for _ in range(3)]
        await asyncio.sleep(0.05)
        await re_embed(store, owner, "notes", OTHER)
        return [answer for answers in asking for answer in await answers]

    assert set(run(both())) == {"id-7", "other"}


def test_a_re_embedding_begun_again_goes_on_with_the_same_version(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    waiting = run(store.waiting(owner, "notes", version))[:5]
    found = run(store.documents(owner, "notes", ids=[each.id for each in waiting]))
    run(store.fill(version, waiting, again(found, OTHER)))
    assert run(store.begin_version(owner, "notes", OTHER)) == version
    assert len(run(store.waiting(owner, "notes", version))) == 7


def test_two_re_embeddings_with_different_models_at_once_are_refused(store: VectorStore, owner: str) -> None:
    run(store.begin_version(owner, "notes", OTHER))
    with pytest.raises(CollectionExists, match="being re-embedded with other already"):
        run(store.begin_version(owner, "notes", replace(OTHER, source="example/third", model="third")))


def test_an_abandoned_version_leaves_the_collection_as_it_was(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    run(fill_all(store, owner, version))
    run(store.upsert(owner, "notes", MINI, [text(1, words="changed")]))
    run(store.abandon(version))
    found = run(store.get(owner, "notes"))
    assert found.facts == MINI and found.filling is None and run(store.stats(owner, "notes")).count == 12
    waiting = run(store.waiting(owner, "notes", run(store.begin_version(owner, "notes", OTHER))))
    assert len(waiting) == 12 and all(each.change == 0 for each in waiting)  # the abandoned one's notes are gone
    with pytest.raises((CollectionNotFound, Mismatch), match="has ended"):
        run(store.fill(version, [], []))
    with pytest.raises(CollectionNotFound, match="has ended"):
        run(store.switch(owner, "notes", version))


def test_a_collection_deleted_during_its_re_embedding_leaves_nothing(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    run(fill_all(store, owner, version))
    run(store.delete(owner, "notes"))
    with pytest.raises(CollectionNotFound):
        run(store.switch(owner, "notes", version))
    with pytest.raises(Mismatch, match="has ended"):
        run(store.fill(version, [], again([], OTHER)))
    assert run(store.clean_up()) == 0


def test_a_version_is_filled_with_what_waits_and_with_its_models_vectors(store: VectorStore, owner: str) -> None:
    version = run(store.begin_version(owner, "notes", OTHER))
    waiting = run(store.waiting(owner, "notes", version))
    with pytest.raises(Mismatch, match="dimension 4"):
        run(store.fill(version, waiting, [text(1, MINI)]))
    with pytest.raises(InvalidValue, match="were not waiting: id-77"):
        run(store.fill(version, waiting, [text(77, OTHER)]))


def test_a_kind_of_vectors_that_the_store_cannot_search_is_refused(store: VectorStore, owner: str) -> None:
    if store.name == "qdrant":
        assert run(store.begin_version(owner, "notes", PAGES)).facts == PAGES
        return
    with pytest.raises(Mismatch, match="use Qdrant"):
        run(store.begin_version(owner, "notes", PAGES))


class CalledBack(QdrantIndex):
    """Qdrant; something else happens before it counts for the first time."""

    meanwhile: Callable[[], object] | None = None

    def count(self, index: str) -> int:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            meanwhile()
        return super().count(index)


def test_a_read_whose_index_is_replaced_meanwhile_reads_the_next_one(tmp_path: Path) -> None:
    index = CalledBack(QdrantClient(":memory:"))
    collections = Collections(index, Catalog(tmp_path / "catalog.sqlite3", exclusive=True))
    with closing(collections):
        collections.create("ada", "notes", MINI, {})
        collections.upsert("ada", "notes", MINI, [text(1), text(2)])

        def re_embed_meanwhile() -> None:
            version = collections.begin_version("ada", "notes", OTHER)
            waiting = collections.waiting("ada", "notes", version)
            collections.fill(version, waiting, [text(1, OTHER), text(2, OTHER)])
            assert collections.switch("ada", "notes", version)

        index.meanwhile = re_embed_meanwhile
        stats = collections.stats("ada", "notes")
        assert (stats.count, stats.collection.facts) == (2, OTHER)

        index.meanwhile = lambda: collections.delete("ada", "notes")
        with pytest.raises(CollectionNotFound):
            collections.stats("ada", "notes")

        found = collections.create("ada", "notes", MINI, {})
        index.drop(found.current.index)
        with pytest.raises(StoreUnavailable, match="lost the vectors"):
            collections.stats("ada", "notes")


def test_a_change_after_the_last_look_holds_the_switch_back(tmp_path: Path) -> None:
    collections = Collections(
        QdrantIndex(QdrantClient(":memory:")), Catalog(tmp_path / "catalog.sqlite3", exclusive=True)
    )
    with closing(collections):
        collections.create("ada", "notes", MINI, {})
        version = collections.begin_version("ada", "notes", OTHER)
        assert collections.waiting("ada", "notes", version) == []
        collections.upsert("ada", "notes", MINI, [text(1)])
        assert collections.catalog.switch(version) is None
        assert collections.get("ada", "notes").facts == MINI
        assert [each.id for each in collections.waiting("ada", "notes", version)] == ["id-1"]
