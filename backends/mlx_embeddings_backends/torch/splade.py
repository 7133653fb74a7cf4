"""SPLADE: token ids to a sparse vector, by way of a masked language model and the best of its logits.

The logits of a batch are [tokens, vocabulary]: 2 GB for 2,048 tokens of XLM-R. They are made for a few tokens of the
vocabulary at a time, pooled, and only what is not zero is kept. The largest is taken before the activation, which
changes no order: of [batch, vocabulary] numbers then, not of [tokens, vocabulary]. arXiv:2109.10086.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlx_embeddings_backends.base import SparseVector
from mlx_embeddings_backends.errors import UnsupportedModel
from mlx_embeddings_backends.tokenization import pad
from mlx_embeddings_backends.torch.bert import BertEncoder, PackedTokens, round_up
from mlx_embeddings_backends.torch.mixed_precision import use_mixed_products

# Of logits at a time, as float32. On a CPU they are to stay in its caches until they are pooled.
CPU_PIECE_BYTES: Final = 8 << 20
GPU_PIECE_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Texts:
    """A batch, the shortest text first."""

    tokens: PackedTokens | tuple[Tensor, Tensor]  # for our own encoder, or ids and attention mask [batch, longest]
    places: Tensor  # [rows], of each token in the flattened padded batch, and behind them filler up to a round number
    runs: list[tuple[int, int]]  # how many texts of which length follow one another
    order: NDArray[np.int64]  # [batch], each text's place in what was given


class Projection:
    """Hidden states to sparse vectors: the last product of a masked language model, pooled over each text."""

    def __init__(self, decoder: nn.Linear, pooling: SpladePooling, dtype: torch.dtype) -> None:
        self.weight: Tensor = decoder.weight.detach().to(dtype)  # [vocabulary, dim]
        bias = decoder.weight.new_zeros(len(self.weight)) if decoder.bias is None else decoder.bias.detach()
        # Logits are rounded once it is added, when those that count are small; what it lost itself comes afterwards.
        self.bias = bias.to(dtype)
        self.rest_of_bias = bias - self.bias.float()
        self.takes_largest = pooling.pooling_strategy == "max"
        self.logarithms = 2 if pooling.activation_function == "log1p_relu" else 1
        on_cpu = self.weight.device.type == "cpu"
        self.piece_bytes = CPU_PIECE_BYTES if on_cpu else GPU_PIECE_BYTES

    def __call__(self, hidden: Tensor, runs: Sequence[tuple[int, int]]) -> list[SparseVector]:
        """hidden [rows, dim], the texts of `runs` end to end -> a vector of each."""
        hidden = hidden.to(self.weight.dtype)
        rows, columns, values = [], [], []
        width = self._width(len(hidden))
        for start in range(0, len(self.weight), width):
            pooled = self._pool(hidden, runs, start, start + width)
            row, column = pooled.nonzero(as_tuple=True)
            values.append(pooled[row, column])
            rows.append(row.to(torch.int32))
            columns.append((column + start).to(torch.int32))
        texts = sum(count for count, _ in runs)
        return list(_split(_joined(rows), _joined(columns), _joined(values), texts))

    def _width(self, rows: int) -> int:
        """How many tokens of the vocabulary at a time: a power of two, so that few shapes come up."""
        most = max(1, self.piece_bytes // (4 * rows))
        return min(1 << (most.bit_length() - 1), len(self.weight))

    def _pool(self, hidden: Tensor, runs: Sequence[tuple[int, int]], start: int, end: int) -> Tensor:
        """-> float32 [texts, end - start]"""
        logits = functional.linear(hidden, self.weight[start:end], self.bias[start:end])  # [rows, width]
        rest = self.rest_of_bias[start:end]
        if not self.takes_largest:
            logits = self._activate(logits.float() + rest)
        pooled, at = [], 0
        for count, length in runs:
            run = logits[at : at + count * length].view(count, length, -1)
            pooled.append(run.amax(dim=1) if self.takes_largest else run.sum(dim=1))
            at += count * length
        joined = torch.cat(pooled)
        return self._activate(joined.float() + rest) if self.takes_largest else joined

    def _activate(self, logits: Tensor) -> Tensor:
        """In place. What is not a number stays so."""
        logits.relu_()
        for _ in range(self.logarithms):
            logits.log1p_()
        return logits


class Splade:
    """A Transformer and the SpladePooling behind it, on a device. `pack` may be called from any thread."""

    def __init__(
        self,
        transformer: Transformer,
        pooling: SpladePooling,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        model = transformer.model
        nn.Module.to(model, device)
        decoder = model.get_output_embeddings()
        if type(decoder) is not nn.Linear:
            raise UnsupportedModel(f"{type(model).__name__} does not end in a product with its vocabulary")
        self._device = device
        self._max_tokens = max_tokens
        self._pad_id = int(cast("PreTrainedTokenizerBase", transformer.tokenizer).pad_token_id or 0)
        self._projection = Projection(decoder, pooling, dtype)
        self._encoder: BertEncoder | None = None
        self._model: nn.Module = model  # or what stands between our own encoder and the projection
        _take_out(model, decoder)
        if BertEncoder.covers(model.config):
            self._encoder = BertEncoder(cast("PreTrainedModel", model.base_model), dtype)
            [self._model] = [child for child in model.children() if child is not model.base_model]
        if dtype != torch.float32:
            use_mixed_products(self._model, dtype)
        self.vocabulary_size = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
        self.dimensions = len(self._projection.weight)
        words = cast("Tensor", model.get_input_embeddings().weight)
        self.memory_bytes = self._memory_bytes(is_tied=words.data_ptr() == self._projection.weight.data_ptr())

    def pack(self, items: Sequence[NDArray[np.int64]]) -> Texts:
        """Token ids of each text -> what a call takes."""
        order = np.argsort([len(ids) for ids in items], kind="stable")
        items = [items[place] for place in order]
        runs = [(len(list(group)), length) for length, group in groupby(map(len, items))]
        tokens: PackedTokens | tuple[Tensor, Tensor]
        if self._encoder is not None:
            tokens = self._encoder.pack(items)
            places = tokens.places
        else:
            ids, mask = pad(items, self._pad_id, self._max_tokens)
            tokens = torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
            places = torch.from_numpy(np.flatnonzero(mask))
        places = functional.pad(places, (0, round_up(len(places)) - len(places)))
        return Texts(tokens, places, runs, order)

    def __call__(self, texts: Texts) -> list[SparseVector]:
        """-> a vector of each text, in the order given to `pack`."""
        if isinstance(texts.tokens, PackedTokens):
            hidden = cast("BertEncoder", self._encoder)(texts.tokens.to(self._device))  # [batch, longest, dim]
            hidden = self._model(self._tokens_of(hidden, texts))
        else:
            ids, mask = (each.to(self._device, non_blocking=True) for each in texts.tokens)
            hidden = self._tokens_of(self._model(input_ids=ids, attention_mask=mask).logits, texts)
        vectors = self._projection(hidden, texts.runs)
        places = np.argsort(texts.order)
        return [vectors[place] for place in places]

    def _tokens_of(self, hidden: Tensor, texts: Texts) -> Tensor:
        """[batch, longest, dim] -> [rows, dim]"""
        return hidden.flatten(0, 1).index_select(0, texts.places.to(self._device, non_blocking=True))

    def _memory_bytes(self, *, is_tied: bool) -> int:
        held = [*self._model.parameters(), *self._model.buffers(), self._projection.bias, self._projection.rest_of_bias]
        if not is_tied:
            held.append(self._projection.weight)
        return sum(tensor.nbytes for tensor in held) + (self._encoder.memory_bytes if self._encoder else 0)


def _take_out(model: nn.Module, layer: nn.Module) -> None:
    """So that the model gives what the layer would have been given."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is layer:
                setattr(parent, name, nn.Identity())


def _joined(parts: list[Tensor]) -> NDArray[Any]:
    return torch.cat(parts).cpu().numpy()


def _split(
    rows: NDArray[np.int32], columns: NDArray[np.int32], values: NDArray[np.float32], texts: int
) -> Iterator[SparseVector]:
    """Non-zeros of many texts, ascending within each, to those of each."""
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum(np.bincount(rows, minlength=texts))
    for end, count in zip(ends, np.diff(ends, prepend=0), strict=True):
        places = order[end - count : end]
        yield SparseVector(columns[places], values[places])
