"""Fewer vectors of a page: means over its patch grid, and hierarchical clusters of its tokens."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import PatchGrid

Pool = Literal["rows", "columns", "mean"]
Vectors = NDArray[np.float32]  # [vectors, dimensions], of one input


def pool_patches(vectors: Vectors, grid: PatchGrid, pool: Pool) -> tuple[Vectors, PatchGrid]:
    """Means of an image's patch vectors, of length 1: one a row of patches, one a column, or one of all.

    The vectors of other tokens are left out. The grid is that of the result.
    """
    patches = vectors[grid.offset : grid.offset + grid.rows * grid.columns]
    patches = patches.reshape(grid.rows, grid.columns, -1)  # [rows, columns, dimensions]
    match pool:
        case "rows":
            return normalized(patches.mean(axis=1)), PatchGrid(grid.rows, 1, 0)
        case "columns":
            return normalized(patches.mean(axis=0)), PatchGrid(1, grid.columns, 0)
        case "mean":
            return normalized(patches.mean(axis=(0, 1))[np.newaxis]), PatchGrid(1, 1, 0)


def pool_tokens(vectors: Vectors, factor: int) -> Vectors:
    """The means of clusters of vectors, of length 1: at most len(vectors) / factor of them.

    Ward clusters of the rows of the matrix of cosine distances, as colpali-engine's HierarchicalTokenPooler makes them
    (https://arxiv.org/abs/2409.14683). `vectors` are of length 1.
    """
    if factor == 1 or len(vectors) == 1:
        return vectors
    from scipy.cluster.hierarchy import fcluster, linkage  # a quarter of the time to import all else of the server

    distances = 1 - vectors @ vectors.T
    tree = linkage(distances, metric="euclidean", method="ward")
    labels = fcluster(tree, t=max(len(vectors) // factor, 1), criterion="maxclust")
    means = [vectors[labels == label].mean(axis=0) for label in np.unique(labels)]
    return normalized(np.stack(means).astype(np.float32))


def normalized(rows: Vectors) -> Vectors:
    """Each row with length 1; a row of zeros stays one, as with torch.nn.functional.normalize."""
    lengths: Vectors = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows / lengths
