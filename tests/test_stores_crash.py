"""Killed at any point: what was acknowledged is there, a collection has one whole version, and nothing is left over."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient

from mlx_embeddings_server.stores.base import CollectionExists, EmbeddedDocument, EmbeddingFacts, Index
from mlx_embeddings_server.stores.catalog import Catalog
from mlx_embeddings_server.stores.collections import Collections
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.qdrant import QdrantIndex
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import MINI, OTHER, ChromaServer, re_embed, run, run_script, text, vector, vector_of

WRITING = """
import asyncio, sys
from pathlib import Path
from mlx_embeddings_server.stores.opening import open_store
from tests.stores import MINI, text

async def write():
    store = open_store(sys.argv[1], Path(sys.argv[2]))
    for number in range(int(sys.argv[3]), 100_000):
        await store.upsert("ada", "notes", MINI, [text(number), text(number % 7, words=f"turn {number}")])
        print(number, flush=True)

asyncio.run(write())
"""
RE_EMBEDDING = """
import asyncio, itertools, sys
from pathlib import Path
from mlx_embeddings_server.stores.opening import open_store
from tests.stores import MINI, OTHER, re_embed

async def work():
    store = open_store(sys.argv[1], Path(sys.argv[2]))
    print("open", flush=True)
    filling = (await store.get("ada", "notes")).filling  # what a kill has left has to come to its end first
    if filling is not None:
        await re_embed(store, "ada", "notes", filling.facts, at_once=6)
    for facts in itertools.cycle([OTHER, MINI]):
        await re_embed(store, "ada", "notes", facts, at_once=6)
        print(facts.model, flush=True)

asyncio.run(work())
"""


@pytest.fixture(params=["chroma", "chroma-server", "qdrant"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A store's setting, and its folder."""
    if request.param == "chroma-server":
        with ChromaServer(tmp_path / "server") as server:
            yield server.url, tmp_path
    else:
        yield request.param, tmp_path


def killed(script: str, place: tuple[str, Path], *arguments: str, lines: int) -> list[str]:
    """What the script printed before it was killed, some time after so many lines."""
    process = run_script(script, place[0], str(place[1]), *arguments)
    assert process.stdout and process.stderr
    try:
        said = [process.stdout.readline().strip() for _ in range(lines)]
        assert process.poll() is None, process.stderr.read()
    finally:
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
    return said + rest.split()


def test_what_was_acknowledged_outlives_a_kill(place: tuple[str, Path]) -> None:
    store = open_store(*place)
    run(store.create("ada", "notes", MINI))
    store.close()
    done = 10
    for lines in (3, 17):
        acknowledged = killed(WRITING, place, str(done), lines=lines)
        last = int(acknowledged[-1])
        assert last >= done + lines - 1
        store = open_store(*place)
        found = run(store.documents("ada", "notes", ids=[f"id-{number}" for number in range(10, last + 1)]))
        assert [each.text for each in found] == [f"text {number}" for number in range(10, last + 1)]
        turn = run(store.documents("ada", "notes", ids=[f"id-{last % 7}"]))[0].text or ""
        assert turn in (f"turn {last}", f"turn {last + 7}")
        hits = run(store.query("ada", "notes", MINI, vector(last), n_results=1))
        assert hits[0].document.id == f"id-{last}" and hits[0].score == pytest.approx(1, abs=1e-5)
        assert run(store.clean_up(0)) == 0
        store.close()
        done = last + 1


def test_a_killed_re_embedding_is_whole_and_goes_on(place: tuple[str, Path]) -> None:
    store = open_store(*place)
    run(store.create("ada", "notes", MINI))
    run(store.upsert("ada", "notes", MINI, [text(number) for number in range(30)]))
    store.close()
    for lines in (1, 2, 3):
        killed(RE_EMBEDDING, place, lines=lines)
        store = open_store(*place)
        check_whole(store, 30)
        store.close()
    store = open_store(*place)
    found = run(store.get("ada", "notes"))
    wanted = found.filling.facts if found.filling else MINI
    run(re_embed(store, "ada", "notes", wanted))
    run(store.clean_up(0))
    assert run(store.get("ada", "notes")).facts == wanted
    check_whole(store, 30)
    assert run(store.clean_up(0)) == 0
    store.close()


