"""CSR: a text's dense vector to a sparse one, of which an auto-encoder could rebuild it (arXiv:2503.01776).

Of a pooled vector x the sparse one has the k largest of W (x - b) + c, but for those below zero. Where the checkpoint
says `normalize`, x is first brought to a mean of 0 and a deviation of 1. The half that rebuilds is for training alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from mlx_embeddings_backends.base import SparseVector
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_object, weight_files
from mlx_embeddings_backends.tokenization import pad
from mlx_embeddings_backends.torch.bert import BertEncoder, PackedTokens
from mlx_embeddings_backends.torch.devices import memory_bytes
from mlx_embeddings_backends.torch.sentence_transformer import place_encoder
from mlx_embeddings_backends.torch.tensor_files import check_tensors, read_tensors

# What config.json leaves out is as sentence-transformers has it. The last two are for training.
_DEFAULTS: Final = {"hidden_dim": 512, "k": 8, "normalize": False, "k_aux": 0, "dead_threshold": 0}
_MOST_DIMENSIONS: Final = 1 << 24
# Added to the deviation, against a division by zero.
_EPSILON: Final = 1e-5


class SparseAutoEncoder(nn.Module):
    """The half that encodes, in float32."""

    def __init__(self, weight: Tensor, pre_bias: Tensor, latent_bias: Tensor, *, k: int, normalize: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # [dimensions, dim]
        self.pre_bias = nn.Parameter(pre_bias, requires_grad=False)  # [dim]
        self.latent_bias = nn.Parameter(latent_bias, requires_grad=False)  # [dimensions]
        self.k = k
        self.normalize = normalize

    # Of the library's parameters those that are for downloads come to nothing here.
    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> Self:
        """On the CPU. Runs no code of the files. Raises `ModelError`."""
        try:
            return cls._read(Path(model_name_or_path) / subfolder)
        except ModelError as error:
            raise type(error)(f"the SparseAutoEncoder in {subfolder!r} cannot be loaded: {error}") from error

    @classmethod
    def _read(cls, folder: Path) -> Self:
        config = _read_config(folder / "config.json")
        dimensions, dim = config["hidden_dim"], config["input_dim"]
        with torch.device("meta"):
            expected = {
                "encoder.weight": torch.empty(dimensions, dim),
                "pre_bias": torch.empty(dim),
                "latent_bias": torch.empty(dimensions),
            }
        weights = _read_weights(folder)
        check_tensors(weights, expected, config="config.json")
        if not all(weight.is_floating_point() for weight in weights.values()):
            raise ModelError("its files hold weights that are no floating point numbers")
        weight, pre_bias, latent_bias = (weights[name].float() for name in expected)
        return cls(weight, pre_bias, latent_bias, k=config["k"], normalize=config["normalize"])

    @property
    def dimensions(self) -> int:
        return len(self.weight)

    def forward(self, x: Tensor, most_values: int | None = None) -> tuple[Tensor, Tensor]:
        """x float32 [batch, dim] -> indices, ascending, and values: [batch, k], or as many as are asked for."""
        if self.normalize:
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / (x.std(dim=-1, keepdim=True) + _EPSILON)
        latents = functional.linear(x - self.pre_bias, self.weight, self.latent_bias)  # [batch, dimensions]
        values, indices = latents.topk(min(most_values or self.k, self.dimensions), sorted=False)
        indices, order = indices.sort()
        return indices, values.gather(-1, order).relu()


class AutoEncoded:
    """A Transformer, the modules that make one vector of its tokens, and the auto-encoder behind them, on a device.

    `pack` may be called from any thread.
    """

    def __init__(
        self,
        transformer: Transformer,
        between: Sequence[nn.Module],
        auto_encoder: SparseAutoEncoder,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        widths = [cast("Any", module).get_embedding_dimension() for module in between if _has_width(module)]
        if widths[-1] != auto_encoder.weight.shape[1]:
            raise ModelError(
                f"the modules before the SparseAutoEncoder give vectors of {widths[-1]} dimensions, and it takes "
                f"{auto_encoder.weight.shape[1]}"
            )
        self._device = device
        self._max_tokens = max_tokens
        self._pad_id = int(cast("PreTrainedTokenizerBase", transformer.tokenizer).pad_token_id or 0)
        self.vocabulary_size = cast("nn.Embedding", transformer.model.get_input_embeddings()).num_embeddings
        self._encoder, self._transformer = place_encoder(transformer.eval(), device, dtype, {})
        self._between = [module.to(device).eval() for module in between]
        self._auto_encoder = auto_encoder.to(device)
        self.pools_prompt = all(module.include_prompt for module in between if isinstance(module, Pooling))
        self.dimensions = auto_encoder.dimensions
        self.memory_bytes = memory_bytes(*self._between, self._auto_encoder) + (
            memory_bytes(cast("nn.Module", self._transformer)) if self._encoder is None else self._encoder.memory_bytes
        )

    def pack(self, items: Sequence[NDArray[np.int64]]) -> PackedTokens | dict[str, Tensor]:
        """Token ids of each text -> what a call takes."""
        if self._encoder is not None:
            return self._encoder.pack(items)
        ids, mask = pad(items, self._pad_id, self._max_tokens)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    def __call__(
        self, tokens: PackedTokens | Mapping[str, Tensor], unpooled_tokens: int = 0, most_values: int | None = None
    ) -> list[SparseVector]:
        """-> a vector of each text. `most_values` takes the place of the checkpoint's own k."""
        features = self._hidden_states(tokens)
        if unpooled_tokens:
            features["prompt_length"] = unpooled_tokens
        for module in self._between:
            features = module(features)
        indices, values = self._auto_encoder(features["sentence_embedding"].float(), most_values)
        return [
            SparseVector(own[kept != 0], kept[kept != 0])  # what is not a number is not dropped
            for own, kept in zip(indices.to(torch.int32).cpu().numpy(), values.cpu().numpy(), strict=True)
        ]

    def _hidden_states(self, tokens: PackedTokens | Mapping[str, Tensor]) -> dict[str, Any]:
        """`token_embeddings`, float32 [batch, longest, dim], and what else the modules behind it look at."""
        if isinstance(tokens, PackedTokens):
            packed = tokens.to(self._device)
            hidden = cast("BertEncoder", self._encoder)(packed)
            return {"token_embeddings": hidden, "attention_mask": packed.attention_mask}
        inputs: dict[str, Any] = {name: each.to(self._device, non_blocking=True) for name, each in tokens.items()}
        features: dict[str, Any] = cast("nn.Module", self._transformer)(inputs | {"modality": "text"})
        features["token_embeddings"] = features["token_embeddings"].float()
        return features


