"""A model of this process: prepares inputs, off the event loop where that takes long, and runs them."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from mlx_embeddings_backends.base import EncodedImage, Item, Pair, Prepared, Truncate
from mlx_embeddings_backends.errors import InputError
from mlx_embeddings_server.engine.engine import Engine, Outcome
from mlx_embeddings_server.providers import LOCAL
from mlx_embeddings_server.providers.base import Account, Timings, Vectors
from mlx_embeddings_server.request_record import add_tokens

# Up to so many characters or token ids, tokenising takes less than handing it to another thread and back.
INLINE_LENGTH = 2000
# Images decoded and scaled side by side, all requests together.
IMAGE_THREADS = min(8, os.cpu_count() or 1)


class LocalProvider:
    """One engine as a source of vectors."""

    name = LOCAL

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tokenizing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._imaging = ThreadPoolExecutor(max_workers=IMAGE_THREADS, thread_name_prefix="image")
        # Prepared images that find the queue full wait in their slot: what is in memory stays bounded.
        self._image_slots = asyncio.Semaphore(2 * IMAGE_THREADS)

    async def embed(self, items: Sequence[Item], truncate: Truncate) -> Vectors:
        """Raises `QueueFull` before any work is done, a backend's `InputError`, or what failed the run."""
        self.engine.queue.check_room()
        started = time.perf_counter()
        if any(isinstance(item.content, EncodedImage) for item in items):
            return await self._embed_in_parts(items, truncate, started)
        prepared = await self._prepare_texts(items, truncate)
        tokenize_seconds = time.perf_counter() - started
        try:
            result = await self.engine.run(prepared)
        except asyncio.CancelledError:
            # Its client has gone. Much of it may have been computed: it counts for the caller's limits.
            add_tokens(sum(each.tokens for each in prepared))
            raise
        return _vectors(result, list(map(_account, prepared)), tokenize_seconds)

    async def _prepare_texts(self, items: Sequence[Item], truncate: Truncate) -> list[Prepared]:
        backend = self.engine.backend
        if sum(map(_length, items)) <= INLINE_LENGTH:
            return backend.prepare(items, truncate)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, copy_context().run, backend.prepare, items, truncate)

    async def _embed_in_parts(self, items: Sequence[Item], truncate: Truncate, started: float) -> Vectors:
        """Each image by itself, the texts together: the first images run while the last are decoded."""
        accounts: dict[int, Account] = {}
        images = [place for place, item in enumerate(items) if isinstance(item.content, EncodedImage)]
        texts = [place for place, item in enumerate(items) if not isinstance(item.content, EncodedImage)]

        async def embed_part(places: Sequence[int], prepare: Callable[..., Awaitable[list[Prepared]]]) -> None:
            if request.has_failed:
                return
            try:
                prepared = await prepare([items[place] for place in places], truncate)
            except InputError as error:
                raise error.within(places) from error
            accounts.update(zip(places, map(_account, prepared), strict=True))
            await request.admit_when_there_is_room(prepared, places)

        async def embed_image(place: int) -> None:
            async with self._image_slots:
                await embed_part([place], self._prepare_image)

        with self.engine.request(len(items)) as request:
            parts = [asyncio.create_task(embed_image(place)) for place in images]
            if texts:
                parts.append(asyncio.create_task(embed_part(texts, self._prepare_texts)))
            try:
                await asyncio.gather(*parts)
                tokenize_seconds = time.perf_counter() - started
                result = await request.result()
            except asyncio.CancelledError:
                add_tokens(sum(each.tokens for each in accounts.values()))
                raise
            finally:
                for part in parts:
                    part.cancel()
        return _vectors(result, [accounts[place] for place in range(len(items))], tokenize_seconds)

    async def _prepare_image(self, items: Sequence[Item], truncate: Truncate) -> list[Prepared]:
        loop = asyncio.get_running_loop()
        prepare = self.engine.backend.prepare
        return await loop.run_in_executor(self._imaging, copy_context().run, prepare, items, truncate)

    def unload(self) -> None:
        """Close, and wait until the model is gone from memory."""
        self.close()
        self.engine.unload()

    def close(self) -> None:
        self.engine.stop()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._imaging.shutdown(wait=False, cancel_futures=True)


def _length(item: Item) -> int:
    match item.content:
        case EncodedImage():
            return len(item.prompt)
        case Pair(query, document):
            return len(query) + len(document)
        case content:
            return len(item.prompt) + len(content)


def _account(prepared: Prepared) -> Account:
    return Account(prepared.tokens, prepared.truncated, prepared.patches)


def _vectors(result: Outcome, accounts: list[Account], tokenize_seconds: float) -> Vectors:
    return Vectors(result.rows, accounts, Timings(tokenize_seconds, result.queue_seconds, result.inference_seconds))
