"""Sparse encoders in sentence-transformers' format (SPLADE, CSR, queries without inference), and bare language models.

Loading is that library's; the hot path is ours.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling, WeightedLayerPooling
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerBase

from mlx_embeddings_backends.base import Backend, Item, LoadOptions, ModelInfo, Prepared, SparseVector, Truncate
from mlx_embeddings_backends.errors import DeviceLost, InputError, ModelError, UnsupportedModel
from mlx_embeddings_backends.tokenization import Group, TextTokenizer, prepare_texts
from mlx_embeddings_backends.torch import sparse_modules
from mlx_embeddings_backends.torch.devices import TORCH_DTYPES, batch_tokens, choose_device, choose_dtype
from mlx_embeddings_backends.torch.sentence_transformer import check_text_only, check_weights, max_tokens_of
from mlx_embeddings_backends.torch.sparse_autoencoder import AutoEncoded, SparseAutoEncoder
from mlx_embeddings_backends.torch.splade import Splade

# Of a tokenizer that knows no limit, transformers says a number beyond this.
_NO_LIMIT: Final = 1_000_000_000
# What may stand between a Transformer and a SparseAutoEncoder: a dense model's modules.
_DENSE_MODULES: Final = (Dense, Dropout, LayerNorm, Normalize, Pooling, WeightedLayerPooling)


class Static:
    """A weight for each token that a text has, however often. Needs no device."""

    def __init__(self, embedding: SparseStaticEmbedding) -> None:
        self._weights = cast("NDArray[np.float32]", embedding.weight.detach().numpy())
        self.dimensions = self.vocabulary_size = len(self._weights)
        self.memory_bytes = self._weights.nbytes

    def pack(self, items: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        return [np.unique(ids) for ids in items]

    def __call__(self, tokens: Sequence[NDArray[np.int64]]) -> list[SparseVector]:
        present = [ids[self._weights[ids] != 0] for ids in tokens]
        return [SparseVector(ids.astype(np.int32), self._weights[ids]) for ids in present]


@dataclass(frozen=True, slots=True)
class Route:
    """What texts of some roles go through."""

    encoder: Splade | Static | AutoEncoded
    tokenizer: TextTokenizer

    @property
    def pools_prompt(self) -> bool:
        return not isinstance(self.encoder, AutoEncoded) or self.encoder.pools_prompt


@dataclass(frozen=True, slots=True)
class Way:
    """What all texts of a batch have in common."""

    route: int
    unpooled_tokens: int  # at the start, which pooling leaves out
    most_values: int | None  # of a vector that are kept; None: as many as the checkpoint says


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one way, packed by the encoder of its route."""

    way: Way
    inputs: Any


