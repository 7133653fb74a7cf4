"""Text encoders on MLX, in sentence-transformers' format or bare. mlx-embeddings has the layers; the rest is ours."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from mlx_embeddings_backends import adapterhub
from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Prepared, Truncate
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import (
    BERT_TOKENS,
    make_bert_tokenizer,
    read_optional_object,
    read_tokenizer,
    special_tokens,
)
from mlx_embeddings_backends.mlx.checkpoint import TextCheckpoint, read_text_checkpoint
from mlx_embeddings_backends.mlx.device import (
    DTYPES,
    batch_tokens,
    choose_device,
    device_errors,
    fill,
    memory_bytes,
    read_tensors,
    read_weights,
    use_device,
)
from mlx_embeddings_backends.mlx.encoders import Bert, Bottleneck, make_encoder, own_name, own_weights
from mlx_embeddings_backends.mlx.modules import Normalize, Pooling, vector_modules
from mlx_embeddings_backends.tokenization import Group, TextTokenizer, pad, prepare_texts

log = logging.getLogger(__name__)

# transformers' defaults, where a tokenizer's JSON files do not say.
TOKENIZER_CLASSES: Final = {"bert": "BertTokenizer", "xlm-roberta": "XLMRobertaTokenizer"}
SEPARATORS: Final = {"BertTokenizer": BERT_TOKENS["sep_token"], "XLMRobertaTokenizer": "</s>"}


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right."""

    ids: NDArray[np.int32]  # [batch, tokens]
    mask: NDArray[np.bool_]  # [batch, tokens], True where there is a token
    group: Group


class MlxTextEncoder(Backend):
    """Transformer, then pooling and whatever modules follow it, as modules.json says."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        use_device(device)
        checkpoint = read_text_checkpoint(folder, has_adapters=bool(options.adapters))
        config = checkpoint.config
        self._encoder = make_encoder(config)
        quantization = config.get("quantization") or {}
        dtype = fill(
            self._encoder,
            own_weights(read_weights(checkpoint.transformer)),
            options.dtype,
            {own_name(name): value for name, value in quantization.items()},
        )
        bottlenecks = self._read_adapters(options.adapters, config, DTYPES[dtype])
        # The encoder's forward pass with each adapter, or that of None where there are none.
        self._forward: dict[str | None, Callable[[mx.array, mx.array], mx.array]] = {
            name: partial(cast("Bert", self._encoder), bottlenecks=layers) for name, layers in bottlenecks.items()
        } or {None: self._encoder}
        if not checkpoint.parts or checkpoint.parts[0].kind != "Pooling":
            raise UnsupportedModel("the MLX backend knows only Pooling behind the transformer: use --backend torch")
        self._pooling = Pooling(checkpoint.parts[0].config)
        if not (folder / "modules.json").exists() and not options.adapters:
            log.warning("no modules.json says how tokens become a vector: %s pooling is used", *self._pooling.modes)
        dimensions = self._encoder.dimensions * len(self._pooling.modes)
        modules = vector_modules(checkpoint.parts[1:], dimensions)
        dimensions = modules[-1].dimensions if modules else dimensions
        normalize = bool(modules) and isinstance(modules[-1], Normalize)
        self._after = modules[:-1] if normalize else modules

        max_tokens = _max_tokens(checkpoint.max_seq_length, self._encoder.positions)
        self._tokenizer = TextTokenizer(
            _tokenizer(checkpoint), max_tokens=max_tokens, vocabulary_size=self._encoder.vocabulary_size
        )
        self.info = ModelInfo(
            backend="mlx",
            device=device,
            dtype=dtype,
            dimensions=min(checkpoint.truncate_dim or dimensions, dimensions),
            max_tokens=max_tokens,
            vocabulary_size=self._encoder.vocabulary_size,
            normalize=normalize,
            batch_tokens=batch_tokens(device),
            prompts=checkpoint.prompts,
            default_prompt=checkpoint.default_prompt,
            adapters=tuple(options.adapters),
            separator=_separator(checkpoint),
            memory_bytes=memory_bytes(self._encoder, *(module for module in modules if isinstance(module, Module)))
            + sum(layer.nbytes for layers in bottlenecks.values() for layer in layers),
        )

    def _read_adapters(
        self, folders: Mapping[str, Path], config: Mapping[str, Any], dtype: mx.Dtype
    ) -> dict[str, list[Bottleneck]]:
        """By name, what each adapter adds behind each layer."""
        if not folders:
            return {}
        if not isinstance(self._encoder, Bert):
            raise UnsupportedModel(f"adapters are known for BERT only, not for {config.get('model_type')!r}")
        adapters = adapterhub.read(folders, config, read_tensors)
        return {
            name: [Bottleneck(layer, each.non_linearity, dtype) for layer in each.layers]
            for name, each in adapters.items()
        }

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        return prepare_texts(
            self._tokenizer,
            items,
            truncate,
            adapters=self.info.adapters,
            pools_prompt=self._pooling.include_prompt,
        )

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        """numpy: MLX's arrays belong to the thread that runs the model."""
        ids, mask = pad([prepared.payload for prepared in batch], self._encoder.pad_id, self.info.max_tokens)
        if ids.max() >= self.info.vocabulary_size:  # MLX would read whatever lies behind its table
            raise ModelError("the checkpoint's tokenizer gives token ids that its model does not have")
        return Batch(ids.astype(np.int32), mask, cast("Group", batch[0].group))

    def run(self, batch: Batch) -> NDArray[np.float32]:
        with device_errors():
            mask = mx.array(batch.mask)
            hidden = self._forward[batch.group.adapter](mx.array(batch.ids), mask)  # [batch, tokens, dim]
            vectors = self._pooling(hidden.astype(mx.float32), mask, batch.group.unpooled_tokens)
            for module in self._after:
                vectors = module(vectors)
            vectors = vectors[:, : self.info.dimensions]  # [batch, dimensions]
            mx.eval(vectors)
        return np.array(vectors)


