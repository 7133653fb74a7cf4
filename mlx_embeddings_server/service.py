"""embed(): inputs and what the caller wants of them to vectors, in the order of the inputs."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import (
    EncodedImage,
    Item,
    ModelInfo,
    Output,
    PatchGrid,
    Row,
    SparseVector,
    Truncate,
    Vector,
)
from mlx_embeddings_server.cache.result_cache import ResultCache
from mlx_embeddings_server.failures import as_api_errors
from mlx_embeddings_server.inputs.images import ImageLoader
from mlx_embeddings_server.inputs.parse import Content, ImageSource
from mlx_embeddings_server.inputs.token_encoding import TokenDecoder
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.options import (
    EmbedOptions,
    adapter_of,
    check_pooling,
    check_prompt_has_text,
    check_token_ids,
    check_truncate,
    invalid_value,
    outputs_of,
    prompt_of,
)
from mlx_embeddings_server.pooling import normalized, pool_patches, pool_tokens
from mlx_embeddings_server.providers.base import REMOTE, ProviderFailed, Timings, Vectors
from mlx_embeddings_server.request_record import add_tokens, note_inputs
from mlx_embeddings_server.settings import DimensionsPolicy
from mlx_embeddings_server.tracing import stages

_UNIT_TOLERANCE = 1e-3  # of a vector's length: what half precision leaves of it
# What a caller asks for takes memory: that vectors are filled up to, and of all of a request's vectors together.
_MOST_DIMENSIONS = 16_384
_MOST_PADDED = 2048 * _MOST_DIMENSIONS


@dataclass(frozen=True, slots=True)
class Table:
    """Vectors of one kind, those of one input after those of another."""

    rows: NDArray[np.float32]  # [vectors, dimensions]
    lengths: list[int] | None  # multi_vector: how many of the rows are each input's. Else each has one


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in the order of the inputs, and the account of what they took."""

    tables: Mapping[Output, Table]  # dense and multi_vector, of those that were asked for
    sparse: list[SparseVector] | None
    patches: list[PatchGrid | None]  # of each input
    prompt_tokens: int
    truncated: list[int]  # indexes of the inputs that were cut
    provider: str
    timings: Timings

    @property
    def table(self) -> Table:
        """The only one, or the first that was asked for."""
        return next(iter(self.tables.values()))


