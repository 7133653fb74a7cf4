"""The jobs as routes see them: asked for, listed, cancelled."""

import asyncio
import logging
import sqlite3
from collections.abc import Sequence

from mlx_embeddings_server.collection_service import CollectionService
from mlx_embeddings_server.errors import NotFound
from mlx_embeddings_server.jobs.base import Job, JobConflict, JobsUnavailable, Order, Totals
from mlx_embeddings_server.jobs.liveness import Liveness
from mlx_embeddings_server.jobs.queue import Queue, QueueUnavailable, UnusableQueue, open_queue
from mlx_embeddings_server.jobs.records import Records, RecordsBroken
from mlx_embeddings_server.jobs.reembedding import Parts
from mlx_embeddings_server.jobs.worker import Worker
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_MEDIA_KEY = "media_id"  # of documents' metadata


class ReembedJobs:
    """All errors that it raises are `ApiError`s. Used on the event loop."""

    def __init__(self, parts: Parts, queue: Queue, worker: Worker | None) -> None:
        self._collections = parts.collections
        self._records = parts.records
        self._queue = queue
        self._worker = worker

    async def _collections_of(self, order: Order) -> Sequence[str]:
        """Raises `NotFound`, where there are none."""
        store, owner, media_id = self._collections.store, order.owner, order.media_id
        if order.collection is not None:
            return [(await store.get(owner, order.collection)).name]
        where = {"$or": [{_MEDIA_KEY: media_id}, {_MEDIA_KEY: str(media_id)}]}
        names = [each.name for each in await store.all_of(owner)]
        found = [name for name in names if await store.documents(owner, name, where=where, limit=1)]
        if not found:
            raise NotFound(
                f"no document of that user's collections has the {_MEDIA_KEY} {media_id} in its metadata",
                param=_MEDIA_KEY,
                code="media_not_found",
            )
        return found

    async def schedule(self, order: Order) -> Job:
        """The new job, or the one that has the order's keys. Raises `NotFound` or `CollectionNotFound` where there is
        nothing to embed anew, and `JobConflict`.
        """
        if (same := await asyncio.to_thread(self._records.same, order)) is not None:
            return same
        if self._worker is None and self._collections.store.is_exclusive:
            raise JobConflict(
                "nobody would do the job: the collections belong to this server, whose worker is off. Start it with "
                "--reembed-worker",
                code="reembed_worker_off",
            )
        collections = await self._collections_of(order)
        job, is_new = await asyncio.to_thread(self._records.add, order, collections)
        if is_new:
            log.info("job %d is queued: %d collections with %s", job.id, len(collections), order.model)
            await self._put(job)
        return job

    async def get(self, name: str) -> Job:
        """By id or uuid. Raises `JobNotFound`."""
        return await asyncio.to_thread(self._records.get, name)

    async def all_of(self, status: str | None, limit: int, offset: int) -> tuple[list[Job], int]:
        """A page, the newest first, and how many there are."""
        return await asyncio.to_thread(self._records.all_of, status, limit, offset)

    def totals(self) -> Totals | None:
        """For metrics. None: the records cannot be read now."""
        try:
            return self._records.totals()
        except JobsUnavailable:
            return None

    async def cancel(self, name: str) -> Job:
        """What a worker has begun ends within a part of its documents. Raises `JobNotFound`, `JobConflict`."""
        job = await asyncio.to_thread(self._records.cancel, name)
        if job.status == "queued":
            await self._put(job)
        return job

    async def _put(self, job: Job) -> None:
        try:
            await asyncio.to_thread(self._queue.put, job.uuid, job.priority)
        except QueueUnavailable as error:
            log.warning("job %d waits until the queue is there again: %s", job.id, error)

    async def start(self) -> None:
        if self._worker is not None:
            await self._worker.start(self._queue)

    async def aclose(self) -> None:
        """The job that runs is given back."""
        if self._worker is not None:
            await self._worker.aclose()
        await asyncio.to_thread(self._queue.close)
        await asyncio.to_thread(self._records.close)


def open_jobs(settings: Settings, collections: CollectionService, models: Models) -> ReembedJobs:
    """Beside the collections' catalog. Raises `SettingsError`."""
    store = collections.store
    folder = store.folder / "jobs"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        records = Records(folder / "jobs.sqlite3")
        liveness = Liveness(folder) if settings.reembed_worker else None
    except (OSError, sqlite3.Error, RecordsBroken) as error:
        raise SettingsError(f"the jobs' records cannot be opened: {error}") from error
    parts = Parts(collections, models, records)
    worker = None if liveness is None else Worker(parts, liveness, retries=settings.reembed_retries)
    try:
        url = None if settings.jobs_url is None else settings.jobs_url.get_secret_value()
        queue = open_queue(url, folder, f"{store.id}reembed", None if worker is None else worker.run_in_thread)
    except UnusableQueue as error:
        raise SettingsError(f"--jobs-url: {error}") from error
    return ReembedJobs(parts, queue, worker)
