"""embed(): inputs and what the caller wants of them to vectors, in the order of the inputs."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from mlx_embeddings_server.failures import as_api_errors
from mlx_embeddings_server.inputs.images import ImageLoader
from mlx_embeddings_server.inputs.parse import Content, ImageSource
from mlx_embeddings_server.inputs.token_encoding import TokenDecoder
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.options import (
    EmbedOptions,
    adapter_of,
    check_pooling,
    check_prompt_has_text,
    invalid_value,
    outputs_of,
    prompt_of,
)
from mlx_embeddings_server.pooling import normalized, pool_patches, pool_tokens
from mlx_embeddings_server.providers.local import Timings, Vectors
from mlx_embeddings_server.served_model import ServedModel
from mlx_embeddings_server.settings import DimensionsPolicy

_MOST_DIMENSIONS = 16_384  # that vectors are filled up to: what a caller asks for takes memory


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
    ) -> None:
        self.dimensions_policy = dimensions_policy
        self._metrics = metrics
        self._token_decoder = token_decoder
        self._image_loader = image_loader

    async def embed(
        self, model: ServedModel, contents: Sequence[Content], options: EmbedOptions, *, field: str = "input"
    ) -> Embeddings:
        """Duplicates are computed once. `field` is what the request calls the contents, for messages."""
        info = model.info
        wanted = outputs_of(model, options)
        self._check_dimensions(info, options.dimensions)
        check_pooling(wanted, options, contents, field)
        prompt, adapter = prompt_of(info, options), adapter_of(info, options)
        check_prompt_has_text(contents, prompt, options, field)
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
        vectors = await self.run(model, items, options.truncate, as_api_errors(field, place_of))
        accounts = [vectors.accounts[place] for place in place_of]
        prompt_tokens = sum(account.tokens for account in accounts)
        self._metrics.prompt_tokens.labels(model.name).inc(prompt_tokens)
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
        model: ServedModel,
        items: Sequence[Item],
        truncate: Truncate | None,
        errors: AbstractContextManager[None],
    ) -> Vectors:
        """The model's raw rows. `errors` turns what goes wrong into `ApiError`s."""
        with errors:
            vectors = await model.provider.embed(items, truncate or model.spec.truncate)
        self._metrics.queue_seconds.labels(model.name).observe(vectors.timings.queue_seconds)
        return vectors

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

    def _check_dimensions(self, info: ModelInfo, wanted: int | None) -> None:
        most = {"reduce": info.dimensions, "pad": _MOST_DIMENSIONS}.get(self.dimensions_policy)
        if wanted is not None and most is not None and wanted > most:
            raise invalid_value(
                f"dimensions is {wanted}, the most is {most} (the model's vectors have {info.dimensions})", "dimensions"
            )

    def _shape(self, info: ModelInfo, rows: NDArray[np.float32], options: EmbedOptions) -> NDArray[np.float32]:
        """Slice or pad to the asked dimensions, then normalise."""
        wanted = options.dimensions
        if wanted is not None and self.dimensions_policy != "ignore":
            rows = np.pad(rows[:, :wanted], ((0, 0), (0, max(0, wanted - rows.shape[1]))))
        return normalized(rows) if (info.normalize if options.normalize is None else options.normalize) else rows


def _of(output: Output, rows: Sequence[Row], *, is_named: bool) -> list[NDArray[np.float32]]:
    """Each item's rows of one kind, which are by name where several kinds may be asked for."""
    found = [cast(Mapping[Output, Vector], row)[output] for row in rows] if is_named else rows
    return cast(list[NDArray[np.float32]], found)


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
