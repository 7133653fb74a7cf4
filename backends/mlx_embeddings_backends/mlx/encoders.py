"""The transformers of text encoders: mlx-embeddings' layers, set right where they are not transformers' function.

Each has its parameters under the names that transformers saves them by, takes padded token ids and the mask of the real
ones, [batch, tokens] with padding on the right, and returns the last hidden state, [batch, tokens, dim].
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.activations import GELU, ReLU, SiLU
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear

from mlx_embeddings_backends import adapterhub
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.mlx.library import library

Config = Mapping[str, Any]


def _tanh_gelu() -> Callable[[mx.array], mx.array]:
    return GELU("tanh")


# By the names that transformers has for them.
ACTIVATIONS: dict[str, Callable[[], Callable[[mx.array], mx.array]]] = {
    "gelu": GELU,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": ReLU,
    "silu": SiLU,
}

FULL, SLIDING = "full_attention", "sliding_attention"

# What is before a model's own names when it is a part of another, and which of the other's weights are not for us.
_PREFIX = re.compile(r"(module\.)?(bert|roberta|model)\.|module\.")
_UNUSED = re.compile(
    r"(pooler|cls|lm_head|head|decoder|classifier|score)\..*|(.*\.)?(position_ids|token_type_ids|rotary_emb\.inv_freq)"
)
# As the first BERTs were converted from TensorFlow.
_OLDER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def own_weights(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Those of the encoder itself, under its own names."""
    own = {own_name(name): weight for name, weight in weights.items()}
    for name, weight in own.items():
        if name.endswith("conv.conv.weight") and weight.shape[-1] > 1:  # LFM2's, as torch has it: [dim, 1, width]
            own[name] = weight.transpose(0, 2, 1)
    return {name: weight for name, weight in own.items() if not _UNUSED.fullmatch(name)}


def own_name(name: str) -> str:
    """Of a weight or a layer."""
    name = name[match.end() :] if (match := _PREFIX.match(name)) else name
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda older: _OLDER[older[0]], name)


def activation(name: str) -> Callable[[mx.array], mx.array]:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"the activation {name!r} is not known: {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]()


def refuse(config: Config, **expected: Any) -> None:
    """Raise `UnsupportedModel` where the config says something else than is computed here."""
    for name, value in expected.items():
        if config.get(name) not in (value, None):
            raise UnsupportedModel(f"the MLX backend does not know {name} {config[name]!r} of config.json")


def layer_types(config: Config, is_full: Callable[[int], bool]) -> list[str]:
    """Of every layer. Older configs have a number instead."""
    named: list[str] | None = config.get("layer_types")
    return named or [FULL if is_full(number) else SLIDING for number in range(config["num_hidden_layers"])]


def rope_theta(config: Config, old_name: str, default: float, kind: str = "") -> float:
    """Of the rotary positions: transformers 5 keeps it in an object, or in one for each kind of layer."""
    rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get(kind, rope)
    refuse(rope, rope_type="default", type="default", factor=1.0, partial_rotary_factor=1.0)
    return float(rope.get("rope_theta") or config.get(old_name) or default)


class Encoder(Module):
    """What all of them have."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dimensions = int(config["hidden_size"])
        self.vocabulary_size = int(config["vocab_size"])
        self.positions = int(config.get("max_position_embeddings") or 0)  # how many tokens have one; 0: it is not said
        self.pad_id = 0  # of what fills a batch up: masked wherever it could count, but always in the table

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """The last layer's output, [batch, tokens, dimensions]. `mask`, [batch, tokens], is true for tokens."""
        raise NotImplementedError  # each has its own; abc enforces nothing on a dict, which mlx's Module is


