"""A crash before or after each step of a job: the next attempt does what is lacking, and nothing twice."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.collection_service import CollectionService
from mlx_embeddings_server.jobs.base import Job, Order
from mlx_embeddings_server.jobs.interruption import Interruption
from mlx_embeddings_server.jobs.records import Records
from mlx_embeddings_server.jobs.reembedding import Parts, Reembedding
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.settings import load_settings
from mlx_embeddings_server.stores.base import Document, EmbeddedDocument
from mlx_embeddings_server.stores.catalog import Catalog
from mlx_embeddings_server.stores.collections import Collections
from mlx_embeddings_server.stores.qdrant import QdrantIndex
from mlx_embeddings_server.stores.store import VectorStore
from tests.jobs import configured, load, vector_of
from tests.stores import MINI, vector

OWNER, WORKER = "everybody", "w"
TEXTS = {f"id-{number}": f"{number} " + "word " * 24 for number in range(5)}  # two make a part
STEPS = 13


class Crash(BaseException):
    """Nothing of the program runs after it."""


@dataclass
class Countdown:
    """To the step that is the last."""

    left: int
    before: bool
    progress: list[int] = field(default_factory=list)  # documents done, as they were noted

    def around(self, step: Any, *arguments: Any) -> None:
        self.left -= 1
        if self.left < 0 and self.before:
            raise Crash
        step(*arguments)
        if self.left < 0:
            raise Crash


class CrashingIndex:
    name = "qdrant"
    kinds = QdrantIndex.kinds

    def __init__(self, index: QdrantIndex, countdown: Countdown) -> None:
        self._index, self._countdown = index, countdown
        self.indexes, self.count, self.ids = index.indexes, index.count, index.ids
        self.fetch, self.query, self.check, self.close = index.fetch, index.query, index.check, lambda: None

    def create(self, *arguments: Any) -> None:
        self._countdown.around(self._index.create, *arguments)

    def drop(self, *arguments: Any) -> None:
        self._countdown.around(self._index.drop, *arguments)

    def upsert(self, *arguments: Any) -> None:
        self._countdown.around(self._index.upsert, *arguments)

    def delete(self, *arguments: Any) -> None:
        self._countdown.around(self._index.delete, *arguments)


class CrashingRecords(Records):
    def __init__(self, path: Path, countdown: Countdown) -> None:
        super().__init__(path)
        self._countdown = countdown

    def _change(self, job: Job, worker: str, changes: str, *values: Any) -> None:
        if changes.startswith("done"):
            self._countdown.progress.append(values[0])
        self._countdown.around(super()._change, job, worker, changes, *values)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def runtime(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    off = {"collections": None, "collections_path": None, "reembed_worker": None}
    file = configured(tmp_path_factory.mktemp("models"), {"new": {}}, **off)
    runtime: Runtime = create_app(load_settings({"config": str(file)}), load=load).state.runtime
    yield runtime
    runtime.models.close(5)


async def attempt(runtime: Runtime, database: QdrantIndex, folder: Path, countdown: Countdown) -> bool:
    """Whether it came to its end. It is as if its process was killed, where it did not."""
    records = CrashingRecords(folder / "jobs.sqlite3", countdown)
    catalog = Catalog(folder / "catalog.sqlite3", exclusive=True)
    store = VectorStore(Collections(CrashingIndex(database, countdown), catalog), timeout=10)
    try:
        records.release(lambda job: False)
        for due in records.due():
            job = records.take(due.uuid, WORKER)
            assert job is not None
            parts = Parts(CollectionService(store, runtime.models, runtime.service, None), runtime.models, records)
            await Reembedding(parts, job, WORKER, Interruption()).run()
            records.finish(job, WORKER, "completed")
    except Crash:
        return False
    finally:
        records.close()
        store.close()
    return True


def documents() -> Sequence[EmbeddedDocument]:
    return [EmbeddedDocument(Document(id, text), vector(place)) for place, (id, text) in enumerate(TEXTS.items())]


def prepared(folder: Path, names: Sequence[str], **fields: Any) -> tuple[QdrantIndex, Job]:
    """Collections of all documents, and a job for them."""
    database = QdrantIndex(QdrantClient(":memory:"))
    catalog = Catalog(folder / "catalog.sqlite3", exclusive=True)
    collections = Collections(database, catalog)
    for name in names:
        collections.create(OWNER, name, MINI, {})
        collections.upsert(OWNER, name, MINI, documents())
    catalog.close()
    records = Records(folder / "jobs.sqlite3")
    job, _ = records.add(Order(OWNER, "new", "local", 50, **fields), names)
    records.close()
    return database, job


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("at", range(STEPS + 1))
def test_a_crash_at_any_step_is_made_good(
    runner: asyncio.Runner, runtime: Runtime, tmp_path: Path, at: int, before: bool
) -> None:
    database, job = prepared(tmp_path, ["notes"], collection="notes")

    assert runner.run(attempt(runtime, database, tmp_path, Countdown(at, before))) == (at == STEPS)
    assert runner.run(attempt(runtime, database, tmp_path, Countdown(1000, before)))

    records = Records(tmp_path / "jobs.sqlite3")
    ended = records.get(job.uuid)
    assert (ended.status, ended.done, ended.total) == ("completed", 5, 5)
    records.close()
    collections = Collections(database, Catalog(tmp_path / "catalog.sqlite3", exclusive=True))
    collections.clean_up(0)
    now = collections.get(OWNER, "notes")
    assert now.facts.model == "new" and now.current.number == 2 and now.filling is None
    assert database.indexes("") == [now.current.index]
    assert {each.id: each.text for each in collections.documents(OWNER, "notes", None, None, 100, 0)} == TEXTS
    for id, text in TEXTS.items():
        (hit,) = collections.query(OWNER, "notes", now.facts, vector_of("new", text), 1, None)
        assert hit.document.id == id and hit.score == pytest.approx(1, abs=1e-5)
    np.testing.assert_equal(collections.stats(OWNER, "notes").count, 5)
    collections.close()


def test_of_several_collections_those_that_are_done_count_from_the_beginning(
    runner: asyncio.Runner, runtime: Runtime, tmp_path: Path
) -> None:
    database, _ = prepared(tmp_path, ["letters", "notes"], media_id=1)
    first, second = Countdown(STEPS + 6, before=True), Countdown(1000, before=True)
    assert not runner.run(attempt(runtime, database, tmp_path, first))
    assert 5 < max(first.progress) < 10  # it was at the second one
    assert runner.run(attempt(runtime, database, tmp_path, second))
    assert [*first.progress, *second.progress] == sorted([*first.progress, *second.progress])
    records = Records(tmp_path / "jobs.sqlite3")
    assert records.totals().documents == 10
    records.close()
