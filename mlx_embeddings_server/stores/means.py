"""Few vectors that stand for a page's many: what finds candidates before all of them are compared."""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import PatchGrid
from mlx_embeddings_server.pooling import pool_patches, pool_tokens

# Of a text's vectors: as many as a page has rows and columns of patches.
_MOST_OF_TEXT = 64


def means_of(vectors: NDArray[np.float32], grid: PatchGrid | None) -> dict[str, NDArray[np.float32]]:
    """By `rows` and `columns`: the patches' means along them, with the few vectors around the patches as they are.

    As in https://qdrant.tech/documentation/tutorials-search-engineering/pdf-retrieval-at-scale/. What is no image has
    `rows` only: its vectors, clustered where they are many. `vectors` [vectors, dimension] are of length 1.
    """
    if grid is None:
        return {"rows": pool_tokens(vectors, ceil(len(vectors) / _MOST_OF_TEXT))}
    start, end = grid.offset, grid.offset + grid.rows * grid.columns
    around = vectors[:start], vectors[end:]
    return {
        "rows": np.concatenate([around[0], pool_patches(vectors, grid, "rows")[0], around[1]]),
        "columns": np.concatenate([around[0], pool_patches(vectors, grid, "columns")[0], around[1]]),
    }
