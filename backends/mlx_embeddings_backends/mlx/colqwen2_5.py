"""ColQwen2.5 on MLX: pages and queries to one vector a token, for late interaction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import LoadOptions, Prepared
from mlx_embeddings_backends.colqwen import lora
from mlx_embeddings_backends.colqwen.backend import ColQwenBackend
from mlx_embeddings_backends.colqwen.batch import ColQwenBatch
from mlx_embeddings_backends.colqwen.checkpoint import VisionConfig, canonical_name, canonical_names, read_config
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.files import read_object
from mlx_embeddings_backends.mlx.device import (
    choose_device,
    device_errors,
    fill,
    memory_bytes,
    read_tensors,
    read_weights,
    use_device,
)
from mlx_embeddings_backends.mlx.qwen2_5_vl import ColQwen

# Two pages, or sixty queries. Its three billion weights are read once for so many rows that arithmetic takes all the
# time: a larger batch is no faster a token, and a query that comes behind it waits longer.
BATCH_TOKENS: Final = 2048

PATCH_EMBEDDING: Final = "visual.patch_embed.proj.weight"


class MlxColQwen2_5(ColQwenBackend):
    """Imports nothing but MLX."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        use_device(device)
        whole = options.base or folder
        config = read_config(whole)
        super().__init__(folder, options, config)
        weights = _read(whole, config.vision)
        if options.base is not None:
            _merge_adapter(weights, folder)
        self._model = ColQwen(config)
        dtype = fill(self._model, weights, options.dtype, _quantization(whole))
        self.info = self._describe("mlx", device, dtype, BATCH_TOKENS, memory_bytes(self._model))

    def collate(self, batch: Sequence[Prepared]) -> ColQwenBatch:
        return self._processor.collate(batch)

    def run(self, batch: ColQwenBatch) -> list[NDArray[np.float32]]:
        """[tokens, dimensions] of each item: every real token's vector, the prompt's too, before normalisation."""
        with device_errors():
            rows = np.array(self._model(batch).astype(mx.float32))  # [batch, tokens, dimensions]
        return [row[:length] for row, length in zip(rows, batch.lengths.tolist(), strict=True)]


def _read(folder: Path, vision: VisionConfig) -> dict[str, mx.array]:
    """The weights by canonical name, the patch embedding's as a matrix."""
    found = read_weights(folder)
    weights = {known: found[name] for name, known in canonical_names(found).items()}
    if PATCH_EMBEDDING in weights:
        weights[PATCH_EMBEDDING] = _as_matrix(weights[PATCH_EMBEDDING], vision)
    return weights


def _as_matrix(kernel: mx.array, vision: VisionConfig) -> mx.array:
    """torch's kernel [dim, 3, frames, size, size], or MLX's [dim, frames, size, size, 3] -> [dim, patch_dim]."""
    inner = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    if kernel.shape[1:] == (*inner, 3):
        kernel = kernel.transpose(0, 4, 1, 2, 3)
    if kernel.shape[1:] != (3, *inner):
        raise ModelError(f"{PATCH_EMBEDDING} is {list(kernel.shape)}, which does not fit config.json")
    return kernel.reshape(-1, vision.patch_dim)


def _merge_adapter(weights: dict[str, mx.array], folder: Path) -> None:
    """Add the adapter's low-rank updates in float32, and go back to the base's dtype."""
    plan = lora.read(folder)
    dtype = next((weight.dtype for weight in weights.values() if mx.issubdtype(weight.dtype, mx.floating)), mx.float32)
    lora.merge(
        weights,
        read_tensors(plan.file),
        plan,
        widen=lambda array: array.astype(mx.float32),
        narrow=lambda merged: merged.astype(dtype),
    )


def _quantization(folder: Path) -> Mapping[str, Any] | None:
    """What config.json says of it, the paths of single layers made canonical."""
    config = read_object(folder / "config.json")
    found = config.get("quantization")
    if not isinstance(found, dict):
        return None
    return {_canonical_path(key) if isinstance(value, dict | bool) else key: value for key, value in found.items()}


def _canonical_path(path: str) -> str:
    return (canonical_name(f"{path}.weight") or path).removesuffix(".weight")