def check_whole(store: VectorStore, amount: int) -> None:
    """The current version has all documents, with its own model's vectors."""
    facts = run(store.get("ada", "notes")).facts
    assert run(store.stats("ada", "notes")).count == amount
    for number in (0, amount - 1):
        wanted = vector_of(f"text {number}", facts.dimension)
        if facts == MINI and run(store.get("ada", "notes")).current.number == 1:
            wanted = vector(number)
        (hit,) = run(store.query("ada", "notes", facts, wanted, n_results=1))
        assert hit.document.id == f"id-{number}" and hit.score == pytest.approx(1, abs=1e-5)


class Crash(BaseException):
    """Nothing of the program runs after it."""


class CrashingIndex:
    """Qdrant; the program ends before or after its n-th call that changes something."""

    name = "qdrant"
    kinds = QdrantIndex.kinds

    def __init__(self, index: Index, at: int, *, before: bool) -> None:
        self._index, self._left, self._before = index, at, before
        self.indexes, self.count, self.ids = index.indexes, index.count, index.ids
        self.fetch, self.query, self.check, self.close = index.fetch, index.query, index.check, index.close

    def _change(self, method: str, *arguments: Any) -> None:
        self._left -= 1
        if self._left < 0 and self._before:
            raise Crash
        getattr(self._index, method)(*arguments)
        if self._left < 0:
            raise Crash

    def create(self, index: str, facts: EmbeddingFacts, label: Mapping[str, str]) -> None:
        self._change("create", index, facts, label)

    def drop(self, index: str) -> None:
        self._change("drop", index)

    def upsert(self, index: str, facts: EmbeddingFacts, documents: Sequence[EmbeddedDocument]) -> None:
        self._change("upsert", index, facts, documents)

    def delete(self, index: str, ids: Sequence[str]) -> None:
        self._change("delete", index, ids)


def life_of_a_collection(collections: Collections) -> None:
    """Every operation that changes something. Begun again after a crash, it goes on."""
    with suppress(CollectionExists):
        collections.create("ada", "notes", MINI, {})
    if collections.get("ada", "notes").facts == MINI:
        collections.upsert("ada", "notes", MINI, [text(1), text(2), text(3)])
        version = collections.begin_version("ada", "notes", OTHER)
        waiting = collections.waiting("ada", "notes", version)
        collections.fill(version, waiting[:1], [text(int(each.id[3:]), OTHER) for each in waiting[:1]])
        collections.delete_documents("ada", "notes", ["id-1"], None)
        while not collections.switch("ada", "notes", version):
            waiting = collections.waiting("ada", "notes", version)
            found = collections.documents("ada", "notes", [each.id for each in waiting], None, 100, 0)
            collections.fill(version, waiting, [text(int(each.id[3:]), OTHER) for each in found])


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("at", range(10))
def test_a_crash_between_the_store_and_the_catalog_is_made_good(tmp_path: Path, at: int, before: bool) -> None:
    database = QdrantIndex(QdrantClient(":memory:"))
    catalog = Catalog(tmp_path / "catalog.sqlite3", exclusive=True)
    crashing = Collections(CrashingIndex(database, at, before=before), catalog)
    try:
        life_of_a_collection(crashing)
        crashing.delete("ada", "notes")
        crashed = False
    except Crash:
        crashed = True
    assert crashed == (at < 9)  # else the test does not come to all of them
    catalog.close()

    catalog = Catalog(tmp_path / "catalog.sqlite3", exclusive=True)
    collections = Collections(database, catalog)
    for found in collections.all_of("ada"):
        assert collections.stats("ada", "notes").count in (0, 2, 3)
        assert collections.query("ada", "notes", found.facts, vector(3, found.facts.dimension), 3, None) is not None
    collections.clean_up(0)
    life_of_a_collection(collections)
    collections.clean_up(0)
    assert {each.id for each in collections.documents("ada", "notes", None, None, 10, 0)} == {"id-2", "id-3"}
    hits = collections.query("ada", "notes", OTHER, vector(3, 4), 1, None)
    assert hits[0].document.id == "id-3"
    current = collections.get("ada", "notes").current
    assert database.indexes("") == [current.index] and catalog.known() == {current.index}
    collections.close()
