"""BERT and its kin (RoBERTa, XLM-R, CamemBERT): the encoder's forward pass, written for speed.

The same function as transformers' (`transformers.models.bert.modeling_bert`), with one product for query, key and
value, weights cast once, few Python calls a layer, and no work on padding: everything but attention itself runs on the
batch's tokens laid end to end. LayerNorm, the residual stream and the output are float32 whatever the dtype of the
products; softmax accumulates in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from mlx_embeddings_backends import adapterhub

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, *layers: nn.Linear) -> "Linear":
        """One layer, or several on the same input as one."""
        return cls(
            torch.cat([layer.weight.detach() for layer in layers]).to(dtype),
            torch.cat([layer.bias.detach() for layer in layers]).to(dtype),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """The tokens of a batch end to end, with filler rows behind them up to a round number."""

    ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    places: Tensor  # [tokens], of each token in the flattened padded batch
    attention_mask: Tensor  # [batch, longest]
    has_padding: bool

    def to(self, device: torch.device) -> "PackedTokens":
        ids, positions, places, attention_mask = (
            each.to(device, non_blocking=True) for each in (self.ids, self.positions, self.places, self.attention_mask)
        )
        return PackedTokens(ids, positions, places, attention_mask, self.has_padding)


@dataclass(frozen=True, slots=True)
class Layer:
    query_key_value: Linear
    attention_output: Linear
    attention_norm: nn.LayerNorm
    intermediate: Linear
    output: Linear
    output_norm: nn.LayerNorm


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What an adapter adds behind one layer. x float32 [rows, dim] -> the same."""

    down: Linear
    activation: Callable[[Tensor], Tensor]
    up: Linear

    @classmethod
    def of(
        cls, layer: adapterhub.Bottleneck[Tensor], non_linearity: str, to: Callable[[Tensor], Tensor]
    ) -> "Bottleneck":
        return cls(
            Linear(to(layer.down_weight), to(layer.down_bias)),
            ACT2FN[non_linearity],
            Linear(to(layer.up_weight), to(layer.up_bias)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x.to(self.down.weight.dtype)))).float()


