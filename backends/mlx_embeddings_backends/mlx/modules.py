"""sentence-transformers' modules behind the transformer, in float32: tokens to a vector, and what is done with it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx.nn.layers.activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm

from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.mlx.checkpoint import Part
from mlx_embeddings_backends.mlx.device import fill, read_weights

# In the order in which sentence-transformers puts several side by side; the older name of each is a flag of its own.
POOLING_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}

# By the name of torch.nn's class, made without arguments as sentence-transformers makes them.
ACTIVATIONS: dict[str, Callable[[], Callable[[mx.array], mx.array]]] = {
    "Identity": lambda: lambda x: x,
    "Tanh": Tanh,
    "ReLU": ReLU,
    "GELU": GELU,
    "SiLU": SiLU,
    "Sigmoid": Sigmoid,
}


class VectorModule(Protocol):
    """[batch, dim] -> [batch, dimensions]"""

    dimensions: int

    def __call__(self, x: mx.array) -> mx.array: ...


class Pooling:
    """[batch, tokens, dim] -> [batch, modes x dim]"""

    def __init__(self, config: dict[str, Any]) -> None:
        mode = (
            config.get("pooling_mode") or [name for name, flag in POOLING_MODES.items() if config.get(flag)] or "mean"
        )
        self.modes: list[str] = [mode] if isinstance(mode, str) else list(mode)
        if unknown := [mode for mode in self.modes if mode not in POOLING_MODES]:
            raise UnsupportedModel(f"the pooling {unknown[0]!r} is not known: {', '.join(POOLING_MODES)} are")
        self.include_prompt = bool(config.get("include_prompt", True))

    def __call__(self, hidden: mx.array, mask: mx.array, prompt_tokens: int) -> mx.array:
        """`mask` [batch, tokens] is True for tokens, with padding on the right; skips the first `prompt_tokens`."""
        pooled = mask & (mx.arange(mask.shape[1]) >= prompt_tokens)
        return mx.concatenate([_pool(mode, hidden, pooled) for mode in self.modes], axis=-1)


def _pool(mode: str, hidden: mx.array, pooled: mx.array) -> mx.array:
    """[batch, tokens, dim], [batch, tokens] -> [batch, dim]"""
    rows, tokens = mx.arange(hidden.shape[0]), hidden.shape[1]
    # Not a product: whatever stands in the padding, infinity too, has no part in it.
    kept = mx.where(pooled[..., None], hidden, 0)
    weights = pooled.astype(mx.float32)[..., None]  # [batch, tokens, 1]
    match mode:
        case "cls":
            return hidden[rows, mx.argmax(pooled, axis=1)]
        case "lasttoken":
            return kept[rows, tokens - 1 - mx.argmax(pooled[:, ::-1], axis=1)]
        case "max":
            return mx.where(pooled[..., None], hidden, -mx.inf).max(axis=1)
        case "weightedmean":
            weights = weights * mx.arange(1, tokens + 1)[:, None]
            return (kept * weights).sum(axis=1) / mx.maximum(weights.sum(axis=1), 1e-9)
    count = mx.maximum(weights.sum(axis=1), 1e-9)
    return kept.sum(axis=1) / (count if mode == "mean" else mx.sqrt(count))


class Dense(Module):
    """A linear layer and an activation."""

    def __init__(self, part: Part, dimensions: int) -> None:
        super().__init__()
        activation = str(part.config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
        if activation not in ACTIVATIONS:
            raise UnsupportedModel(f"the activation {activation!r} is not known: {', '.join(ACTIVATIONS)} are")
        if part.config.get("use_residual"):
            raise UnsupportedModel("a Dense module with a residual is not known")
        weights = read_weights(part.folder)
        weight = weights.get("linear.weight")
        self.dimensions: int = weight.shape[0] if weight is not None and weight.ndim == 2 else 0
        self.linear = Linear(dimensions, self.dimensions, bias="linear.bias" in weights)
        fill(self, weights, "float32")
        self._activation = ACTIVATIONS[activation]()

    def __call__(self, x: mx.array) -> mx.array:
        return self._activation(self.linear(x))


class Norm(Module):
    """sentence-transformers' LayerNorm."""

    def __init__(self, part: Part, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.norm = LayerNorm(dimensions, eps=1e-5)
        fill(self, read_weights(part.folder), "float32")

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.norm(x)
        return y


class Normalize:
    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def __call__(self, x: mx.array) -> mx.array:
        return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def vector_modules(parts: Sequence[Part], dimensions: int) -> list[VectorModule]:
    """What follows the pooling, which gives vectors of `dimensions`. Dropout does nothing here."""
    modules: list[VectorModule] = []
    for part in parts:
        for name in ("module_input_name", "module_output_name"):
            if part.config.get(name) not in (None, "sentence_embedding"):
                raise UnsupportedModel(f"a {part.kind} module with the {name} {part.config[name]!r} is not known")
        match part.kind:
            case "Dense":
                modules.append(Dense(part, dimensions))
            case "LayerNorm":
                modules.append(Norm(part, dimensions))
            case "Normalize":
                modules.append(Normalize(dimensions))
            case "Dropout":
                continue
            case _:
                raise UnsupportedModel(
                    f"the MLX backend does not know the module {part.kind} in this place: use --backend torch"
                )
        dimensions = modules[-1].dimensions
    return modules
