"""What is stored is found, whatever was replaced or deleted before."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from mlx_embeddings_server.stores.base import Document, EmbeddedDocument
from mlx_embeddings_server.stores.chroma import ChromaIndex, open_chroma
from mlx_embeddings_server.stores.filters import parse_where
from mlx_embeddings_server.stores.vector_table import VectorTable, VectorTables
from tests.stores import DIMENSION, KINDS, MINI, opened, run, text, vector

Vectors = Mapping[str, NDArray[np.float32]]


@pytest.mark.parametrize("kind", KINDS)
def test_new_documents_are_found_that_came_with_known_ones(kind: str, tmp_path: Path) -> None:
    """Chroma's graph loses some of them where it is given both at once."""
    with opened(kind, tmp_path) as store:
        run(store.create("ada", "notes", MINI))
        for number in range(10, 60):
            run(store.upsert("ada", "notes", MINI, [text(number), text(number % 7)]))
            hits = run(store.query("ada", "notes", MINI, vector(number), n_results=1))
            assert [hit.document.id for hit in hits] == [f"id-{number}"]
        for number in (*range(7), *range(10, 60)):
            hits = run(store.query("ada", "notes", MINI, vector(number), n_results=1))
            assert [hit.document.id for hit in hits] == [f"id-{number}"]
        assert len(run(store.query("ada", "notes", MINI, vector(0), n_results=1000))) == 57


@pytest.mark.parametrize(("seed", "writes"), [(224, 68), (330, 77), (445, 67)])
def test_the_embedded_chroma_finds_what_its_graph_has_lost(seed: int, writes: int, tmp_path: Path) -> None:
    """Histories after which one or two documents are found by no search of Chroma 1.5.9."""
    random = np.random.default_rng(seed)
    there: set[str] = set()
    with closing(open_chroma(None, tmp_path, None, 30)) as index:
        index.create("notes", MINI, {"a": "b"})
        for _ in range(writes):
            there.add(id := str(random.integers(44)))
            row = random.normal(size=DIMENSION) / np.sqrt(1 + np.arange(DIMENSION)) + (random.integers(4) == 0) * 3
            index.upsert("notes", MINI, [document(id, row.astype(np.float32))])
        assert {id for id, _ in index.query("notes", MINI, vector(1), 44, None)} == there


@pytest.mark.parametrize("seed", range(2))
def test_the_embedded_chroma_compares_all_documents(seed: int, tmp_path: Path) -> None:
    """Some hundred, most of them replaced and many deleted, with restarts between."""
    random = np.random.default_rng(seed)
    there: dict[str, NDArray[np.float32]] = {}
    for _ in range(3):
        with closing(open_chroma(None, tmp_path, None, 30)) as index:
            index.create("notes", MINI, {"a": "b"})
            for _ in range(25):
                written = random.choice(300, size=random.integers(1, 30), replace=False)
                new = random.normal(size=(len(written), DIMENSION)).astype(np.float32)
                there |= (some := {str(number): row for number, row in zip(written, new, strict=True)})
                index.upsert("notes", MINI, [document(id, row) for id, row in some.items()])
                gone = random.choice(list(there), size=len(there) // 20 + 1, replace=False).tolist()
                index.delete("notes", gone)
                for id in gone:
                    del there[id]
                check(index, there, random.normal(size=DIMENSION).astype(np.float32))
    assert len(there) > 100


def test_an_index_that_grows_too_large_to_compare_all_is_searched_by_the_graph(tmp_path: Path) -> None:
    there: dict[str, NDArray[np.float32]] = {}
    with closing(open_chroma(None, tmp_path, None, 30, table_bytes=40 * DIMENSION * 4)) as index:
        index.create("notes", MINI, {"a": "b"})
        for number in range(80):
            there[str(number)] = vector(number)
            index.upsert("notes", MINI, [document(str(number), vector(number))])
            check(index, there, vector(1000 + number))
        for number in range(60):
            del there[str(number)]
            index.delete("notes", [str(number)])
            check(index, there, vector(1000 + number))


def document(id: str, row: NDArray[np.float32]) -> EmbeddedDocument:
    return EmbeddedDocument(Document(id, id, None, {"odd": int(id) % 2 == 1}), row)


def check(index: ChromaIndex, there: Vectors, query: NDArray[np.float32]) -> None:
    for where in (None, {"odd": True}):
        wanted = nearest({id: row for id, row in there.items() if where is None or int(id) % 2}, query)[:10]
        hits = index.query("notes", MINI, query, 10, parse_where(where) if where else None)
        assert [id for id, _ in hits] == [id for id, _ in wanted]
        assert_allclose([score for _, score in hits], [score for _, score in wanted], atol=1e-5)


def nearest(vectors: Vectors, query: NDArray[np.float32]) -> list[tuple[str, float]]:
    cosines = {id: row @ query / np.linalg.norm(row) / np.linalg.norm(query) for id, row in vectors.items()}
    return sorted(cosines.items(), key=lambda each: -each[1])


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True)), max_size=30),
    st.integers(1, 40),
)
@settings(deadline=None)
def test_a_table_has_what_was_put_into_it(changes: list[tuple[bool, list[int]]], limit: int) -> None:
    table = VectorTable(DIMENSION)
    there: dict[str, NDArray[np.float32]] = {}
    for turn, (is_put, numbers) in enumerate(changes):
        ids = [str(number) for number in numbers]
        if is_put:
            vectors = np.stack([vector(100 * number + turn) * (turn + 1) for number in numbers])
            table.put(ids, vectors)
            there |= dict(zip(ids, vectors, strict=True))
        else:
            table.remove(ids)
            for id in ids:
                there.pop(id, None)
    query = vector(9999)
    wanted = nearest(there, query)
    found = table.nearest(query, limit)
    assert [id for id, _ in found] == [id for id, _ in wanted[:limit]]
    assert_allclose([score for _, score in found], [score for _, score in wanted[:limit]], atol=1e-5)
    few = ["3", "unknown", "17", "4"]
    assert [id for id, _ in table.nearest(query, limit, few)] == [id for id, _ in wanted if id in few][:limit]


def test_tables_of_more_than_the_memory_for_all_leave_the_last_ones() -> None:
    tables = VectorTables()
    one = np.ones((15 * 1024, 1024), np.float32)  # 60 MiB
    for number in range(6):
        table = VectorTable(1024)
        table.put([str(row) for row in range(len(one))], one)
        tables.add(f"index-{number}", table)
    assert [tables.find(f"index-{number}") is not None for number in range(6)] == [False, False, True, True, True, True]
    tables.put("index-5", [f"new-{row}" for row in range(2000)], one[:2000])  # too large now
    assert tables.find("index-5") is None and tables.is_too_large("index-5")
    tables.remove("index-5", ["0"])
    assert not tables.is_too_large("index-5")  # who knows: it is counted anew