class EmbeddingService:
    """Decides; routes translate. All errors that it raises are `ApiError`s."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        dimensions_policy: DimensionsPolicy,
        token_decoder: TokenDecoder | None,
        image_loader: ImageLoader,
        cache: ResultCache | None = None,
    ) -> None:
        self.dimensions_policy = dimensions_policy
        self._metrics = metrics
        self._token_decoder = token_decoder
        self._image_loader = image_loader
        self.cache = cache

    async def embed(
        self, model: Model, contents: Sequence[Content], options: EmbedOptions, *, field: str = "input"
    ) -> Embeddings:
        """Duplicates are computed once. `field` is what the request calls the contents, for messages."""
        info = model.info
        note_inputs(model.name, len(contents))
        wanted = outputs_of(model, options)
        self._check_dimensions(info, options)
        check_truncate(model, options.truncate)
        check_pooling(wanted, options, contents, field)
        prompt, adapter = prompt_of(info, options), adapter_of(info, options)
        check_prompt_has_text(contents, prompt, options, field)
        if model.spec.is_remote:  # whose ids are its provider's own
            check_token_ids(contents, field)
        else:
            contents = await self._decode_token_ids(contents, field)
        loaded = await self.load_images(contents, field)
        places: dict[str | tuple[int, ...] | EncodedImage, int] = {}
        place_of = [places.setdefault(content, len(places)) for content in loaded]
        named = wanted if len(info.outputs) > 1 else ()
        # Token ids and images carry no prompt: the model's default one is for texts.
        items = [
            Item(each, prompt if isinstance(each, str) else "", options.role, adapter, named, options.max_active_dims)
            for each in places
        ]
        errors = as_api_errors(field, place_of)
        vectors = await self.run(model, items, options.truncate, errors, is_cached=options.is_cached)
        accounts = [vectors.accounts[place] for place in place_of]
        prompt_tokens = sum(account.tokens for account in accounts)
        self.account(model, len(contents), prompt_tokens)
        patches = [account.patches for account in vectors.accounts]
        tables: dict[Output, Table] = {}
        if "dense" in wanted:
            rows = _of("dense", vectors.rows, is_named=bool(named))
            tables["dense"] = Table(self._shape(info, np.stack([rows[place] for place in place_of]), options), None)
        if "multi_vector" in wanted:
            rows, patches = await _pooled(_of("multi_vector", vectors.rows, is_named=bool(named)), patches, options)
            rows = [rows[place] for place in place_of]
            tables["multi_vector"] = Table(self._shape(info, np.concatenate(rows), options), list(map(len, rows)))
        sparse = None
        if "sparse" in wanted:
            found = [_sparse(row, options.max_active_dims) for row in vectors.rows]
            sparse = [found[place] for place in place_of]
        return Embeddings(
            tables={output: tables[output] for output in wanted if output in tables},
            sparse=sparse,
            patches=[patches[place] for place in place_of],
            prompt_tokens=prompt_tokens,
            truncated=[index for index, account in enumerate(accounts) if account.truncated],
            provider=model.provider.name,
            timings=vectors.timings,
        )

    async def run(
        self,
        model: Model,
        items: Sequence[Item],
        truncate: Truncate | None,
        errors: AbstractContextManager[None],
        *,
        is_cached: bool = True,
    ) -> Vectors:
        """The model's raw rows, which are not to be changed. `errors` turns what goes wrong into `ApiError`s."""
        truncate = truncate or model.spec.truncate
        with errors:
            if self.cache is None or not is_cached:
                return await self._compute(model, truncate, items)
            return await self.cache.embed(model, items, truncate, partial(self._compute, model, truncate))

    async def _compute(self, model: Model, truncate: Truncate, items: Sequence[Item]) -> Vectors:
        if model.spec.is_remote:
            vectors = await self._compute_elsewhere(model, truncate, items)
        else:
            vectors = await model.provider.embed(items, truncate)
            times = vectors.timings
            stages(tokenize=times.tokenize_seconds, queue=times.queue_seconds, inference=times.inference_seconds)
        self._metrics.observe_wait(model.label, vectors.timings.queue_seconds)
        return vectors

    async def _compute_elsewhere(self, model: Model, truncate: Truncate, items: Sequence[Item]) -> Vectors:
        started = time.perf_counter()
        try:
            vectors = await model.provider.embed(items, truncate)
        except ProviderFailed as error:
            if error.counts:  # else it answered, or was not asked
                self._metrics.observe_provider(model.provider.name, time.perf_counter() - started, failed=True)
            raise
        self._metrics.observe_provider(model.provider.name, time.perf_counter() - started, failed=False)
        return vectors

    def account(self, model: Model, inputs: int, tokens: int) -> None:
        """What a request has taken that is about to be answered: for its caller's limits, the log and the metrics."""
        add_tokens(tokens)
        self._metrics.observe_answer(model.label, inputs, tokens)

    async def _decode_token_ids(self, contents: Sequence[Content], field: str) -> Sequence[Content]:
        decoder = self._token_decoder
        if decoder is None or not any(isinstance(content, tuple) for content in contents):
            return contents

        def decode() -> list[Content]:
            return [
                decoder.decode(content, f"{field}[{index}]") if isinstance(content, tuple) else content
                for index, content in enumerate(contents)
            ]

        return await asyncio.to_thread(decode)

    async def load_images(self, contents: Sequence[Content], field: str) -> list[str | tuple[int, ...] | EncodedImage]:
        """The images' files in the place of what they were named by: all of them, or an error."""
        sources = [
            (content.source, f"{field}[{index}]")
            for index, content in enumerate(contents)
            if isinstance(content, ImageSource)
        ]
        files = iter(await self._image_loader.load_all(sources) if sources else ())
        return [
            EncodedImage(next(files), content.text) if isinstance(content, ImageSource) else content
            for content in contents
        ]

    def policy(self, options: EmbedOptions) -> DimensionsPolicy:
        return options.dimensions_policy or self.dimensions_policy

    def _check_dimensions(self, info: ModelInfo, options: EmbedOptions) -> None:
        wanted = options.dimensions
        most = {"reduce": info.dimensions, "pad": _MOST_DIMENSIONS}.get(self.policy(options))
        if wanted is not None and most is not None and wanted > most:
            raise invalid_value(
                f"dimensions is {wanted}, the most is {most} (the model's vectors have {info.dimensions})", "dimensions"
            )

    def _shape(self, info: ModelInfo, rows: NDArray[np.float32], options: EmbedOptions) -> NDArray[np.float32]:
        """Slice or pad to the asked dimensions, then normalise."""
        wanted, full = options.dimensions, rows
        if wanted is not None and self.policy(options) != "ignore":
            if wanted > rows.shape[1] and len(rows) * wanted > _MOST_PADDED:
                most = _MOST_PADDED // len(rows)
                message = f"dimensions is {wanted}, the most that {len(rows)} vectors are filled up to is {most}"
                raise invalid_value(message, "dimensions")
            rows = np.pad(rows[:, :wanted], ((0, 0), (0, max(0, wanted - rows.shape[1]))))
        if info.normalize if options.normalize is None else options.normalize:
            return normalized(rows)
        if info.device == REMOTE and options.normalize is None and rows.shape[1] < full.shape[1]:
            # Nobody says whether another server normalises: what came with length 1 has it after the cut, too.
            is_unit = np.abs(np.linalg.norm(full, axis=1, keepdims=True) - 1) < _UNIT_TOLERANCE
            return np.where(is_unit, normalized(rows), rows)
        return rows


def _of(output: Output, rows: Sequence[Row], *, is_named: bool) -> list[NDArray[np.float32]]:
    """Each item's rows of one kind, which are by name where several kinds may be asked for."""
    found = [cast("Mapping[Output, Vector]", row)[output] for row in rows] if is_named else rows
    return cast("list[NDArray[np.float32]]", found)


def _sparse(row: Row, most: int | None) -> SparseVector:
    vector = row["sparse"] if isinstance(row, Mapping) else row
    assert isinstance(vector, SparseVector)
    if most is None or len(vector.indices) <= most:
        return vector
    kept = np.sort(np.argsort(-vector.values, kind="stable")[:most])  # of equal values the first
    return SparseVector(vector.indices[kept], vector.values[kept])


async def _pooled(
    each: list[NDArray[np.float32]], patches: list[PatchGrid | None], options: EmbedOptions
) -> tuple[list[NDArray[np.float32]], list[PatchGrid | None]]:
    """Each item's vectors after `pool` or `token_pool_factor`, and its patch grid."""
    if (pool := options.pool) is not None:
        pooled = [
            pool_patches(normalized(rows), grid, pool)
            for rows, grid in zip(each, patches, strict=True)
            if grid is not None
        ]
        return [rows for rows, _ in pooled], [grid for _, grid in pooled]
    if (factor := options.token_pool_factor) is not None and factor > 1:
        # A page takes some 50 ms of a processor.
        rows = await asyncio.to_thread(lambda: [pool_tokens(normalized(rows), factor) for rows in each])
        return rows, [None] * len(rows)
    return each, patches
