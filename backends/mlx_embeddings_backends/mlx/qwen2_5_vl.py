"""Qwen2.5-VL without its language head: vision tower and language model, the parts that ColQwen2.5 is made of.

The same function as transformers' (`transformers.models.qwen2_5_vl`), after arXiv:2502.13923, with the windows of the
vision tower attended to in one call a layer. Parameters have the names of `colqwen.checkpoint.canonical_name`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.nn.layers.activations import GELU
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from numpy.typing import NDArray

from mlx_embeddings_backends.colqwen.batch import ColQwenBatch, ImageBatch
from mlx_embeddings_backends.colqwen.checkpoint import ColQwenConfig, TextConfig, VisionConfig

VISION_ROPE_THETA = 10000.0
VISION_EPS = 1e-6

Rotation = tuple[mx.array, mx.array]  # cosines and sines, for half of a head's dimensions


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the patches of a batch go to be attended to window by window, each padded to a whole one."""

    into: mx.array  # [windows x window_patches], the patch at each place; the first where there is none
    out_of: mx.array  # [patches], the place of each patch
    is_patch: mx.array  # [windows, 1, 1, window_patches]

    @classmethod
    def of(cls, lengths: NDArray[np.int64], window_patches: int) -> "Windows | None":
        """None where all windows are whole."""
        is_patch = np.arange(window_patches) < lengths[:, None]
        if is_patch.all():
            return None
        out_of = np.flatnonzero(is_patch)
        into = np.zeros(is_patch.size, dtype=np.int32)
        into[out_of] = np.arange(len(out_of))
        return cls(mx.array(into), mx.array(out_of.astype(np.int32)), mx.array(is_patch[:, None, None]))


class Layer(Module):
    def __init__(self) -> None:
        super().__init__()


class RmsNorm(Layer):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class Mlp(Layer):
    def __init__(self, dim: int, hidden_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=bias)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(_gated(self.gate_proj(x), self.up_proj(x)))


class VisionAttention(Layer):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.window_patches = config.window_patches
        self.scale = (config.hidden_size // config.num_heads) ** -0.5
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, rotation: Rotation, lengths: Sequence[int], windows: Windows | None) -> mx.array:
        """x [patches, dim]; over whole images of `lengths` patches, or over windows where there are no lengths."""
        patches, dim = x.shape
        qkv = self.qkv(x).reshape(patches, 3 * self.heads, -1)
        queries_keys, values = mx.split(qkv, [2 * self.heads], axis=1)
        qkv = mx.concatenate([_rotate(queries_keys, rotation), values], axis=1)  # [patches, 3 heads, head_dim]
        mixed = self._by_image(qkv, lengths) if lengths else self._by_window(qkv, windows)
        return self.proj(mixed.reshape(patches, dim))

    def _by_image(self, qkv: mx.array, lengths: Sequence[int]) -> mx.array:
        """One call an image: no mask is needed, and memory is that of the largest image."""
        ends = np.cumsum(lengths)[:-1].tolist()
        return mx.concatenate([self._attend(image[None], None)[0] for image in mx.split(qkv, ends, axis=0)], axis=0)

    def _by_window(self, qkv: mx.array, windows: Windows | None) -> mx.array:
        placed = qkv if windows is None else qkv[windows.into]
        mixed = self._attend(
            placed.reshape(-1, self.window_patches, *qkv.shape[1:]), None if windows is None else windows.is_patch
        )
        mixed = mixed.reshape(-1, *mixed.shape[2:])
        return mixed if windows is None else mixed[windows.out_of]

    def _attend(self, qkv: mx.array, mask: mx.array | None) -> mx.array:
        """[batch, patches, 3 heads, head_dim] -> [batch, patches, heads, head_dim]"""
        queries, keys, values = mx.split(qkv.transpose(0, 2, 1, 3), 3, axis=1)
        mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
        return mixed.transpose(0, 2, 1, 3)


