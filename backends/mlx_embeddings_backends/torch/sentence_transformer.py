"""Text encoders in sentence-transformers' format, and bare ones. Loading is that library's; the hot path is ours."""

import logging
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from mlx_embeddings_backends import adapterhub
from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Prepared, Rows, Truncate
from mlx_embeddings_backends.errors import DeviceLost, ModelError, UnsupportedModel
from mlx_embeddings_backends.tokenization import Group, TextTokenizer, pad, prepare_texts
from mlx_embeddings_backends.torch.bert import BertEncoder, PackedTokens
from mlx_embeddings_backends.torch.devices import (
    TORCH_DTYPES,
    batch_tokens,
    choose_device,
    choose_dtype,
    memory_bytes,
)
from mlx_embeddings_backends.torch.mixed_precision import use_mixed_products
from mlx_embeddings_backends.torch.tensor_files import read_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Features of the first module, or tokens for our own encoder; and what the modules behind it look at."""

    tokens: dict[str, Tensor] | PackedTokens
    group: Group


class SentenceTransformerBackend(Backend):
    """Transformer, then pooling and whatever modules follow it, as modules.json says."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        model = _load(folder)
        transformer, *rest = model.children()
        assert isinstance(transformer, Transformer)
        check_text_only(transformer)
        # The pooler's output is used nowhere, and often left out.
        check_weights(transformer.model, optional="pooler.")
        self._hidden_size = cast("int", transformer.get_embedding_dimension())
        if not (folder / "modules.json").exists():
            rest = self._assume_modules(rest, options)
        normalize = isinstance(rest[-1], Normalize) and rest[-1].module_input_name == "sentence_embedding"
        self._after: list[nn.Module] = [module.to(device) for module in (rest[:-1] if normalize else rest)]
        self._pools_prompt = all(module.include_prompt for module in rest if isinstance(module, Pooling))
        self._device = device
        self._encoder, self._transformer = place_encoder(transformer, device, TORCH_DTYPES[dtype], options.adapters)

        self._vocabulary = tokenizer = transformer.tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        vocabulary_size = transformer.model.get_input_embeddings().num_embeddings
        max_tokens = max_tokens_of(transformer)
        self._tokenizer = TextTokenizer(
            tokenizer.backend_tokenizer, max_tokens=max_tokens, vocabulary_size=vocabulary_size
        )
        self.info = ModelInfo(
            backend="torch",
            device=str(device),
            dtype=dtype,
            dimensions=model.truncate_dim or cast("int", model.get_embedding_dimension()),
            max_tokens=max_tokens,
            vocabulary_size=vocabulary_size,
            normalize=normalize,
            batch_tokens=batch_tokens(device),
            prompts={name: prompt or "" for name, prompt in model.prompts.items()},
            default_prompt=model.default_prompt_name,
            adapters=tuple(options.adapters),
            separator=tokenizer.sep_token,
            memory_bytes=memory_bytes(*self._after) + self._encoder_bytes(),
        )

    def _encoder_bytes(self) -> int:
        return (
            memory_bytes(cast("nn.Module", self._transformer)) if self._encoder is None else self._encoder.memory_bytes
        )

    def _assume_modules(self, assumed: list[nn.Module], options: LoadOptions) -> list[nn.Module]:
        """What follows a transformer whose folder has no modules.json; `assumed` are sentence-transformers' own."""
        if options.adapters:  # which are trained to give their vector in place of [CLS]
            return [Pooling(self._hidden_size, "cls")]
        modes = [module.pooling_mode for module in assumed if isinstance(module, Pooling)]
        log.warning("no modules.json says how tokens become a vector: %s pooling is used", *modes)
        return assumed

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        return prepare_texts(
            self._tokenizer, items, truncate, adapters=self.info.adapters, pools_prompt=self._pools_prompt
        )

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        items: list[NDArray[np.int64]] = [prepared.payload for prepared in batch]
        group = cast("Group", batch[0].group)
        if self._encoder is not None:
            return Batch(self._encoder.pack(items), group)
        ids, mask = pad(items, self._pad_id, self.info.max_tokens)
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        return Batch(features, group)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Rows:
        try:
            return self._forward(batch)
        except torch.AcceleratorError as error:
            # An error in a kernel leaves the CUDA context unusable; running out of memory is another exception.
            raise DeviceLost(str(error)) from error

    def _forward(self, batch: Batch) -> Rows:
        return self._pool(self._encode(batch), batch.group)

    def _encode(self, batch: Batch) -> dict[str, Any]:
        """`token_embeddings`, float32 [batch, longest, dim], and what else the modules behind it look at."""
        features: dict[str, Any]
        if isinstance(batch.tokens, PackedTokens):
            packed = batch.tokens.to(self._device)
            features = {
                "token_embeddings": cast("BertEncoder", self._encoder)(packed, batch.group.adapter),
                "attention_mask": packed.attention_mask,
            }
        else:
            features = {name: each.to(self._device, non_blocking=True) for name, each in batch.tokens.items()}
            features = cast("nn.Module", self._transformer)(features | {"modality": "text"})
            features["token_embeddings"] = features["token_embeddings"].float()
        return features

    def _pool(self, features: dict[str, Any], group: Group) -> NDArray[np.float32]:
        if group.unpooled_tokens:
            features["prompt_length"] = group.unpooled_tokens
        for module in self._after:
            features = module(features)
        rows = features["sentence_embedding"][:, : self.info.dimensions]  # [batch, dimensions]
        return cast("NDArray[np.float32]", rows.float().cpu().numpy())


