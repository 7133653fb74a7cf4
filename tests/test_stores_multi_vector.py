"""Multi-vector models in Qdrant: two stages, and the scores of MaxSim over all vectors."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from mlx_embeddings_backends.base import PatchGrid
from mlx_embeddings_server.pooling import normalized
from mlx_embeddings_server.stores.base import Document, EmbeddedDocument, InvalidValue, Mismatch
from mlx_embeddings_server.stores.means import means_of
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.qdrant import CANDIDATES
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import DIMENSION, MINI, PAGES, re_embed, run

EXAMPLE = Path(__file__).parent.parent / "examples" / "colqwen2.5_qdrant.py"
GRID = PatchGrid(rows=3, columns=4, offset=2)  # with one vector behind


def vectors(number: int, amount: int) -> NDArray[np.float32]:
    """[amount, dimension], each of length 1."""
    made = np.random.default_rng(number).normal(size=(amount, DIMENSION)).astype(np.float32)
    return normalized(made)


def page(number: int) -> EmbeddedDocument:
    document = Document(f"page-{number}", None, f"https://example.com/{number}.png", {"number": number})
    return EmbeddedDocument(document, vectors(number, 15), GRID)


def passage(number: int) -> EmbeddedDocument:
    """A text, of more vectors than a page."""
    return EmbeddedDocument(Document(f"text-{number}", f"passage {number}"), vectors(10_000 + number, 90))


def max_sim(query: NDArray[np.float32], document: NDArray[np.float32]) -> float:
    return float((query @ document.T).max(axis=1).sum())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    with closing(open_store("qdrant", tmp_path_factory.mktemp("qdrant"))) as store:
        run(store.create("ada", "pages", PAGES))
        run(store.upsert("ada", "pages", PAGES, [*map(page, range(30)), *map(passage, range(3))]))
        yield store


def test_hits_are_in_the_order_and_with_the_scores_of_maxsim(store: VectorStore) -> None:
    documents = [*map(page, range(30)), *map(passage, range(3))]
    query = vectors(77, 6)
    wanted = {each.document.id: max_sim(query, each.vectors) for each in documents}
    hits = run(store.query("ada", "pages", PAGES, 3 * query, n_results=33))  # lengths do not count
    assert [hit.document.id for hit in hits] == sorted(wanted, key=lambda id: -wanted[id])
    assert_allclose([hit.score for hit in hits], sorted(wanted.values(), reverse=True), atol=1e-4)
    assert all(hit.distance is None for hit in hits)
    assert {hit.document.id: hit.document for hit in hits} == {each.document.id: each.document for each in documents}


def test_a_filter_holds_in_both_stages(store: VectorStore) -> None:
    query = vectors(77, 6)
    hits = run(store.query("ada", "pages", PAGES, query, where={"number": {"$gte": 27}}))
    wanted = sorted((27, 28, 29), key=lambda number: -max_sim(query, page(number).vectors))
    assert [hit.document.id for hit in hits] == [f"page-{number}" for number in wanted]


def test_only_candidates_of_the_means_are_compared_with_all_vectors(store: VectorStore) -> None:
    """With more pages than candidates, what the means leave out is found by no query: that is the price of speed."""
    run(store.create("ada", "crowd", PAGES))
    query = vectors(5, 2)
    means = np.tile(query, (6, 1))  # of its patches: in the direction of the query
    near = [
        EmbeddedDocument(Document(f"near-{n}", None, "https://example.com"), rows, PatchGrid(3, 4, 0))
        for n, rows in enumerate(
            normalized((means + vectors(1000 + n, 12) / 3).astype(np.float32)) for n in range(CANDIDATES + 5)
        )
    ]
    # One patch is the query itself, but its opposites in each row and column make the means point away.
    hidden = np.tile(-query[:1], (12, 1))
    hidden[0], hidden[5] = query[0], query[1]
    far = EmbeddedDocument(Document("hidden", None, "https://example.com"), hidden, PatchGrid(3, 4, 0))
    run(store.upsert("ada", "crowd", PAGES, [*near, far]))
    hits = run(store.query("ada", "crowd", PAGES, query, n_results=100))
    assert "hidden" not in [hit.document.id for hit in hits]
    assert max_sim(query, hidden) > hits[0].score
    assert len(run(store.query("ada", "crowd", PAGES, query, n_results=1000))) == CANDIDATES + 6


def test_the_means_are_the_examples(store: VectorStore) -> None:
    example = load_example()
    embedding = example.Embedding(vectors(3, 15), example.Grid(GRID.rows, GRID.columns, GRID.offset))
    wanted = example.with_means(embedding)
    made = means_of(vectors(3, 15), GRID)
    assert made.keys() == {"rows", "columns"}
    for name, rows in made.items():
        assert_allclose(rows, wanted[name], atol=1e-6)
    assert [len(rows) for rows in made.values()] == [2 + 3 + 1, 2 + 4 + 1]


def test_a_text_stands_for_itself_until_it_has_many_vectors() -> None:
    few = vectors(1, 64)
    assert means_of(few, None)["rows"] is few
    assert means_of(vectors(1, 500), None)["rows"].shape[0] <= 64


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (vectors(1, 15)[0], Mismatch),
        (vectors(1, 15)[:, :4], Mismatch),
        (np.zeros((0, DIMENSION), np.float32), Mismatch),
        (np.zeros((15, DIMENSION), np.float32), InvalidValue),
        (vectors(1, 13), InvalidValue),
    ],
)
def test_vectors_that_are_none_of_a_page_are_refused(
    store: VectorStore, wrong: NDArray[np.float32], error: type[Exception]
) -> None:
    with pytest.raises(error):
        run(store.upsert("ada", "pages", PAGES, [replace(page(1), vectors=wrong)]))
    if wrong.shape != (13, DIMENSION):
        with pytest.raises(error):
            run(store.query("ada", "pages", PAGES, wrong))


def test_dense_and_multi_vector_collections_live_in_one_store(store: VectorStore) -> None:
    run(store.create("ada", "dense", MINI))
    with pytest.raises(Mismatch, match="output"):
        run(store.upsert("ada", "dense", PAGES, [page(1)]))
    with pytest.raises(Mismatch, match="output"):
        run(store.query("ada", "pages", MINI, vectors(1, 1)[0]))


def test_a_dense_collection_is_re_embedded_with_a_multi_vector_model_and_back(store: VectorStore) -> None:
    run(store.create("ada", "changing", PAGES))
    run(store.upsert("ada", "changing", PAGES, [page(1), passage(1)]))
    run(re_embed(store, "ada", "changing", MINI))
    found = run(store.documents("ada", "changing"))
    assert sorted(each.id for each in found) == ["page-1", "text-1"]
    assert {each.image for each in found} == {None, "https://example.com/1.png"}


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("colqwen_qdrant_example_means", EXAMPLE)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module
