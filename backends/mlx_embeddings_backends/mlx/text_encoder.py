"""Text encoders on MLX, in sentence-transformers' format or bare. mlx-embeddings has the layers; the rest is ours."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers

from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Prepared, Truncate
from mlx_embeddings_backends.errors import ModelError, UnsupportedModel
from mlx_embeddings_backends.files import read_optional_object, read_tokenizer
from mlx_embeddings_backends.mlx.checkpoint import TextCheckpoint, read_text_checkpoint
from mlx_embeddings_backends.mlx.device import (
    batch_tokens,
    choose_device,
    device_errors,
    fill,
    read_weights,
    use_device,
)
from mlx_embeddings_backends.mlx.encoders import make_encoder, own_name, own_weights
from mlx_embeddings_backends.mlx.modules import Normalize, Pooling, vector_modules
from mlx_embeddings_backends.tokenization import TextTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right."""

    ids: NDArray[np.int32]  # [batch, tokens]
    mask: NDArray[np.bool_]  # [batch, tokens], True where there is a token
    prompt_tokens: int  # that pooling leaves out


class MlxTextEncoder(Backend):
    """Transformer, then pooling and whatever modules follow it, as modules.json says."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        use_device(device)
        checkpoint = read_text_checkpoint(folder)
        config = checkpoint.config
        self._encoder = make_encoder(config)
        quantization = config.get("quantization") or {}
        dtype = fill(
            self._encoder,
            own_weights(read_weights(checkpoint.transformer)),
            options.dtype,
            {own_name(name): value for name, value in quantization.items()},
        )
        if not checkpoint.parts or checkpoint.parts[0].kind != "Pooling":
            raise UnsupportedModel("the MLX backend knows only Pooling behind the transformer: use --backend torch")
        self._pooling = Pooling(checkpoint.parts[0].config)
        if not (folder / "modules.json").exists():
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
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        tokens = self._tokenizer.encode(items, truncate)
        unpooled = {prompt: self._unpooled_tokens(prompt) for prompt in {item.prompt for item in items}}
        return [
            Prepared(each.ids, tokens=len(each.ids), truncated=each.truncated, group=unpooled[item.prompt])
            for item, each in zip(items, tokens, strict=True)
        ]

    def _unpooled_tokens(self, prompt: str) -> int:
        """Tokens at the start that pooling leaves out (INSTRUCTOR): the same for every item of a batch."""
        return 0 if not prompt or self._pooling.include_prompt else self._tokenizer.count_before_end(prompt)

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        """numpy: MLX's arrays belong to the thread that runs the model."""
        items: list[NDArray[np.int64]] = [prepared.payload for prepared in batch]
        longest = max(map(len, items))
        # Few lengths, so that buffers of their sizes come up again.
        longest = min(-(-longest // 8) * 8, self.info.max_tokens)
        ids = np.full((len(items), longest), self._encoder.pad_id, dtype=np.int32)
        mask = np.zeros((len(items), longest), dtype=np.bool_)
        for row, each in enumerate(items):
            ids[row, : len(each)] = each
            mask[row, : len(each)] = True
        if ids.max() >= self.info.vocabulary_size:  # MLX would read whatever lies behind its table
            raise ModelError("the checkpoint's tokenizer gives token ids that its model does not have")
        return Batch(ids, mask, cast(int, batch[0].group))

    def run(self, batch: Batch) -> NDArray[np.float32]:
        with device_errors():
            mask = mx.array(batch.mask)
            hidden = self._encoder(mx.array(batch.ids), mask).astype(mx.float32)  # [batch, tokens, dim]
            vectors = self._pooling(hidden, mask, batch.prompt_tokens)
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


def _tokenizer(checkpoint: TextCheckpoint) -> Tokenizer:
    tokenizer = read_tokenizer([checkpoint.transformer], remedy=", or use --backend torch")
    config = read_optional_object(checkpoint.transformer / "tokenizer_config.json")
    normalizer: Any = tokenizer.normalizer
    own_class = config.get("tokenizer_class") or "BertTokenizer"
    if isinstance(normalizer, normalizers.BertNormalizer) and own_class in ("BertTokenizer", "BertTokenizerFast"):
        # For these transformers goes by tokenizer_config.json, whatever tokenizer.json has.
        normalizer.lowercase = config.get("do_lower_case", True)
        normalizer.strip_accents = config.get("strip_accents")
        normalizer.handle_chinese_chars = config.get("tokenize_chinese_chars", True)
    if checkpoint.lower_case:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([normalizer] if normalizer is not None else [])]
        )
    return tokenizer