class SelfAttention(Module):
    """BERT's, in one kernel: softmax in float32 whatever the dtype, and no scores kept in memory."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (Linear(dim, dim) for _ in range(3))

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        batch, tokens, dim = x.shape
        query, key, value = (
            layer(x).reshape(batch, tokens, self.heads, -1).transpose(0, 2, 1, 3)  # [batch, heads, tokens, head_dim]
            for layer in (self.query, self.key, self.value)
        )
        mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask)
        return mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, dim)


class Bottleneck:
    """What an adapter adds behind one layer: [batch, tokens, dim] -> the same, in the dtype of the model."""

    def __init__(self, layer: adapterhub.Bottleneck[mx.array], non_linearity: str, dtype: mx.Dtype) -> None:
        self._down, self._down_bias, self._up, self._up_bias = (
            weight.astype(dtype).T for weight in (layer.down_weight, layer.down_bias, layer.up_weight, layer.up_bias)
        )
        mx.eval(self._down, self._down_bias, self._up, self._up_bias)
        self._activation = activation(non_linearity)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in (self._down, self._down_bias, self._up, self._up_bias))

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self._activation(mx.addmm(self._down_bias, x, self._down))  # [batch, tokens, bottleneck]
        return mx.addmm(self._up_bias, hidden, self._up)


class Bert(Encoder):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        refuse(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        args = library("bert").ModelArgs.from_dict(config)
        self.embeddings = library("bert").BertEmbeddings(args)
        self.encoder = library("bert").BertEncoder(args)
        for layer in self.encoder.layer:
            # The library's keeps the scores, and takes their softmax in the dtype.
            layer.attention.self = SelfAttention(args.hidden_size, args.num_attention_heads)
            layer.intermediate.intermediate_act_fn = activation(config.get("hidden_act", "gelu"))

    def __call__(
        self, ids: mx.array, mask: mx.array, bottlenecks: Sequence[Bottleneck | None] | None = None
    ) -> mx.array:
        """By way of an adapter's `bottlenecks`, one a layer, where they are given."""
        hidden: mx.array = self.embeddings(ids)
        mask = mask[:, None, None]
        layers = self.encoder.layer
        for layer, bottleneck in zip(layers, bottlenecks or [None] * len(layers), strict=True):
            attended = layer.attention(hidden, mask)
            hidden = layer.output.dense(layer.intermediate(attended)) + attended
            normed = layer.output.LayerNorm(hidden)
            hidden = normed if bottleneck is None else layer.output.LayerNorm(hidden + bottleneck(normed))
        return hidden


class XlmRoberta(Bert):
    """Positions are counted from behind padding_idx, and padding tokens of the text, too, have none."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pad_id = int(config.get("pad_token_id", 1))
        self.positions -= self.pad_id + 1
        args = library("xlm_roberta").ModelArgs.from_dict({"layer_norm_eps": 1e-12, **config})
        self.embeddings = library("xlm_roberta").XLMRobertaEmbeddings(args)


def nearby(mask: mx.array, reach: int) -> mx.array:
    """[batch, tokens] -> [batch, 1, tokens, tokens]: which real tokens are at most `reach` away from each token."""
    places = mx.arange(mask.shape[1])
    distance = mx.abs(places[:, None] - places)
    # Padding looks at itself, or some of it would look at nothing, which is NaN on some devices.
    return (mask[:, None, None] & (distance <= reach)) | (distance == 0)


class ModernBert(Encoder):
    """Layers that see the whole text, and between them some that see only what is near."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        model = library("modernbert").ModernBertModel(library("modernbert").ModelArgs.from_dict(config))
        self.embeddings, self.layers, self.final_norm = model.embeddings, model.layers, model.final_norm
        self._reach = config.get("local_attention", 128) // 2
        kinds = layer_types(config, lambda number: number % config.get("global_attn_every_n_layers", 3) == 0)
        for layer, kind in zip(self.layers, kinds, strict=True):
            layer.attn.local_attention = (-1, -1) if kind == FULL else (self._reach, self._reach)
            old_name, default = ("global_rope_theta", 160000) if kind == FULL else ("local_rope_theta", 10000)
            layer.attn.rotary_emb.base = rope_theta(config, old_name, default, kind)
            # The library's is the tanh approximation, whatever the config says: vectors differ by 4e-3.
            layer.mlp.act = activation(config.get("hidden_activation", "gelu"))

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        everything, near = mask[:, None, None], nearby(mask, self._reach)
        hidden: mx.array = self.embeddings(ids)
        for layer in self.layers:
            (hidden,) = layer(hidden, everything, near)
        hidden = self.final_norm(hidden)
        return hidden


