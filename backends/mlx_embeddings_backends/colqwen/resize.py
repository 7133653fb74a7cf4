"""Bicubic resizing that gives what torchvision gives, without torch: the model was trained on images made by it.

torchvision's kernel for bytes (torch, aten/src/ATen/native/cpu/UpSampleKernel.cpp) takes antialiased weights as 16-bit
fixed-point numbers, and rounds to bytes between the two directions. Pillow's are finer: one byte in 200 differs by one.
Sums are taken in float32, which holds them exactly until an image shrinks to less than a quarter of its width; of such
ones a byte in 10,000 may differ by one.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLOCK: Final = 32  # outputs that share one product: their inputs overlap, and few are taken in vain
ROWS: Final = 256  # that are worked on at once, so that they stay in a core's cache

Floats = NDArray[np.float32]


def resize_bicubic(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB -> [height, width, 3] of `size`, which is (height, width)."""
    pixels = np.asarray(image, dtype=np.uint8)
    height, width = size
    wide = np.empty((3, pixels.shape[0], width), dtype=np.float32)
    for top in range(0, pixels.shape[0], ROWS):
        rows = pixels[top : top + ROWS].astype(np.float32)
        for channel in range(3):
            _along_rows(np.ascontiguousarray(rows[:, :, channel]), wide[channel, top : top + ROWS])
    resized = np.empty((height, width, 3), dtype=np.uint8)
    for channel in range(3):
        resized[:, :, channel] = _along_rows(wide[channel].T, np.empty((width, height), dtype=np.float32)).T
    return resized


def _along_rows(rows: Floats, out: Floats) -> Floats:
    """[rows, length] of bytes -> `out`, [rows, other length]."""
    if rows.shape == out.shape:
        out[:] = rows
        return out
    blocks, precision = _blocks(rows.shape[1], out.shape[1])
    for start, first, weights in blocks:
        np.matmul(rows[:, first : first + len(weights)], weights, out=out[:, start : start + weights.shape[1]])
    out *= np.float32(0.5**precision)
    out += np.float32(0.5)
    np.floor(out, out=out)
    return np.clip(out, 0, 255, out=out)


@lru_cache(maxsize=32)
def _blocks(length: int, resized: int) -> tuple[list[tuple[int, int, Floats]], int]:
    """For `BLOCK` outputs each: the first of them, the first input, weights [inputs, outputs]; and bits of fraction."""
    first, weights, precision = _weights(length, resized)
    blocks = []
    for start in range(0, resized, BLOCK):
        rows = weights[start : start + BLOCK]
        offsets = first[start : start + BLOCK] - first[start]
        dense = np.zeros((offsets[-1] + weights.shape[1], len(rows)), dtype=np.float32)
        taps = offsets[:, None] + np.arange(weights.shape[1])
        dense[taps, np.arange(len(rows))[:, None]] = rows
        blocks.append((start, int(first[start]), dense[: length - first[start]]))
    return blocks, precision


def _weights(length: int, resized: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The first input of each output, the weights of those that follow [resized, taps], and their bits of fraction."""
    scale = length / resized
    stretch = max(scale, 1.0)
    centres = scale * (np.arange(resized) + 0.5)
    first = np.maximum((centres - 2 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centres + 2 * stretch + 0.5).astype(np.int64), length)
    taps = first[:, None] + np.arange((end - first).max())
    weights = _cubic(np.abs(taps - centres[:, None] + 0.5) / stretch)
    weights[taps >= end[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    # As many bits as leave the largest weight within 16.
    precision = next(bits for bits in range(23) if bits == 22 or int(0.5 + weights.max() * 2 ** (bits + 1)) >= 2**15)
    return first, np.trunc(weights * 2**precision + np.copysign(0.5, weights)).astype(np.int64), precision


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
