"""Prepared items joined into arrays: what depends on sizes is worked out here, and the device never asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.colqwen.checkpoint import VisionConfig
from mlx_embeddings_backends.colqwen.images import ImageSettings

Ints = NDArray[np.int64]

ROUND_TO = 8  # padded lengths are multiples of it: few shapes, for kernels made for each


@dataclass(frozen=True, slots=True)
class ColQwenInput:
    """One item, prepared. Of a text, only `ids` is set."""

    ids: Ints  # [tokens]
    pixels: NDArray[np.uint8] | None = None  # [height, width, 3], resized
    grid: tuple[int, int] = (0, 0)  # rows and columns of patches, before merging
    offset: int = 0  # place of the first image token


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """The images of a batch, laid end to end. Patches are in transformers' order: see `ImageSettings.patches`.

    `window_index` puts the merged patches into the order in which windows lie end to end; `window_lengths` has the
    patches of each window. No window holds patches of two images.
    """

    patches: NDArray[np.float32]  # [patches, patch_dim]
    grids: Ints  # [images, 3]: 1, rows and columns of patches, as transformers' `image_grid_thw`
    positions: Ints  # [patches, 2]: row and column of each patch in its image
    window_index: Ints  # [merged patches]
    window_lengths: Ints  # [windows]
    token_places: Ints  # [merged patches]: of each image token in the flattened [batch x tokens]

    @property
    def lengths(self) -> Ints:
        """Patches of each image, [images]."""
        lengths: Ints = self.grids.prod(axis=1)
        return lengths


@dataclass(frozen=True, slots=True)
class ColQwenBatch:
    """Padded on the right; a causal mask then hides the padding from every real token."""

    ids: Ints  # [batch, tokens]
    positions: Ints  # [3, batch, tokens], M-RoPE's: time, row and column
    lengths: Ints  # [batch], real tokens
    images: ImageBatch | None


def collate(
    items: Sequence[ColQwenInput], *, settings: ImageSettings, vision: VisionConfig, pad_token_id: int
) -> ColQwenBatch:
    lengths = np.array([len(item.ids) for item in items], dtype=np.int64)
    longest = -(-int(lengths.max()) // ROUND_TO) * ROUND_TO
    ids = np.full((len(items), longest), pad_token_id, dtype=np.int64)
    positions = np.zeros((3, len(items), longest), dtype=np.int64)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = item.ids
        positions[:, row, : len(item.ids)] = text_positions(item, vision.spatial_merge_size)
    return ColQwenBatch(ids, positions, lengths, _images(items, longest, settings, vision))


def text_positions(item: ColQwenInput, merge: int) -> Ints:
    """M-RoPE positions of one item, [3, tokens] (Qwen2-VL, arXiv:2409.12191, section 2.1).

    An image's tokens share one time, and count rows and columns from it; text goes on behind the larger of the two.
    """
    if item.pixels is None:
        return np.broadcast_to(np.arange(len(item.ids)), (3, len(item.ids)))
    rows, columns = item.grid[0] // merge, item.grid[1] // merge
    image = item.offset + np.stack([np.zeros(rows * columns, dtype=np.int64), *_places(rows, columns)])
    behind = np.arange(len(item.ids) - item.offset - rows * columns) + item.offset + max(rows, columns)
    before = np.arange(item.offset)
    return np.concatenate([np.tile(before, (3, 1)), image, np.tile(behind, (3, 1))], axis=1)


def window_order(rows: int, columns: int, side: int) -> tuple[Ints, Ints]:
    """Merged patches of one image, window by window: their places [rows x columns], and each window's number of them.

    Windows of `side` x `side` are laid from the top left; those at the right and lower edge are smaller.
    """
    row, column = _places(rows, columns)
    window = row // side * -(-columns // side) + column // side
    return np.argsort(window, kind="stable"), np.bincount(window)


def _images(
    items: Sequence[ColQwenInput], longest: int, settings: ImageSettings, vision: VisionConfig
) -> ImageBatch | None:
    merge = vision.spatial_merge_size
    side = vision.window_size // vision.patch_size // merge
    patches, grids, positions, orders, windows, places = [], [], [], [], [], []
    merged = 0
    for row, item in enumerate(items):
        if item.pixels is None:
            continue
        rows, columns = item.grid[0] // merge, item.grid[1] // merge
        order, lengths = window_order(rows, columns, side)
        patches.append(settings.patches(item.pixels))
        grids.append((1, *item.grid))
        positions.append(_patch_positions(rows, columns, merge))
        orders.append(order + merged)
        windows.append(lengths * merge**2)
        places.append(row * longest + item.offset + np.arange(rows * columns))
        merged += rows * columns
    if not patches:
        return None
    return ImageBatch(
        patches=np.concatenate(patches),
        grids=np.array(grids, dtype=np.int64),
        positions=np.concatenate(positions),
        window_index=np.concatenate(orders),
        window_lengths=np.concatenate(windows),
        token_places=np.concatenate(places),
    )


def _patch_positions(rows: int, columns: int, merge: int) -> Ints:
    """Row and column of each patch, in the order of `ImageSettings.patches`: [patches, 2]."""
    grid = np.stack(_places(rows * merge, columns * merge), axis=1)
    return grid.reshape(rows, merge, columns, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def _places(rows: int, columns: int) -> tuple[Ints, Ints]:
    """The row and the column of each place of a grid, read row by row."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row, column