def _max_tokens(max_seq_length: float | None, positions: int) -> int:
    """`max_seq_length`, held to the positions that the model has."""
    limits = [limit for limit in (max_seq_length, positions) if limit and 0 < limit < 1_000_000_000]
    if not limits:
        raise UnsupportedModel("the checkpoint says nowhere how many tokens it takes: set max_seq_length")
    return int(min(limits))


def _tokenizer_class(checkpoint: TextCheckpoint) -> str:
    """As transformers finds it."""
    named = read_optional_object(checkpoint.transformer / "tokenizer_config.json").get("tokenizer_class")
    return str(named or TOKENIZER_CLASSES.get(checkpoint.config["model_type"])).removesuffix("Fast")


def _separator(checkpoint: TextCheckpoint) -> str | None:
    default = SEPARATORS.get(_tokenizer_class(checkpoint))
    return special_tokens(checkpoint.transformer).get("sep_token", default)


def _tokenizer(checkpoint: TextCheckpoint) -> Tokenizer:
    folder = checkpoint.transformer
    is_bert = _tokenizer_class(checkpoint) == "BertTokenizer"
    if is_bert and not (folder / "tokenizer.json").exists() and (folder / "vocab.txt").exists():
        tokenizer = make_bert_tokenizer(folder)
    else:
        tokenizer = read_tokenizer([folder], remedy=", or use --backend torch")
    config = read_optional_object(folder / "tokenizer_config.json")
    normalizer: Any = tokenizer.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer) and is_bert:
        # For this class transformers goes by tokenizer_config.json, whatever tokenizer.json has.
        normalizer.lowercase = config.get("do_lower_case", True)
        normalizer.strip_accents = config.get("strip_accents")
        normalizer.handle_chinese_chars = config.get("tokenize_chinese_chars", True)
    if checkpoint.lower_case:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([normalizer] if normalizer is not None else [])]
        )
    return tokenizer