class BertEncoder:
    """Token ids to the last hidden state, by way of one of the `adapters` or, where there are none, without."""

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        adapters: Mapping[str, adapterhub.Adapter[Tensor]] | None = None,
    ) -> None:
        config = model.config
        embeddings: Any = model.embeddings
        encoder: Any = model.encoder
        self.dtype = dtype
        self.heads: int = config.num_attention_heads
        self.activation = ACT2FN[config.hidden_act]
        # RoBERTa numbers positions from padding_idx + 1 and skips padding tokens; BERT from 0.
        self.padding_idx: int | None = None if config.model_type == "bert" else embeddings.padding_idx
        self.words: Tensor = embeddings.word_embeddings.weight.detach()
        # The row of each position as it is with each token type: those of type 0, then those of type 1.
        types: Tensor = embeddings.token_type_embeddings.weight.detach()
        positions: Tensor = embeddings.position_embeddings.weight.detach()
        self.positions = (types[:, None] + positions).flatten(0, 1)
        self.rows_per_type = len(positions)
        self.embedding_norm: nn.LayerNorm = embeddings.LayerNorm
        self.layers = [
            Layer(
                query_key_value=Linear.of(dtype, attention.self.query, attention.self.key, attention.self.value),
                attention_output=Linear.of(dtype, attention.output.dense),
                attention_norm=attention.output.LayerNorm,
                intermediate=Linear.of(dtype, layer.intermediate.dense),
                output=Linear.of(dtype, layer.output.dense),
                output_norm=layer.output.LayerNorm,
            )
            for layer in encoder.layer
            for attention in (layer.attention,)
        ]
        to = partial(Tensor.to, device=self.words.device, dtype=dtype)
        # By the name of an adapter, what it adds behind each layer.
        self.bottlenecks: dict[str | None, Sequence[Bottleneck | None]] = {
            name: [Bottleneck.of(layer, adapter.non_linearity, to) for layer in adapter.layers]
            for name, adapter in (adapters or {}).items()
        } or {None: [None] * len(self.layers)}

    @staticmethod
    def covers(config: PretrainedConfig) -> bool:
        """Whether the forward pass below is this configuration's, with nothing left out."""
        return (
            config.model_type in MODEL_TYPES
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and not getattr(config, "is_decoder", False)
            and not getattr(config, "add_cross_attention", False)
        )

    @property
    def memory_bytes(self) -> int:
        """Of its weights."""
        norms = [
            self.embedding_norm,
            *(norm for each in self.layers for norm in (each.attention_norm, each.output_norm)),
        ]
        added = [each for layers in self.bottlenecks.values() for each in layers if each is not None]
        linears = [linear for each in added for linear in (each.down, each.up)]
        for layer in self.layers:
            linears += [layer.query_key_value, layer.attention_output, layer.intermediate, layer.output]
        held = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
        held += [parameter for norm in norms for parameter in norm.parameters()]
        return sum(tensor.nbytes for tensor in (self.words, self.positions, *held))

    def pack(
        self, items: Sequence[NDArray[np.int64]], types: Sequence[NDArray[np.int64]] | None = None
    ) -> PackedTokens:
        """Token ids of each item, and token types (None: all 0) -> one row a token. On the CPU, from any thread."""
        lengths = np.array([len(ids) for ids in items])
        tokens, longest = int(lengths.sum()), int(lengths.max())
        if self._is_short(len(items), longest):
            longest = -(-longest // 8) * 8  # few lengths, for the reason that round_up gives
        real = np.arange(longest) < lengths[:, None]  # [batch, longest]
        filler = np.zeros(round_up(tokens) - tokens, dtype=np.int64)
        positions = np.concatenate([*map(self._positions_of, items), filler])
        if types is not None:
            positions[:tokens] += self.rows_per_type * np.concatenate(types)
        return PackedTokens(
            ids=torch.from_numpy(np.concatenate([*items, filler])),
            positions=torch.from_numpy(positions),
            places=torch.from_numpy(np.flatnonzero(real)),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            has_padding=tokens < real.size,
        )

    def _is_short(self, batch: int, longest: int) -> bool:
        """Where torch's attention on a CPU takes up to twice as long as its parts: many short items."""
        on_cpu = self.words.device.type == "cpu"
        return on_cpu and self.dtype == torch.bfloat16 and batch >= 4 and longest <= 64

    def _positions_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.padding_idx is None:
            return np.arange(len(ids))
        real = ids != self.padding_idx
        positions: NDArray[np.int64] = np.cumsum(real) * real + self.padding_idx
        return positions

    def __call__(self, packed: PackedTokens, adapter: str | None = None) -> Tensor:
        """-> float32 [batch, longest, dim], zeros where nothing is."""
        batch, longest = packed.attention_mask.shape
        tokens = len(packed.places)
        x = functional.embedding(packed.ids, self.words) + functional.embedding(packed.positions, self.positions)
        x = self.embedding_norm(x)  # [rows, dim]
        blocked = None
        if packed.has_padding:
            blocked = torch.zeros(batch, 1, 1, longest, dtype=self.dtype, device=x.device)
            blocked.masked_fill_(packed.attention_mask[:, None, None] == 0, float("-inf"))
        for layer, bottleneck in zip(self.layers, self.bottlenecks[adapter], strict=True):
            x = self._layer(x, layer, packed, blocked, bottleneck)
        hidden = x.new_zeros(batch * longest, x.shape[1]).index_copy_(0, packed.places, x[:tokens])
        return hidden.view(batch, longest, -1)

    def _layer(
        self, x: Tensor, layer: Layer, packed: PackedTokens, blocked: Tensor | None, bottleneck: Bottleneck | None
    ) -> Tensor:
        mixed = self._attend(layer.query_key_value(x.to(self.dtype)), packed, blocked)  # [rows, dim]
        x = layer.attention_norm(layer.attention_output(mixed).float() + x)
        hidden = self.activation(layer.intermediate(x.to(self.dtype)))  # [rows, intermediate]
        x = layer.output(hidden).float() + x
        normed: Tensor = layer.output_norm(x)
        return normed if bottleneck is None else layer.output_norm(x + bottleneck(normed))

    def _attend(self, qkv: Tensor, packed: PackedTokens, blocked: Tensor | None) -> Tensor:
        """qkv [rows, 3 dim] -> [rows, dim]: padded for the attention itself, and packed again."""
        batch, longest = packed.attention_mask.shape
        (rows, width), tokens = qkv.shape, len(packed.places)
        qkv = qkv[:tokens]
        if blocked is not None:
            qkv = qkv.new_zeros(batch * longest, width).index_copy_(0, packed.places, qkv)
        qkv = qkv.view(batch, longest, 3, self.heads, width // 3 // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, longest, head_dim]
        if self._is_short(batch, longest):
            mixed = _explicit_attention(query, key, value, blocked)
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=blocked)
        mixed = mixed.transpose(1, 2).reshape(batch * longest, width // 3)
        if blocked is not None:
            mixed = mixed.index_select(0, packed.places)
        return functional.pad(mixed, (0, 0, 0, rows - tokens)) if rows > tokens else mixed


def _explicit_attention(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
    """As torch's, [batch, heads, tokens, head_dim], with the scores laid out: softmax is taken of them in float32."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5  # [batch, heads, tokens, tokens]
    if blocked is not None:
        scores = scores + blocked
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def round_up(tokens: int) -> int:
    """A number of rows that comes up again: oneDNN makes a kernel for each new one, which takes longer than it runs."""
    step = 8 if tokens <= 64 else 32 if tokens <= 512 else 128
    return -(-tokens // step) * step