def _has_width(module: nn.Module) -> bool:
    return callable(getattr(module, "get_embedding_dimension", None))


def _read_config(file: Path) -> dict[str, Any]:
    config = _DEFAULTS | read_object(file)
    if unknown := sorted(config.keys() - _DEFAULTS.keys() - {"input_dim"}):
        raise UnsupportedModel(f"{unknown[0]!r} in its config.json is not known")
    for name in ("input_dim", "hidden_dim", "k"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_DIMENSIONS:
            raise ModelError(
                f"{name} in its config.json is {value!r}: it must be a number from 1 to {_MOST_DIMENSIONS}"
            )
    if config["k"] > config["hidden_dim"]:
        raise ModelError(f"k in its config.json is {config['k']}, more than its hidden_dim, {config['hidden_dim']}")
    if not isinstance(config["normalize"], bool):
        raise ModelError(f"normalize in its config.json is {config['normalize']!r}: it must be true or false")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Without those of training. Encoder and decoder share one matrix, which files may hold under either name."""
    weights = {name: each for file in weight_files(folder) for name, each in read_tensors(file).items()}
    weights.pop("stats_last_nonzero", None)
    tied = weights.pop("decoder.linear.weight", None)
    if tied is not None and not torch.equal(weights.setdefault("encoder.weight", tied), tied):
        raise UnsupportedModel("encoder.weight and decoder.linear.weight differ: only one matrix for both is known")
    return weights
