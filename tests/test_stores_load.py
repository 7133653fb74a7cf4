"""Large writes and large documents leave time and memory to others."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from mlx_embeddings_server.stores.base import PARTS, Document, Excerpt, InvalidValue, Part
from mlx_embeddings_server.stores.catalog import Catalog
from mlx_embeddings_server.stores.collections import Collections
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.qdrant import QdrantIndex
from tests.stores import MINI, run, text


def test_a_large_write_inside_the_process_lets_others_run(tmp_path: Path) -> None:
    """Chroma holds Python's lock while it writes."""

    async def longest_pause(store_done: asyncio.Task[None]) -> float:
        longest = 0.0
        while not store_done.done():
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)
        return longest

    async def write() -> tuple[float, float]:
        documents = [text(number, words=f"some words {number} " * 70) for number in range(1500)]
        began = time.monotonic()
        writing = asyncio.ensure_future(store.upsert("ada", "notes", MINI, documents))
        longest = await longest_pause(writing)
        return longest, time.monotonic() - began

    with closing(open_store("chroma", tmp_path)) as store:
        run(store.create("ada", "notes", MINI))
        longest, all_of_it = run(write())
    assert longest < all_of_it / 2


class Recording(QdrantIndex):
    """Qdrant in memory; how many documents are read at once."""

    def __init__(self) -> None:
        super().__init__(QdrantClient(":memory:"))
        self.read: list[int] = []

    def fetch(self, index: str, ids: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Document]:
        self.read.append(len(ids))
        return super().fetch(index, ids, parts)


@pytest.mark.parametrize(
    ("megabytes", "read"), [(3, [4, 2, 2, 2]), (9, [4, 1, 1, 1, 1, 1, 1])], ids=["large ones", "larger ones"]
)
def test_large_documents_are_read_a_few_at_a_time(megabytes: int, read: list[int], tmp_path: Path) -> None:
    index = Recording()
    with closing(Collections(index, Catalog(tmp_path / "catalog.sqlite3", exclusive=True))) as collections:
        collections.create("ada", "notes", MINI, {})
        large = [text(number, words="x" * (megabytes * 1_000_000)) for number in range(10)]
        collections.upsert("ada", "notes", MINI, large)
        index.read.clear()
        assert len(collections.documents("ada", "notes", None, None, 10, 0)) == 10
        assert index.read == read
        index.read.clear()
        with pytest.raises(InvalidValue, match="ask for fewer"):
            collections.documents("ada", "notes", None, None, 10, 0, Excerpt(most_bytes=1_000_000))
        assert index.read == read[:1]
