"""A model of another server: items in batches there, vectors back in their order."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final

import numpy as np

from mlx_embeddings_backends.base import Item, Row, Truncate
from mlx_embeddings_server.providers.base import Account, InputRefused, OtherDimensions, Timings, Vectors
from mlx_embeddings_server.providers.endpoint import Content, Endpoint

# Characters of a request there: OpenAI takes 300,000 tokens in all.
_BATCH_CHARACTERS: Final = 800_000
_CHARACTERS_OF_TOKEN: Final = 4


class RemoteProvider:
    """One model at an endpoint. `dimensions` are what its vectors must have; None: those that come first."""

    def __init__(self, endpoint: Endpoint, model: str, dimensions: int | None = None) -> None:
        self.endpoint = endpoint
        self.model = model
        self.dimensions = dimensions

    @property
    def name(self) -> str:
        return self.endpoint.name

    async def embed(self, items: Sequence[Item], truncate: Truncate) -> Vectors:
        """Raises `ProviderFailed`, `ProviderBusy` or `InputRefused`. `truncate` is the other server's affair."""
        started = time.perf_counter()
        contents = list(map(_content, items))
        rows: dict[int, Row] = {}
        tokens: dict[int, int] = {}
        waits = [0.0]

        async def embed_batches() -> None:
            for places in batches:
                inputs = [contents[place] for place in places]
                try:
                    reply, waited = await self.endpoint.embed(self.model, inputs)
                except InputRefused as error:
                    error.lengths = [(places[at], tokens) for at, tokens in error.lengths if at < len(places)]
                    raise
                self._check(reply.rows.shape[1])
                rows.update(zip(places, reply.rows, strict=True))
                lengths = list(map(_length, inputs))
                # Limits count tokens, so that there have to be some.
                total = max(1, sum(lengths) // _CHARACTERS_OF_TOKEN) if reply.tokens is None else reply.tokens
                tokens.update(zip(places, shares(total, lengths), strict=True))
                waits.append(waited)

        all_batches = _batches(contents, self.endpoint.settings.batch_size)
        batches = iter(all_batches)
        await _side_by_side(embed_batches, min(len(all_batches), self.endpoint.settings.max_in_flight))
        seconds = time.perf_counter() - started
        return Vectors(
            [rows[place] for place in range(len(items))],
            [Account(tokens[place], False, None) for place in range(len(items))],
            Timings(0.0, max(waits), seconds - max(waits)),
        )

    def _check(self, dimensions: int) -> None:
        if self.dimensions is None:
            self.dimensions = dimensions
        if dimensions != self.dimensions:
            raise OtherDimensions(
                f"the provider {self.name!r} gave vectors of {dimensions} dimensions, and the model's have "
                f"{self.dimensions}"
            )


async def _side_by_side(work: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """The first failure ends the others."""
    if count == 1:
        return await work()
    tasks = [asyncio.create_task(work()) for _ in range(count)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _content(item: Item) -> Content:
    content = item.content
    assert isinstance(content, str | tuple), "the model takes texts"
    return content if isinstance(content, tuple) else item.prompt + content


def _length(content: Content) -> int:
    return len(content) * (_CHARACTERS_OF_TOKEN if isinstance(content, tuple) else 1)


def _batches(contents: Sequence[Content], size: int) -> list[list[int]]:
    """Places of contents that go together: texts, then token ids, which no request may mix."""
    return [
        batch
        for kind in (str, tuple)
        for batch in _filled([place for place, each in enumerate(contents) if isinstance(each, kind)], contents, size)
    ]


def _filled(places: Sequence[int], contents: Sequence[Content], size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    length = 0
    for place in places:
        if batch and (len(batch) == size or length + _length(contents[place]) > _BATCH_CHARACTERS):
            yield batch
            batch, length = [], 0
        batch.append(place)
        length += _length(contents[place])
    if batch:
        yield batch


def shares(tokens: int, lengths: Sequence[int]) -> list[int]:
    """A request's tokens in whole numbers by its inputs' lengths: each is a guess, their sum is exact."""
    ends = np.cumsum(lengths, dtype=np.int64) * tokens // max(1, sum(lengths))
    return [int(share) for share in np.diff(ends, prepend=0)]
