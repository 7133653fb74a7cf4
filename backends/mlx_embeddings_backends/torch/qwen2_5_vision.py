"""Qwen2.5-VL's vision tower: the forward pass over transformers' modules, for images of any sizes in one batch.

The same function as transformers' (`transformers.models.qwen2_5_vl.modeling_qwen2_5_vl`, after arXiv:2502.13923).
There each window is attended to by a call of its own, over a thousand for one page, and the device is asked for their
lengths in every layer. Here windows of one size go together, and their places are worked out on the CPU beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlx_embeddings_backends.colqwen.batch import ImageBatch

ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class Images:
    """A batch's images. The tower has their patches window by window, the smallest windows first, all images' together.

    Patches that are merged stay together; `places` count in that order.
    """

    patches: Tensor  # [patches, patch_dim], in the images' own order
    positions: Tensor  # [patches, 2], row and column, likewise
    window_index: Tensor  # [merged patches], which of them stands at each place
    place_of: Tensor  # [merged patches], the place at which each of them stands
    windows: tuple[tuple[int, int], ...]  # how many windows there are of how many patches, in order
    wholes: tuple[Tensor, ...]  # of each image, the places of its patches, [patches]
    token_places: Tensor  # [merged patches], of their tokens in the flattened [batch x tokens]

    @classmethod
    def of(cls, images: ImageBatch) -> "Images":
        unit = len(images.patches) // len(images.window_index)  # patches that are merged into one
        by_size = np.argsort(np.repeat(images.window_lengths, images.window_lengths // unit), kind="stable")
        window_index = images.window_index[by_size]
        place_of = np.argsort(window_index)
        patch_places = torch.from_numpy((place_of[:, None] * unit + np.arange(unit)).flatten())
        sizes, counts = np.unique(images.window_lengths, return_counts=True)
        return cls(
            torch.from_numpy(images.patches),
            torch.from_numpy(images.positions),
            torch.from_numpy(window_index),
            torch.from_numpy(place_of),
            tuple(zip(counts.tolist(), sizes.tolist(), strict=True)),
            torch.split(patch_places, images.lengths.tolist()),
            torch.from_numpy(images.token_places),
        )

    def to(self, device: torch.device) -> "Images":
        def move(each: Tensor) -> Tensor:
            return each.to(device, non_blocking=True)

        return Images(
            move(self.patches),
            move(self.positions),
            move(self.window_index),
            move(self.place_of),
            self.windows,
            tuple(map(move, self.wholes)),
            move(self.token_places),
        )


def encode(tower: Any, images: Images) -> Tensor:
    """transformers' `Qwen2_5_VisionTransformerPretrainedModel` on `images`: features [merged patches, hidden size]."""
    kernel = tower.patch_embed.proj.weight  # [dim, 3, frames, height, width], which covers a patch: a plain product
    x = functional.linear(images.patches.to(kernel.dtype), kernel.flatten(1))  # [patches, dim]
    cos, sin = _rotation(images.positions, x.shape[-1] // tower.config.num_heads)
    x, cos, sin = (_by_window(each, images.window_index) for each in (x, cos, sin))
    for number, block in enumerate(tower.blocks):
        qkv = _query_key_value(block.attn, block.norm1(x), cos, sin)
        if number in tower.fullatt_block_indexes:
            mixed = _attend_to_images(qkv, images.wholes)
        else:
            mixed = _attend_to_windows(qkv, images.windows)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    merged: Tensor = tower.merger(x)  # [merged patches, hidden size]
    return merged[images.place_of]


def _by_window(x: Tensor, window_index: Tensor) -> Tensor:
    """[patches, dim], from the images' order to that of the windows."""
    return x.view(len(window_index), -1, x.shape[-1])[window_index].view(x.shape)


def _rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary embedding, float32, [patches, head_dim / 2]: half of the angles by row, half by column."""
    steps = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device) / (head_dim // 2)
    angles = (positions[:, :, None] / ROPE_BASE**steps).flatten(1)
    return angles.cos(), angles.sin()


def _query_key_value(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[patches, 3, heads, head_dim], with query and key rotated in float32."""
    qkv: Tensor = attention.qkv(x).view(len(x), 3, attention.num_heads, -1)
    first, second = qkv[:, :2].float().chunk(2, dim=-1)  # [patches, 2, heads, head_dim / 2]
    cos, sin = cos[:, None, None], sin[:, None, None]
    rotated = first * cos - second * sin, second * cos + first * sin
    half = first.shape[-1]
    qkv[:, :2, :, :half], qkv[:, :2, :, half:] = rotated
    return qkv


def _attend_to_windows(qkv: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
    """Each patch to those of its window, with one call for all windows of a size: [patches, dim]."""
    mixed = []
    parts = torch.split(qkv, [count * size for count, size in windows])
    for part, (count, size) in zip(parts, windows, strict=True):
        # each [windows, heads, size, head_dim]
        query, key, value = part.view(count, size, *part.shape[1:]).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        mixed.append(attended.transpose(1, 2).reshape(count * size, -1))
    return torch.cat(mixed)


def _attend_to_images(qkv: Tensor, wholes: Sequence[Tensor]) -> Tensor:
    """Each patch to those of its image: [patches, dim]."""
    mixed = torch.empty_like(qkv[:, 0])  # [patches, heads, head_dim]
    for places in wholes:
        query, key, value = qkv[places].permute(1, 2, 0, 3)[:, None]  # each [1, heads, patches, head_dim]
        mixed[places] = functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
    return mixed.flatten(1)
