"""Fewer vectors of a page."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file

from mlx_embeddings_backends.base import PatchGrid
from mlx_embeddings_server.pooling import Pool, pool_patches, pool_tokens
from tests.conftest import DATA

COLQWEN = DATA / "colqwen2_5"


def pages() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return load_file(COLQWEN / "expected.safetensors")


@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("name", ["image_0", "image_1", "page_resized", "query_1"])
def test_clusters_are_those_of_colpali_engine(name: str, factor: int) -> None:
    expected = load_file(COLQWEN / "pooled.safetensors")[f"{name}.factor_{factor}"]
    assert_allclose(pool_tokens(pages()[name], factor), expected, atol=1e-5)


def test_a_factor_of_one_and_a_single_vector_change_nothing() -> None:
    page = pages()["image_0"]
    assert pool_tokens(page, 1) is page
    assert len(pool_tokens(page[:1], 3)) == 1


@pytest.mark.parametrize(("pool", "pooled"), [("rows", (2, 1)), ("columns", (1, 3))])
def test_rows_and_columns_of_a_page_that_is_not_square(pool: Pool, pooled: tuple[int, int]) -> None:
    """Each patch points along an axis of its row's and one of its column's."""
    axes = np.eye(5, dtype=np.float32)
    patches = [axes[row] + axes[2 + column] for row in range(2) for column in range(3)]
    other_token = np.full((1, 5), 9, dtype=np.float32)
    page = np.concatenate([other_token, patches, other_token])
    vectors, grid = pool_patches(page, PatchGrid(rows=2, columns=3, offset=1), pool)
    assert grid == PatchGrid(*pooled, offset=0)
    one_row, one_column = [1, 0, 1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 1, 0, 0]
    first = np.array(one_row if pool == "rows" else one_column)
    assert len(vectors) == pooled[0] * pooled[1]
    assert_allclose(vectors[0], first / np.linalg.norm(first), rtol=1e-5)


def test_the_mean_of_all_patches() -> None:
    vectors = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    pooled, grid = pool_patches(vectors, PatchGrid(rows=3, columns=2, offset=1), "mean")
    mean = vectors[1:7].astype(np.float64).mean(axis=0)
    assert_allclose(pooled, [mean / np.linalg.norm(mean)], rtol=1e-5)
    assert grid == PatchGrid(1, 1, 0)
