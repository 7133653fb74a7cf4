"""Pixels as Qwen2-VL's image processor makes them: a size that whole patches fill, normalised, patch by patch."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.colqwen.checkpoint import Json, VisionConfig
from mlx_embeddings_backends.errors import InvalidImage, UnsupportedModel
from mlx_embeddings_backends.files import read_object

log = logging.getLogger(__name__)

MOST_PIXELS: Final = 100_000_000  # of a resized image, that a checkpoint may ask for
LARGEST_RATIO: Final = 200  # of an image's sides
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
CLASS_SIZE: Final[Json] = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # where a file gives no size
COLQWEN_SIZE: Final[Json] = {"shortest_edge": 4 * 28 * 28, "longest_edge": 768 * 28 * 28}  # where there is no file


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What becomes of an image before the vision tower. Pixels are counted on the resized image."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    levels: NDArray[np.float32]  # [3, 256], what each level of red, green and blue is normalised to

    def smart_resize(self, height: int, width: int) -> tuple[int, int]:
        """The size near to this one, (height, width), of whole merged patches and within the limits of pixels.

        As in transformers' `qwen2_vl.image_processing_qwen2_vl`. Raises `InvalidImage` for a mere strip.
        """
        if max(height, width) > LARGEST_RATIO * min(height, width):
            raise InvalidImage(0, f"the image is {width} x {height}: one side may be {LARGEST_RATIO} times the other")
        unit = self.patch_size * self.merge_size
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows = max(1, math.floor(height / scale / unit))
            columns = max(1, math.floor(width / scale / unit))
        elif rows * columns * unit**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * scale / unit), math.ceil(width * scale / unit)
        return rows * unit, columns * unit

    def patches(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[height, width, 3] -> [patches, 3 x frames x patch_size x patch_size], the patches that are merged together.

        Blocks of merge_size x merge_size patches stand row by row, and so do the patches within each.
        """
        size, merge, frames = self.patch_size, self.merge_size, self.temporal_patch_size
        rows, columns = pixels.shape[0] // (size * merge), pixels.shape[1] // (size * merge)
        blocks = pixels.reshape(rows, merge, size, columns, merge, size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        patches = np.empty((*blocks.shape[:5], frames, size, size), dtype=np.float32)
        for channel, level in enumerate(self.levels):
            patches[:, :, :, :, channel] = level[blocks[:, :, :, :, channel]][:, :, :, :, None]
        return patches.reshape(rows * columns * merge**2, -1)


def read_settings(
    folder: Path, base: Path | None, vision: VisionConfig, *, max_image_tokens: int | None
) -> ImageSettings:
    """From the image processor's file in `folder`, else in `base`. Raises `UnsupportedModel`."""
    found = _find(folder) or (_find(base) if base is not None else None)
    if found is None:
        log.warning(
            "the checkpoint has no preprocessor_config.json: images are prepared as ColQwen2.5's own are, "
            "at most %d pixels and normalised as CLIP's",
            COLQWEN_SIZE["longest_edge"],
        )
    keys = {"size": COLQWEN_SIZE} if found is None else found
    for key, known in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if keys.get(key) not in (None, known):
            raise _wrong(key, keys[key])
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    for key, known in {**sizes, "merge_size": vision.spatial_merge_size}.items():
        if keys.get(key, known) != known:
            raise UnsupportedModel(f"preprocessor_config.json: {key} is {keys[key]!r}, and {known} in config.json")
    min_pixels, max_pixels = _pixel_limits(keys)
    if max_image_tokens is not None:
        max_pixels = min(max_pixels, max_image_tokens * (vision.patch_size * vision.spatial_merge_size) ** 2)
    return ImageSettings(
        min_pixels=min(min_pixels, max_pixels),
        max_pixels=max_pixels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        levels=_levels(keys),
    )


def _find(folder: Path) -> Json | None:
    """preprocessor_config.json, or what transformers 5 writes in its place."""
    if (folder / "preprocessor_config.json").exists():
        return read_object(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():
        inner = read_object(folder / "processor_config.json").get("image_processor")
        return inner if isinstance(inner, dict) else None
    return None


def _pixel_limits(keys: Json) -> tuple[int, int]:
    size = keys.get("size") or {}
    if not isinstance(size, dict):
        raise _wrong("size", size)
    limits = []
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = keys.get(key) or size.get(edge) or CLASS_SIZE[edge]
        if not isinstance(value, int) or not 0 < value <= MOST_PIXELS:
            raise _wrong(key, value)
        limits.append(value)
    low, high = limits
    if low > high:
        raise _wrong("min_pixels", low)
    return low, high


def _levels(keys: Json) -> NDArray[np.float32]:
    """Every level of a channel, rescaled and normalised in float32, as transformers does it: [3, 256]."""
    scale = _numbers([keys.get("rescale_factor") or 1 / 255], "rescale_factor", 1)
    mean = _numbers(keys.get("image_mean") or list(CLIP_MEAN), "image_mean", 3)
    std = _numbers(keys.get("image_std") or list(CLIP_STD), "image_std", 3)
    if not (std > 0).all():
        raise _wrong("image_std", std.tolist())
    rescaled = (np.arange(256) * scale.astype(np.float64)).astype(np.float32)
    return (rescaled - mean[:, None]) / std[:, None]


def _numbers(value: Any, key: str, count: int) -> NDArray[np.float32]:
    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(isinstance(each, int | float) and abs(each) < 1e6 for each in value):
        raise _wrong(key, value)
    return np.array(value, dtype=np.float32)


def _wrong(key: str, value: Any) -> UnsupportedModel:
    return UnsupportedModel(f"preprocessor_config.json: {key} is {value!r:.80}, which is not known here")
