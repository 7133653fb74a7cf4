"""The collections as the routes and jobs see them: asynchronous, on threads of their own."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_server.stores.base import (
    WHOLE,
    Collection,
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    Excerpt,
    Hit,
    Kind,
    Metadata,
    Stats,
    StoreUnavailable,
    Version,
    Waiting,
)
from mlx_embeddings_server.stores.collections import CREATING_SECONDS, Collections

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 8


class VectorStore:
    """Collections of every owner. An owner's name is part of every call, and reaches none of another's.

    All methods raise `StoreError`s. What was begun is done to its end, even when the caller is cancelled.
    """

    def __init__(self, collections: Collections, *, timeout: float) -> None:
        """`timeout`: seconds that a call waits for a free thread, beside what the store's client waits for replies."""
        self._collections = collections
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")
        self._free = asyncio.Semaphore(_THREADS)

    @property
    def name(self) -> str:
        """`chroma` or `qdrant`."""
        return self._collections.index.name

    @property
    def id(self) -> str:
        """Of these collections, and no others: all processes that share them have the same."""
        return str(self._collections.catalog.prefix)

    @property
    def folder(self) -> Path:
        """On this machine, of the catalog, and for what belongs beside it."""
        return self._collections.catalog.folder

    @property
    def is_exclusive(self) -> bool:
        """No other process has these collections meanwhile."""
        return self._collections.catalog.is_exclusive

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of vectors that the store can search."""
        return self._collections.index.kinds

    async def create(
        self, owner: str, name: str, facts: EmbeddingFacts, metadata: Metadata | None = None
    ) -> Collection:
        """Raises `CollectionExists` for all but one of those who create it at once; `Mismatch` for Chroma's kinds."""
        return await self._run(self._collections.create, owner, name, facts, metadata or {})

    async def get(self, owner: str, name: str) -> Collection:
        """Raises `CollectionNotFound`, as all below."""
        return await self._run(self._collections.get, owner, name)

    async def all_of(self, owner: str) -> list[Collection]:
        """By name."""
        return await self._run(self._collections.all_of, owner)

    async def stats(self, owner: str, name: str) -> Stats:
        return await self._run(self._collections.stats, owner, name)

    async def delete(self, owner: str, name: str) -> None:
        """Gone when it returns, even where the store is away: its vectors are then dropped by `clean_up`."""
        await self._run(self._collections.delete, owner, name)

    async def upsert(self, owner: str, name: str, facts: EmbeddingFacts, documents: Sequence[EmbeddedDocument]) -> None:
        """Store, or replace as a whole. `facts` are of the model that made the vectors: other than the collection's
        are a `Mismatch`, and so is a re-embedding that ended meanwhile. Where it raises, some may be stored: the same
        request again puts that right.
        """
        await self._run(self._collections.upsert, owner, name, facts, documents)

    async def documents(
        self,
        owner: str,
        name: str,
        *,
        ids: Sequence[str] | None = None,
        where: object = None,
        limit: int = 100,
        offset: int = 0,
        excerpt: Excerpt = WHOLE,
    ) -> list[Document]:
        """Those of `ids` that there are, in that order; or a page of all that pass `where`, in the store's order."""
        return await self._run(self._collections.documents, owner, name, ids, where, limit, offset, excerpt)

    async def delete_documents(
        self, owner: str, name: str, *, ids: Sequence[str] | None = None, where: object = None
    ) -> int:
        """How many there were. Either `ids` or a `where` that is not empty."""
        return await self._run(self._collections.delete_documents, owner, name, ids, where)

    async def query(
        self,
        owner: str,
        name: str,
        facts: EmbeddingFacts,
        vectors: NDArray[np.float32],
        *,
        n_results: int = 10,
        where: object = None,
        excerpt: Excerpt = WHOLE,
    ) -> list[Hit]:
        """The best first. `vectors` [dimension], or [vectors, dimension] of a multi-vector model, made as `facts` say:
        a `Mismatch` means that they are of another model than the collection's, or of the one it had before.
        """
        return await self._run(self._collections.query, owner, name, facts, vectors, n_results, where, excerpt)

    # Re-embedding: begin (or resume), fill until nothing waits, switch. One worker a collection at a time.

    async def begin_version(self, owner: str, name: str, facts: EmbeddingFacts) -> Version:
        """A version that is filled while the current one serves. Called again, after a crash too, it is the same one.

        Raises `CollectionExists` while one of other facts is being filled.
        """
        return await self._run(self._collections.begin_version, owner, name, facts)

    async def waiting(self, owner: str, name: str, version: Version) -> list[Waiting]:
        """Every document that the version lacks, or has otherwise than the current one: all ids at once. It compares
        the ids of both versions until nothing but later changes waits: fill what it gave before asking again.
        """
        return await self._run(self._collections.waiting, owner, name, version)

    async def fill(self, version: Version, taken: Sequence[Waiting], documents: Sequence[EmbeddedDocument]) -> None:
        """`documents`: those of `taken` that `documents(ids=...)` found after `waiting`, embedded anew. Those of
        `taken` that are not among them are no longer in the collection, and are removed from the version.
        """
        await self._run(self._collections.fill, version, taken, documents)

    async def switch(self, owner: str, name: str, version: Version) -> bool:
        """Let the version serve from now on, and drop the one before. False, and nothing done: documents wait."""
        return await self._run(self._collections.switch, owner, name, version)

    async def abandon(self, version: Version) -> None:
        """End a re-embedding without its result."""
        await self._run(self._collections.abandon, version)

    # The store itself.

    async def clean_up(self, creating_for: float = CREATING_SECONDS) -> int:
        """Drop what crashes and failures left behind; how many indexes. For the start, and from time to time."""
        return await self._run(self._collections.clean_up, creating_for)

    async def check(self) -> None:
        """Raises `StoreUnavailable`, where the store does not answer."""
        await self._run(self._collections.index.check)

    def close(self) -> None:
        """Waits for what is being done. Closing twice is no error."""
        self._threads.shutdown(wait=True)
        self._collections.close()

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                await self._free.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"{self.name} is busy: try again later") from None
        try:
            future = self._threads.submit(work, *args, **kwargs)
        except RuntimeError as error:  # the threads are shut down
            raise StoreUnavailable(f"{self.name} is closed") from error
        loop = asyncio.get_running_loop()
        # Not when the caller is gone, but when the thread is free.
        future.add_done_callback(lambda _: _released(loop, self._free))
        return await asyncio.shield(asyncio.wrap_future(future))


def _released(loop: asyncio.AbstractEventLoop, free: asyncio.Semaphore) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(free.release)