class Qwen3(Encoder):
    """A decoder: attention is causal, so that no token sees the padding behind it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        refuse(config, hidden_act="silu", use_sliding_window=False, is_causal=True, use_bidirectional_attention=False)
        theta = rope_theta(config, "rope_theta", 10000)
        model = library("qwen3").Qwen3Model(library("qwen3").ModelArgs.from_dict({**config, "rope_theta": theta}))
        self.embed_tokens, self.layers, self.norm = model.embed_tokens, model.layers, model.norm

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        hidden: mx.array = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask="causal")
        hidden = self.norm(hidden)
        return hidden


class Gemma3(Encoder):
    """EmbeddingGemma: Gemma 3 with attention in both directions, in some layers only to what is near. Needs mlx-lm."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.get("use_bidirectional_attention"):
            raise UnsupportedModel("the MLX backend knows Gemma 3 only with use_bidirectional_attention")
        refuse(config, hidden_activation="gelu_pytorch_tanh")
        model = library("gemma3_text").Gemma3Model(library("gemma3_text").ModelArgs.from_dict(config))
        self.embed_tokens, self.layers, self.norm = model.embed_tokens, model.layers, model.norm
        self._reach = config.get("sliding_window", 4096) // 2
        self._scale = config["hidden_size"] ** 0.5
        every = config.get("_sliding_window_pattern") or config.get("sliding_window_pattern") or 6
        self._kinds = layer_types(config, lambda number: (number + 1) % every == 0)
        for layer, kind in zip(self.layers, self._kinds, strict=True):
            old_name, default = ("rope_theta", 1e6) if kind == FULL else ("rope_local_base_freq", 1e4)
            layer.self_attn.rope.base = rope_theta(config, old_name, default, kind)

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        masks = {FULL: mask[:, None, None], SLIDING: nearby(mask, self._reach)}
        hidden: mx.array = self.embed_tokens(ids) * self._scale
        for layer, kind in zip(self.layers, self._kinds, strict=True):
            hidden = layer(hidden, masks[kind])
        hidden = self.norm(hidden)
        return hidden


class Lfm2(Encoder):
    """Short convolutions and attention, both causal. Needs mlx-lm."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        theta = rope_theta(config, "rope_theta", 1e6)
        args = {"block_dim": config["hidden_size"], **config, "rope_parameters": None, "rope_theta": theta}
        model = library("lfm2").Lfm2Model(library("lfm2").ModelArgs.from_dict(args))
        self.embed_tokens, self.layers, self.embedding_norm = model.embed_tokens, model.layers, model.embedding_norm

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        hidden: mx.array = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = layer(hidden, "causal" if layer.is_attention_layer else None)
        hidden = self.embedding_norm(hidden)
        return hidden


ENCODERS: dict[str, type[Encoder]] = {
    "bert": Bert,
    "xlm-roberta": XlmRoberta,
    "modernbert": ModernBert,
    "qwen3": Qwen3,
    "gemma3_text": Gemma3,
    "lfm2": Lfm2,
}


def make_encoder(config: Config) -> Encoder:
    """The encoder of a config.json, with weights that are still to be filled in."""
    try:
        return ENCODERS[config["model_type"]](config)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:  # from values not as expected
        raise ModelError(f"config.json does not describe a {config.get('model_type')}: {error}") from error
