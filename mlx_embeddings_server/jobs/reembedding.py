"""One job's work: a collection's documents, embedded by another model into its next version, which then takes over.

Every step may be the last before a kill. What is done is told by the store: a version that is being filled is filled
further, and a collection whose version is another than the job has noted has been switched by it.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from mlx_embeddings_server.collection_service import CollectionService
from mlx_embeddings_server.errors import ApiError, InternalError, InvalidRequest, NotFound, Overloaded, PermissionDenied
from mlx_embeddings_server.jobs.base import Job, Target
from mlx_embeddings_server.jobs.interruption import Interruption
from mlx_embeddings_server.jobs.records import Records
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.stores.base import (
    Collection,
    CollectionNotFound,
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    InvalidValue,
    Mismatch,
    Version,
    Waiting,
)

# Of one read, so that documents with images inside do not fill the memory. The first read does not know their size.
_PAGE_CHARACTERS = 8_000_000
_FIRST_PAGE, _LARGEST_PAGE = 16, 256
# A part is about one batch: then a request that comes meanwhile waits for one batch more than else.
_CHARACTERS_OF_TOKEN = 4
_PART_FOR_PROVIDERS = 200_000  # characters: what its own batches are is not known here
_IMAGES_OF_PART = 4
_LONGEST_WAIT = 5.0  # seconds until a full queue is tried again
# What may be the fault of one document. Lost workers are, too, when a document takes them down.
_OF_DOCUMENTS = (InvalidRequest, InternalError, InvalidValue)
_LOST = "backend_lost"
_TEMPORARY = (429, 502, 503, 507)
_IMAGE_NOT_THERE = "image_fetch_failed"


class JobFailed(Exception):
    """Trying again would not help. The message says why."""


class JobDelayed(Exception):
    """It may do later. The message says why it did not now."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What jobs work with."""

    collections: CollectionService
    models: Models
    records: Records


def is_temporary(error: ApiError) -> bool:
    return error.status in _TEMPORARY or error.code == _IMAGE_NOT_THERE