class SparseEncoderBackend(Backend):
    """One route for all texts or, with a Router, one for queries and another for documents."""

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        modules = sparse_modules.load(folder)
        chains = list({tuple(map(id, chain)): chain for chain in modules.routes.values()}.values())
        limits = [_limit(chain) for chain in chains]
        known = [limit for limit in limits if limit is not None]
        if not known:
            raise UnsupportedModel("the checkpoint says nowhere how many tokens it takes: set max_seq_length")
        # Where one route has no limit, as weights without a model need none, it is the longest of the others'.
        self._routes = [
            _make_route(chain, limit or max(known), device, TORCH_DTYPES[dtype])
            for chain, limit in zip(chains, limits, strict=True)
        ]
        self._route_of = {role: chains.index(chain) for role, chain in modules.routes.items()}
        self._most_values = modules.most_values
        self._device = device
        self._names = cast("PreTrainedTokenizerBase", cast("Any", chains[0][0]).tokenizer)
        encoders = [route.encoder for route in self._routes]
        self.info = ModelInfo(
            backend="torch",
            device=str(device),
            dtype=dtype,
            dimensions=max(encoder.dimensions for encoder in encoders),
            max_tokens=max(route.tokenizer.max_tokens for route in self._routes),
            vocabulary_size=min(encoder.vocabulary_size for encoder in encoders),
            normalize=False,
            batch_tokens=batch_tokens(device),
            outputs=("sparse",),
            prompts=modules.prompts,
            default_prompt=modules.default_prompt,
            memory_bytes=sum(encoder.memory_bytes for encoder in encoders),
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        prepared: dict[int, Prepared] = {}
        for number, route in enumerate(self._routes):
            places = [place for place, item in enumerate(items) if self._route_of[item.role] == number]
            try:
                made = prepare_texts(
                    route.tokenizer, [items[place] for place in places], truncate, pools_prompt=route.pools_prompt
                )
            except InputError as error:
                raise error.within(places) from None
            for place, each in zip(places, made, strict=True):
                way = Way(number, cast("Group", each.group).unpooled_tokens, items[place].max_active_dims)
                prepared[place] = replace(each, group=way)
        return [prepared[place] for place in range(len(items))]

    def collate(self, batch: Sequence[Prepared]) -> Batch:
        way = cast("Way", batch[0].group)
        ids: list[NDArray[np.int64]] = [prepared.payload for prepared in batch]
        encoder = self._routes[way.route].encoder
        # A GPU would be lost to it, or read whatever lies behind its table.
        if max(each.max() for each in ids) >= encoder.vocabulary_size:
            raise ModelError("the checkpoint's tokenizer gives token ids that its model does not have")
        return Batch(way, encoder.pack(ids))

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[SparseVector]:
        way, encoder = batch.way, self._routes[batch.way.route].encoder
        most = way.most_values or self._most_values
        try:
            if isinstance(encoder, AutoEncoded):
                return encoder(batch.inputs, way.unpooled_tokens, most)
            vectors = encoder(batch.inputs)
        except torch.AcceleratorError as error:
            # An error in a kernel leaves the CUDA context unusable; running out of memory is another exception.
            raise DeviceLost(str(error)) from error
        return vectors if most is None else [_largest(each, most) for each in vectors]

    def token_strings(self, ids: Sequence[int]) -> list[str] | None:
        if any(isinstance(route.encoder, AutoEncoded) for route in self._routes):
            return None  # the library would give the tokens that happen to have these numbers
        names = cast("list[str | None]", self._names.convert_ids_to_tokens(list(ids)))
        # Vocabularies are often filled up to a round number, with tokens that have no name.
        return [name if name is not None else "" for name in names]

    def warm_up(self) -> None:
        for role in {route: role for role, route in self._route_of.items()}.values():
            for count, words in ((1, 8), (8, 64)):
                self.run(self.collate(self.prepare([Item("warm " * words, role=role)] * count, truncate="end")))


def _limit(chain: Sequence[nn.Module]) -> int | None:
    """The tokens that a route takes. Raises `UnsupportedModel` for a chain of modules that is not known."""
    match chain:
        case [Transformer() as transformer, SpladePooling()]:
            _check_transformer(transformer, "fill-mask")
            check_weights(transformer.model)
            return max_tokens_of(transformer)
        case [Transformer() as transformer, *between, SparseAutoEncoder()] if _gives_one_vector(between):
            _check_transformer(transformer, "feature-extraction")
            check_weights(transformer.model, optional="pooler.")  # whose output is used nowhere
            return max_tokens_of(transformer)
        case [SparseStaticEmbedding() as embedding]:
            limit = embedding.max_seq_length
            return int(limit) if limit and 0 < limit < _NO_LIMIT else None
    names = ", ".join(type(module).__name__ for module in chain)
    raise UnsupportedModel(
        f"the sparse encoder is made of {names}: known are Transformer, SpladePooling; Transformer, Pooling, "
        "SparseAutoEncoder; and SparseStaticEmbedding alone"
    )


def _gives_one_vector(modules: Sequence[nn.Module]) -> bool:
    """Of a text's tokens, as a dense model's do."""
    pools = any(isinstance(module, Pooling) for module in modules)
    return pools and all(isinstance(module, _DENSE_MODULES) for module in modules)


def _check_transformer(transformer: Transformer, task: str) -> None:
    check_text_only(transformer)
    if transformer.transformer_task != task:
        raise UnsupportedModel(
            f"the checkpoint's Transformer is for {transformer.transformer_task!r}: before what follows it, only "
            f"{task!r} is known"
        )
    for name in ("query_length", "document_length", "query_expansion"):
        if getattr(transformer, name) is not None:
            raise UnsupportedModel(f"{name} of the checkpoint's sentence_bert_config.json is not known")


def _make_route(chain: Sequence[nn.Module], max_tokens: int, device: torch.device, dtype: torch.dtype) -> Route:
    encoder: Splade | Static | AutoEncoded
    tokenizer = deepcopy(cast("Any", chain[0]).tokenizer.backend_tokenizer)
    match chain:
        case [Transformer() as transformer, SpladePooling() as pooling]:
            encoder = Splade(transformer, pooling, max_tokens, device, dtype)
        case [Transformer() as transformer, *between, SparseAutoEncoder() as auto_encoder]:
            encoder = AutoEncoded(transformer, between, auto_encoder, max_tokens, device, dtype)
        case [SparseStaticEmbedding() as embedding]:
            encoder = Static(embedding)
            tokenizer.post_processor = TemplateProcessing(single="$A")  # no special tokens
    return Route(encoder, TextTokenizer(tokenizer, max_tokens=max_tokens, vocabulary_size=encoder.vocabulary_size))


def _largest(vector: SparseVector, count: int) -> SparseVector:
    """Those of the largest values, whatever their sign."""
    if len(vector.values) <= count:
        return vector
    places = np.sort(np.argpartition(-np.abs(vector.values), count - 1)[:count])
    return SparseVector(vector.indices[places], vector.values[places])