class VisionBlock(Layer):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.hidden_size, VISION_EPS)
        self.norm2 = RmsNorm(config.hidden_size, VISION_EPS)
        self.attn = VisionAttention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, bias=True)

    def __call__(self, x: mx.array, rotation: Rotation, lengths: Sequence[int], windows: Windows | None) -> mx.array:
        x = x + self.attn(self.norm1(x), rotation, lengths, windows)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(Layer):
    """A convolution whose steps are as long as its kernel is wide: one product with a matrix."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.patch_dim, config.hidden_size, bias=False)

    def __call__(self, patches: mx.array) -> mx.array:
        return self.proj(patches)


class PatchMerger(Layer):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RmsNorm(config.hidden_size, VISION_EPS)
        self.mlp: Sequence[Callable[[mx.array], mx.array]] = [
            Linear(self.merged, self.merged),
            GELU(),
            Linear(self.merged, config.out_hidden_size),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """[patches, dim] -> [merged patches, out_dim]"""
        first, activation, second = self.mlp
        return second(activation(first(self.ln_q(x).reshape(-1, self.merged))))


class VisionTower(Layer):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)

    def __call__(self, images: ImageBatch) -> mx.array:
        """-> [merged patches, out_dim], in the order of the images' tokens."""
        config = self.config
        order = mx.array(images.window_index.astype(np.int32))
        merged = config.spatial_merge_size**2
        patches = mx.array(images.patches).astype(self.merger.ln_q.weight.dtype)
        x = self.patch_embed(patches)  # [patches, dim]
        x = x.reshape(-1, merged, x.shape[1])[order].reshape(x.shape)
        positions = images.positions.reshape(-1, merged, 2)[images.window_index].reshape(-1, 2, 1)
        frequencies = _frequencies(config.hidden_size // config.num_heads // 2, VISION_ROPE_THETA)
        rotation = _rotation((positions * frequencies).reshape(len(positions), -1))
        windows = Windows.of(images.window_lengths, config.window_patches)
        lengths = images.lengths.tolist()
        for place, block in enumerate(self.blocks):
            x = block(x, rotation, lengths if place in config.fullatt_block_indexes else (), windows)
        return self.merger(x)[mx.array(np.argsort(images.window_index).astype(np.int32))]


class TextAttention(Layer):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, shared)
        self.v_proj = Linear(config.hidden_size, shared)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, rotation: Rotation) -> mx.array:
        """[batch, tokens, dim]"""
        queries, keys, values = (
            each.reshape(*x.shape[:2], -1, self.head_dim) for each in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        mixed = mx.fast.scaled_dot_product_attention(
            _rotate(queries, rotation).transpose(0, 2, 1, 3),
            _rotate(keys, rotation).transpose(0, 2, 1, 3),
            values.transpose(0, 2, 1, 3),
            scale=self.scale,
            mask="causal",
        )  # [batch, heads, tokens, head_dim]
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(x.shape))


class TextLayer(Layer):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = TextAttention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, bias=False)

    def __call__(self, x: mx.array, rotation: Rotation) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(Layer):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [TextLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, positions: NDArray[np.int64]) -> mx.array:
        """Embedded tokens [batch, tokens, dim] at `positions` [3, batch, tokens]. Padding may only be on the right."""
        config = self.config
        axes = np.repeat(np.arange(3), config.mrope_section)  # [head_dim / 2]: time, row or column
        frequencies = _frequencies(config.head_dim, config.rope_theta)
        rotation = _rotation(positions[axes].transpose(1, 2, 0) * frequencies)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.norm(x)


class ColQwen(Layer):
    """Both, and the projection of every token to its vector."""

    def __init__(self, config: ColQwenConfig) -> None:
        super().__init__()
        self.visual = VisionTower(config.vision)
        self.language_model = LanguageModel(config.text)
        self.embedding_proj_layer = Linear(config.text.hidden_size, config.embedding_dim)

    def __call__(self, batch: ColQwenBatch) -> mx.array:
        """-> [batch, tokens, embedding_dim], not normalised; what stands in padding is of no use."""
        x = self.language_model.embed_tokens(mx.array(batch.ids.astype(np.int32)))  # [batch, tokens, dim]
        if batch.images is not None:
            flat = x.reshape(-1, x.shape[-1])
            flat[mx.array(batch.images.token_places.astype(np.int32))] = self.visual(batch.images)
            x = flat.reshape(x.shape)
        return self.embedding_proj_layer(self.language_model(x, batch.positions))


def _frequencies(dim: int, theta: float) -> NDArray[np.float32]:
    """Of rotary positions over `dim` dimensions, in float32 as the reference: [dim / 2]."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.asarray(1 / np.float32(theta) ** exponents, dtype=np.float32)


def _rotation(angles: NDArray[np.floating]) -> Rotation:
    """[..., head_dim / 2] -> [..., 1, head_dim / 2], the same for every head."""
    shared = mx.array(angles[..., None, :].astype(np.float32))
    return mx.cos(shared), mx.sin(shared)


def _rotate(x: mx.array, rotation: Rotation) -> mx.array:
    """[..., heads, head_dim], in float32: dimension i is paired with i + head_dim / 2."""
    left, right = mx.split(x, 2, axis=-1)
    return mx.concatenate(_turned(left, right, *rotation), axis=-1)


def _turn(left: mx.array, right: mx.array, cosines: mx.array, sines: mx.array) -> list[mx.array]:
    dtype = left.dtype
    return [(left * cosines - right * sines).astype(dtype), (right * cosines + left * sines).astype(dtype)]


def _gate(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up).astype(up.dtype)


# One kernel each, where MLX would run four to seven.
_turned: Callable[[mx.array, mx.array, mx.array, mx.array], list[mx.array]] = mx.compile(_turn, shapeless=True)
_gated: Callable[[mx.array, mx.array], mx.array] = mx.compile(_gate, shapeless=True)
