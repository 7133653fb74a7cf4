"""What callers do at once to one collection ends as if one had come after the other."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from mlx_embeddings_server.stores.base import CollectionNotFound
from mlx_embeddings_server.stores.catalog import Catalog
from mlx_embeddings_server.stores.collections import Collections
from mlx_embeddings_server.stores.filters import Where
from mlx_embeddings_server.stores.qdrant import QdrantIndex
from tests.stores import MINI, OTHER, again, text


class CallingBack(QdrantIndex):
    """Qdrant in memory; something else happens after each look for ids."""

    def __init__(self) -> None:
        super().__init__(QdrantClient(":memory:"))
        self.meanwhile: Callable[[], object] = lambda: None
        self.seems_empty = False  # an index that is dropped, as Chroma's for a while

    def ids(self, index: str, where: Where | None = None, limit: int | None = None, offset: int = 0) -> list[str]:
        found = super().ids(index, where, limit, offset)
        self.meanwhile()
        return found

    def drop(self, index: str) -> None:
        if not self.seems_empty:
            super().drop(index)
        else:
            self.delete(index, super().ids(index))


@pytest.fixture
def collections(tmp_path: Path) -> Iterator[Collections]:
    with closing(Collections(CallingBack(), Catalog(tmp_path / "catalog.sqlite3", exclusive=True))) as collections:
        yield collections


def test_a_document_that_is_written_while_its_filter_is_deleted_is_not_lost(collections: Collections) -> None:
    collections.create("ada", "notes", MINI, {})
    collections.upsert("ada", "notes", MINI, [text(1, metadata={"draft": True}), text(2, metadata={"draft": True})])
    final = text(1, metadata={"draft": False})
    writing = threading.Thread(target=lambda: collections.upsert("ada", "notes", MINI, [final]))

    def write() -> None:
        writing.start()
        writing.join(0.5)

    index = collections.index
    assert isinstance(index, CallingBack)
    index.meanwhile = write
    collections.delete_documents("ada", "notes", None, {"draft": True})
    index.meanwhile = lambda: None
    writing.join()
    assert collections.documents("ada", "notes", None, None, 10, 0) == [final.document]


def test_documents_read_while_their_index_is_dropped_are_those_of_the_next_one(collections: Collections) -> None:
    collections.create("ada", "notes", MINI, {})
    collections.upsert("ada", "notes", MINI, [text(1)])
    version = collections.begin_version("ada", "notes", OTHER)
    waiting = collections.waiting("ada", "notes", version)
    collections.fill(version, waiting, again([text(1).document], OTHER))
    index = collections.index
    assert isinstance(index, CallingBack)

    def switch() -> None:
        index.meanwhile, index.seems_empty = lambda: None, True
        assert collections.switch("ada", "notes", version)

    index.meanwhile = switch
    assert collections.documents("ada", "notes", None, None, 10, 0) == [text(1).document]


def test_a_creation_is_answered_with_its_collection_whoever_deletes_it_at_once(collections: Collections) -> None:
    made: list[str] = []

    def delete() -> None:
        while len(made) < 50:
            try:
                collections.delete("ada", "notes")
            except CollectionNotFound:
                continue

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        while len(made) < 50:
            found = collections.create("ada", "notes", MINI, {"number": len(made)})
            assert found.metadata == {"number": len(made)}
            while collections.catalog.find("ada", "notes"):
                assert deleting.is_alive()
            made.append(found.name)
    finally:
        made += [""] * 50
        deleting.join()
