"""Rerankers: cross-encoders of transformers' `*ForSequenceClassification`, with sentence-transformers' files or bare.

Loading is sentence-transformers'; the hot path is ours.
"""

import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from safetensors import SafetensorError
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Pair, Prepared, Truncate
from mlx_embeddings_backends.errors import DeviceLost, ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_optional_object
from mlx_embeddings_backends.pairs import PairTokenizer, PairTokens, warm_up
from mlx_embeddings_backends.tokenization import pad
from mlx_embeddings_backends.torch.bert import BertEncoder, PackedTokens
from mlx_embeddings_backends.torch.devices import TORCH_DTYPES, batch_tokens, choose_device, choose_dtype, memory_bytes
from mlx_embeddings_backends.torch.mixed_precision import use_mixed_products
from mlx_embeddings_backends.torch.sentence_transformer import check_text_only, check_weights, max_tokens_of

Activation = Literal["sigmoid", "identity"]

# What checkpoints call their activation. sentence-transformers would import whatever begins with "torch.".
_ACTIVATIONS: Final[dict[str, Activation]] = {
    "torch.nn.Identity": "identity",
    "torch.nn.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}
# What transformers raises for files that make no model or tokenizer.
BROKEN: Final = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, SafetensorError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
# By a part of what it says that is of no use to who has only the files.
_IN_OUR_WORDS: Final = {
    "ignore_mismatched_sizes": "weights have other shapes than config.json asks for",
    "processing class": "it has no tokenizer.json that can be read: save its tokenizer with transformers' "
    "`save_pretrained`",
}


class CrossEncoderBackend(Backend):
    """Items are `Pair`s; what `run` gives of one is its score before the activation that `info` names."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        model = load_library(folder)
        [transformer] = model.children()
        assert isinstance(transformer, Transformer)
        check_text_only(transformer, "scores")
        check_weights(transformer.model)
        if transformer.model.num_labels != 1:
            raise UnsupportedModel(f"the model gives {transformer.model.num_labels} scores a pair: it is no reranker")
        tokenizer = transformer.tokenizer
        self._tokenizer = PairTokenizer(tokenizer.backend_tokenizer, max_tokens=max_tokens_of(transformer))
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._check_types(transformer.config)
        self._device = device
        self._encoder, self._head = _place(transformer, device, TORCH_DTYPES[dtype])
        self.info = ModelInfo(
            backend="torch",
            device=str(device),
            dtype=dtype,
            dimensions=1,
            max_tokens=self._tokenizer.max_tokens,
            vocabulary_size=transformer.model.get_input_embeddings().num_embeddings,
            normalize=False,
            batch_tokens=batch_tokens(device),
            outputs=("rerank",),
            prompts={name: prompt or "" for name, prompt in model.prompts.items()},
            default_prompt=model.default_prompt_name,
            score_activation=activation_of(folder, transformer.config),
            memory_bytes=memory_bytes(self._head) + (self._encoder.memory_bytes if self._encoder else 0),
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        return self._tokenizer.prepare(items, truncate)

    def collate(self, batch: Sequence[Prepared]) -> dict[str, Tensor] | PackedTokens:
        pairs = [cast("PairTokens", prepared.payload) for prepared in batch]
        ids, types = [pair.ids for pair in pairs], [pair.types for pair in pairs]
        if self._encoder is not None:
            return self._encoder.pack(ids, types if self._has_types else None)
        padded, mask = pad(ids, self._pad_id, self.info.max_tokens)
        features = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self._has_types:
            features["token_type_ids"] = torch.from_numpy(pad(types, 0, self.info.max_tokens)[0])
        return features

    @torch.inference_mode()
    def run(self, batch: dict[str, Tensor] | PackedTokens) -> NDArray[np.float32]:
        try:
            if isinstance(batch, PackedTokens):
                hidden = cast("BertEncoder", self._encoder)(batch.to(self._device))  # [batch, tokens, dim]
                scores = self._head(hidden)  # [batch, 1]
            else:
                features: dict[str, Any] = {
                    name: each.to(self._device, non_blocking=True) for name, each in batch.items()
                }
                scores = self._head(features | {"modality": "text"})["scores"]
            return cast("NDArray[np.float32]", scores.float().cpu().numpy())
        except torch.AcceleratorError as error:
            # An error in a kernel leaves the CUDA context unusable; running out of memory is another exception.
            raise DeviceLost(str(error)) from error

    def warm_up(self) -> None:
        warm_up(self)

    def _check_types(self, config: Any) -> None:
        """On a GPU a row that a table has not is more than an exception: the device is lost."""
        [probe] = self._tokenizer.prepare([Item(Pair("a", "a"))], "end")
        rows, used = getattr(config, "type_vocab_size", 0), int(probe.payload.types.max()) + 1
        if self._has_types and 0 < rows < used:
            raise ModelError(f"the tokenizer gives {used} token types, and config.json says type_vocab_size {rows}")


def load_library(folder: Path) -> CrossEncoder:
    """On the CPU, in float32 whatever the files hold. Runs no code of theirs, and unpickles tensors only."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        model: CrossEncoder = CrossEncoder(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
            activation_fn=nn.Identity(),  # or it would import the one that the files name
        )
        return model.eval()
    except pickle.UnpicklingError as error:
        raise UnsupportedModel(
            "the weights are a pickle with more than tensors in it, which could run any code: convert it to safetensors"
        ) from error
    except BROKEN as error:
        said = re.split(r"\. ", " ".join(str(error).split()))[0] or type(error).__name__
        reason = next((words for known, words in _IN_OUR_WORDS.items() if known in said), said)
        raise ModelError(f"the checkpoint cannot be loaded: {reason}") from error


def _place(transformer: Transformer, device: torch.device, dtype: torch.dtype) -> tuple[BertEncoder | None, nn.Module]:
    """On the device, with the encoder's products in `dtype`: our own encoder and the head behind it, or all as one.

    The head stays in float32: it is one row a pair, and nothing evens out its roundings.
    """
    model: Any = transformer.model
    encoder: Any = model.base_model
    transformer.to(device)
    if BertEncoder.covers(transformer.config):
        head = nn.Sequential(encoder.pooler, model.classifier) if encoder.pooler is not None else model.classifier
        return BertEncoder(encoder, dtype), head
    if dtype != torch.float32:
        use_mixed_products(encoder, dtype)
    return None, transformer


def activation_of(folder: Path, config: Any) -> Activation:
    """What the checkpoint says, in the order in which sentence-transformers looks. Raises `UnsupportedModel`."""
    saved: Mapping[str, Any] = {}
    if (folder / "modules.json").exists():
        saved = read_optional_object(folder / "config_sentence_transformers.json")
    own = getattr(config, "sentence_transformers", None)
    named = (
        saved.get("activation_fn")
        or (own.get("activation_fn") if isinstance(own, dict) else None)
        or getattr(config, "sbert_ce_default_activation_function", None)
    )
    if named is None:
        return "sigmoid"
    if not isinstance(named, str) or named not in _ACTIVATIONS:
        raise UnsupportedModel(f"the checkpoint's activation is {named!r}: known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[named]