class Reembedding:
    """Of one job that this worker has. Used on the event loop."""

    def __init__(self, parts: Parts, job: Job, worker: str, interruption: Interruption) -> None:
        self._parts = parts
        self._store = parts.collections.store
        self._job = job
        self._worker = worker
        self._interruption = interruption
        self._targets = list(job.targets)
        self._counts: dict[str, int] = {}  # documents of each collection
        self._done = 0  # documents of the collections that are switched

    async def run(self) -> None:
        """Raises `JobFailed`, `JobDelayed`, `Interrupted`, `NotMine`, or the model's or the store's `ApiError`."""
        try:
            model = self._parts.models.asked(self._job.model)
        except (NotFound, PermissionDenied) as error:
            raise JobFailed(str(error)) from error
        facts = await self._interruption.unless(self._facts_of(model))
        left = []
        for place, target in enumerate(self._targets):
            async with self._may_be_gone(target.collection):
                stats = await self._store.stats(self._job.owner, target.collection)
                self._counts[target.collection] = stats.count
                if _is_switched(target, stats.collection, facts):
                    self._done += stats.count
                else:
                    left.append(place)
        for place in left:
            async with self._may_be_gone(self._targets[place].collection):
                await self._replace(place, model, facts)

    async def _facts_of(self, model: Model) -> EmbeddingFacts:
        async with model:
            return self._parts.collections.facts_of(model)

    @asynccontextmanager
    async def _may_be_gone(self, name: str) -> AsyncIterator[None]:
        """Of several collections, one that was deleted meanwhile is nobody's loss."""
        try:
            yield
        except (CollectionNotFound, Mismatch) as error:
            try:
                await self._store.get(self._job.owner, name)
            except CollectionNotFound as gone:
                if self._job.collection is not None:
                    raise JobFailed(str(gone)) from error
                self._counts.pop(name, None)
            else:
                raise

    async def _replace(self, place: int, model: Model, facts: EmbeddingFacts) -> None:
        """One collection's version."""
        name, owner, begun = self._targets[place].collection, self._job.owner, self._targets[place].version
        found = await self._store.get(owner, name)
        if begun != found.current.number:  # not begun, or another job came between and gave it another model
            self._targets[place] = replace(self._targets[place], version=found.current.number)
            await asyncio.to_thread(self._parts.records.note, self._job, self._worker, targets=self._targets)
        if found.filling is not None and found.filling.facts.difference(facts):
            await self._store.abandon(found.filling)  # of a job that is no more: this one has the collection
        version = await self._store.begin_version(owner, name, facts)
        while True:
            waiting = await self._store.waiting(owner, name, version)
            await self._note(name, len(waiting), moved=False)
            if waiting:
                await self._fill(name, model, version, waiting)
            elif await self._store.switch(owner, name, version):
                break
        await self._note(name, 0, moved=True)
        self._done += self._counts[name]

    async def _fill(self, name: str, model: Model, version: Version, waiting: Sequence[Waiting]) -> None:
        assert model.known_info is not None, "it was in use already"
        budget = model.known_info.batch_tokens * _CHARACTERS_OF_TOKEN or _PART_FOR_PROVIDERS
        place, page = 0, _FIRST_PAGE
        while place < len(waiting):
            taken = waiting[place : place + page]
            documents = await self._store.documents(self._job.owner, name, ids=[each.id for each in taken])
            place += len(taken)
            size = sum(map(_size, documents)) // len(taken) + 1
            page = min(max(_PAGE_CHARACTERS // size, 1), _LARGEST_PAGE)
            by_id = {each.id: each for each in documents}
            left = len(waiting) - place + len(taken)
            for part in _parts(taken, by_id, budget):
                self._interruption.check()
                await self._embed_and_store(model, version, part, by_id)
                left -= len(part)
                await self._note(name, left, moved=True)

    async def _embed_and_store(
        self, model: Model, version: Version, taken: Sequence[Waiting], by_id: Mapping[str, Document]
    ) -> None:
        documents = [by_id[each.id] for each in taken if each.id in by_id]
        try:
            embedded = await self._embedded(model, version, documents) if documents else []
            await self._store.fill(version, taken, embedded)
        except ApiError as error:
            if not (isinstance(error, _OF_DOCUMENTS) or error.code == _LOST):
                raise
            if len(taken) == 1:
                kind = JobDelayed if is_temporary(error) else JobFailed
                raise kind(f"the document {taken[0].id!r} could not be embedded: {error}") from error
            for each in taken:  # to find the one
                await self._embed_and_store(model, version, [each], by_id)

    async def _embedded(self, model: Model, version: Version, documents: Sequence[Document]) -> list[EmbeddedDocument]:
        """When the model's queue has room."""
        while True:
            try:
                return await self._interruption.unless(self._embed(model, version, documents))
            except Overloaded as error:
                pause = min(float(error.headers["Retry-After"]), _LONGEST_WAIT)
                await self._interruption.unless(asyncio.sleep(pause))

    async def _embed(self, model: Model, version: Version, documents: Sequence[Document]) -> list[EmbeddedDocument]:
        """Holds the model no longer than that, so that it can make room for another one."""
        async with model:
            if difference := version.facts.difference(self._parts.collections.facts_of(model)):
                raise JobDelayed(f"the model {model.name!r} was loaded again and is another one now: {difference}")
            return await self._parts.collections.embedded(model, documents, truncate=self._job.truncate)

    async def _note(self, name: str, left: int, *, moved: bool) -> None:
        """How far it is. Documents that are written meanwhile may make it more than the collection had."""
        self._counts[name] = max(self._counts[name], left)
        done, total = self._done + self._counts[name] - left, sum(self._counts.values())
        await asyncio.to_thread(self._parts.records.progress, self._job, self._worker, done, total, moved=moved)


def _is_switched(target: Target, found: Collection, facts: EmbeddingFacts) -> bool:
    """By an earlier attempt, which was ended before the job's record said so."""
    return target.version not in (None, found.current.number) and not facts.difference(found.facts)


def _parts(taken: Sequence[Waiting], by_id: Mapping[str, Document], budget: int) -> Iterator[list[Waiting]]:
    """Of documents of about so many characters together, but always one."""
    part: list[Waiting] = []
    size = 0
    for each in taken:
        document = by_id.get(each.id)  # None: it is no longer in the collection
        added = _cost(document, budget) if document is not None else 0
        if part and size + added > budget:
            yield part
            part, size = [], 0
        part.append(each)
        size += added
    if part:
        yield part


def _cost(document: Document, budget: int) -> int:
    return len(document.text or "") + (budget // _IMAGES_OF_PART if document.image else 0)


def _size(document: Document) -> int:
    return len(document.text or "") + len(document.image or "")