def _load(folder: Path) -> SentenceTransformer:
    """On the CPU, in float32 whatever the files hold. Runs no code of theirs, and unpickles tensors only."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        return SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
        ).eval()
    except pickle.UnpicklingError as error:
        raise UnsupportedModel(
            "the weights are a pickle with more than tensors in it, which could run any code: convert it to safetensors"
        ) from error


def place_encoder(
    transformer: Transformer, device: torch.device, dtype: torch.dtype, adapters: Mapping[str, Path]
) -> tuple[BertEncoder | None, nn.Module | None]:
    """The encoder on its device with products in `dtype`: our own forward pass where it covers the architecture."""
    keeps_only_last_layer = not getattr(transformer.config, "output_hidden_states", False)
    if BertEncoder.covers(transformer.config) and keeps_only_last_layer:
        layers = adapterhub.read(adapters, transformer.config.to_dict(), read_tensors)
        transformer.to(device)
        return BertEncoder(transformer.model, dtype, layers), None
    if adapters:
        raise UnsupportedModel(
            "adapters are known for a plain BERT only, and config.json describes another: absolute positions, no "
            "decoder, no output_hidden_states"
        )
    if dtype != torch.float32:
        use_mixed_products(transformer.model, dtype)
    return None, transformer.to(device)


def check_text_only(transformer: Transformer, output: str = "token_embeddings") -> None:
    """Raises `UnsupportedModel` unless it makes `output` of texts as its tokenizer has them, and of nothing else."""
    if set(transformer.modality_config) != {"text"}:
        raise UnsupportedModel(
            f"the transformer takes {', '.join(map(str, transformer.modality_config))}: only text is known"
        )
    if transformer.module_output_name != output:
        raise UnsupportedModel(f"the transformer gives {transformer.module_output_name!r}: only {output!r} is known")
    if transformer.processing_kwargs:
        raise UnsupportedModel(
            f"processing_kwargs {sorted(transformer.processing_kwargs)} of the checkpoint are not known"
        )
    if not getattr(transformer.tokenizer, "is_fast", False):
        raise UnsupportedModel("the checkpoint's tokenizer has no tokenizer.json, and none can be made of its files")


def check_weights(model: nn.Module, *, optional: str | None = None) -> None:
    """transformers makes up what the files lack from random numbers, and says so in its log alone.

    `optional` begins the names of those that may be missing. Raises `ModelError`.
    """
    lacking = [
        name
        for name, parameter in model.named_parameters()
        # The flag is transformers' own, set on what it loaded.
        if not getattr(parameter, "_is_hf_initialized", False) and not (optional and name.startswith(optional))
    ]
    if lacking:
        raise ModelError(f"the files lack {len(lacking)} of the model's weights, such as {lacking[0]}")


def max_tokens_of(transformer: Transformer) -> int:
    """`max_seq_length`, held to the positions that the model has."""
    positions = getattr(transformer.config, "max_position_embeddings", None) or 0
    encoder = transformer.model.base_model
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # RoBERTa's first position is padding_idx + 1.
        positions = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    limits = [limit for limit in (transformer.max_seq_length, positions) if limit and 0 < limit < 1_000_000_000]
    if not limits:
        raise UnsupportedModel("the checkpoint says nowhere how many tokens it takes: set max_seq_length")
    return int(min(limits))
