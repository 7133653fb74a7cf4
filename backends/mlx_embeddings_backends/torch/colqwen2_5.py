"""ColQwen2.5 on torch: pages and queries to one vector a token, for late interaction.

As colpali-engine's `ColQwen2_5`, transformers' Qwen2.5-VL with a projection behind it. transformers' own
`ColQwen2ForRetrieval`, which sentence-transformers runs, gives an image's tokens the positions of text: other vectors.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from mlx_embeddings_backends.base import DType, LoadOptions, Prepared
from mlx_embeddings_backends.colqwen import lora
from mlx_embeddings_backends.colqwen.backend import ColQwenBackend
from mlx_embeddings_backends.colqwen.batch import ColQwenBatch
from mlx_embeddings_backends.colqwen.checkpoint import ColQwenConfig, canonical_names, read_config
from mlx_embeddings_backends.errors import DeviceLost, UnsupportedModel
from mlx_embeddings_backends.files import read_object, weight_files
from mlx_embeddings_backends.torch import qwen2_5_vision
from mlx_embeddings_backends.torch.devices import (
    TORCH_DTYPES,
    batch_tokens,
    choose_device,
    choose_dtype,
    memory_bytes,
)
from mlx_embeddings_backends.torch.tensor_files import check_tensors, read_tensors

log = logging.getLogger(__name__)

PATCH_EMBEDDING = "visual.patch_embed.proj.weight"


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right, where causal attention lets no real token see it."""

    ids: Tensor  # [batch, tokens]
    positions: Tensor  # [3, batch, tokens]
    real: Tensor  # [real tokens], the places of all items' tokens in the flattened [batch x tokens]
    lengths: NDArray[np.int64]  # [batch]
    images: qwen2_5_vision.Images | None

    @classmethod
    def of(cls, batch: ColQwenBatch) -> "Batch":
        is_real = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
        return cls(
            torch.from_numpy(batch.ids),
            torch.from_numpy(batch.positions),
            torch.from_numpy(np.flatnonzero(is_real)),
            batch.lengths,
            None if batch.images is None else qwen2_5_vision.Images.of(batch.images),
        )

    def to(self, device: torch.device) -> "Batch":
        ids, positions, real = (each.to(device, non_blocking=True) for each in (self.ids, self.positions, self.real))
        return Batch(ids, positions, real, self.lengths, None if self.images is None else self.images.to(device))


class TorchColQwen2_5(ColQwenBackend):
    """transformers' Qwen2.5-VL, with its vision tower's forward pass replaced."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        self._device = choose_device(options.device)
        dtype = choose_safe_dtype(options.dtype, self._device)
        whole = options.base or folder
        config = read_config(whole)
        super().__init__(folder, options, config, resize=resize)
        weights = _read_weights(whole)
        if options.base is not None:
            _merge_adapter(weights, folder, TORCH_DTYPES[dtype])
        self._model = _build(config, weights, self._device, TORCH_DTYPES[dtype])
        self.info = self._describe(
            "torch", str(self._device), dtype, batch_tokens(self._device), memory_bytes(self._model)
        )

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        return Batch.of(self._processor.collate(batch))

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[NDArray[np.float32]]:
        """[tokens, dimensions] of each item: every real token's vector, the prompt's too, before normalisation."""
        try:
            rows = self._forward(batch.to(self._device)).cpu().numpy()
        except torch.AcceleratorError as error:
            # An error in a kernel leaves the CUDA context unusable; running out of memory is another exception.
            raise DeviceLost(str(error)) from error
        return np.split(rows, batch.lengths.cumsum()[:-1])

    def _forward(self, batch: Batch) -> Tensor:
        """The real tokens' vectors, item by item, float32: [real tokens, dimensions]."""
        language_model = self._model.language_model
        embedded = language_model.embed_tokens(batch.ids)  # [batch, tokens, hidden size]
        if batch.images is not None:
            features = qwen2_5_vision.encode(self._model.visual, batch.images)
            embedded.flatten(0, 1)[batch.images.token_places] = features
        # No mask at all is a causal one to transformers, and the quick way through torch's attention.
        hidden = language_model(
            inputs_embeds=embedded, position_ids=batch.positions, attention_mask=None, use_cache=False
        ).last_hidden_state
        real = hidden.flatten(0, 1)[batch.real]
        projected: Tensor = self._model.embedding_proj_layer(real.float())
        return projected


def resize(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB -> [height, width, 3] of `size`, (height, width), as transformers' Qwen2VLImageProcessor resamples it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, height, width]
    resized = transforms.resize(pixels, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def choose_safe_dtype(wanted: str, device: torch.device) -> DType:
    """Never float16 unless asked for: Qwen2.5-VL, trained in bfloat16, has activations beyond float16's range."""
    dtype = choose_dtype(wanted, device)
    if dtype != "float16":
        return dtype
    if wanted == "auto":
        return "bfloat16"
    log.warning("Qwen2.5-VL's activations can exceed float16's range, and such items then fail: bfloat16 holds them")
    return dtype


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """By canonical name, on the CPU, as the files have them. Raises `UnsupportedModel` for quantised ones."""
    config = read_object(folder / "config.json")
    if config.get("quantization"):
        raise UnsupportedModel("the weights are quantised for MLX: use --backend mlx")
    if config.get("quantization_config"):
        raise UnsupportedModel("the weights are quantised, by quantization_config in config.json: use the original")
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        found |= read_tensors(file)
    weights = {known: found[name] for name, known in canonical_names(found).items()}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise UnsupportedModel(f"the weight {name} is of {weight.dtype}: quantised weights are not known")
    if PATCH_EMBEDDING in weights and weights[PATCH_EMBEDDING].shape[-1] == 3:
        weights[PATCH_EMBEDDING] = weights[PATCH_EMBEDDING].movedim(-1, 1).contiguous()  # MLX has channels last
    return weights


def _merge_adapter(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    plan = lora.read(folder)
    lora.merge(weights, read_tensors(plan.file), plan, widen=Tensor.float, narrow=lambda merged: merged.to(dtype))


def _build(config: ColQwenConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model and the projection, with these weights and no other. Raises `ModelError`."""
    settings = Qwen2_5_VLConfig(**config.as_transformers())
    with torch.device("meta"):  # without memory, and without random numbers
        model: Any = Qwen2_5_VLModel(settings)
        model.embedding_proj_layer = nn.Linear(config.text.hidden_size, config.embedding_dim)
    check_tensors(weights, model.state_dict(), config="config.json")
    placed = {name: weight.to(device, dtype) for name, weight in weights.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    model.embedding_proj_layer.float()
    # Its frequencies are in no file, and were left on the meta device.
    model.language_model.rotary_emb = type(model.language_model.rotary_emb)(settings.text_config).to(device)
    return model.eval().requires_grad_(False)
