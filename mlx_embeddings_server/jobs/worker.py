"""A worker: takes the jobs that the queue names, one at a time, and puts those back that killed workers have left."""

import asyncio
import logging
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress

from mlx_embeddings_server.errors import ApiError
from mlx_embeddings_server.jobs.base import Job, JobsUnavailable
from mlx_embeddings_server.jobs.interruption import Interrupted, Interruption
from mlx_embeddings_server.jobs.liveness import Liveness
from mlx_embeddings_server.jobs.queue import Queue, QueueUnavailable
from mlx_embeddings_server.jobs.records import LONGEST_PAUSE, NotMine
from mlx_embeddings_server.jobs.reembedding import JobDelayed, JobFailed, Parts, Reembedding, is_temporary
from mlx_embeddings_server.stores.base import CollectionNotFound

log = logging.getLogger(__name__)

_SWEEP_PAUSE = 1.0  # seconds between two looks for jobs that no worker has and no message names
_WATCH_PAUSE = 0.5  # seconds between two looks whether the job that runs was cancelled
_SWEEP_SHARE = 0.05  # of the time, at most, where the queue is so long that a look takes its time
_FIRST_PAUSE = 2.0  # seconds before a job that failed is tried again, doubled with each failure in a row
# Seconds that what was begun has to end, when the worker stops: the store's reply, at most.
_STOP_TIMEOUT = 20.0
_NO_MESSAGE = "an unexpected error: the server's log has it"


class Worker:
    """Used on the event loop that it is started on, but for `run_in_thread`."""

    def __init__(self, parts: Parts, liveness: Liveness, *, retries: int) -> None:
        self._parts = parts
        self._records = parts.records
        self._liveness = liveness
        self._retries = retries
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._current: str | None = None  # the job that is taken, or about to be
        self._interruption: Interruption | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._queue_is_there = True

    async def start(self, queue: Queue) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._liveness.clean_up)
        self._consumer = queue.consumer()
        self._consumer.start()
        self._tasks.append(asyncio.create_task(self._sweep_for_ever(queue)))
        log.info("the re-embedding worker has started")

    async def aclose(self) -> None:
        """The job that runs is given back, and goes on where it was with the next worker."""
        self._closing = True
        if self._loop is None:
            self._liveness.close()
            return
        self._consumer.stop_flag.set()
        for task in self._tasks:
            task.cancel()
        if self._interruption is not None:
            self._interruption.interrupt("stopped")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _STOP_TIMEOUT)
        await asyncio.to_thread(self._join)
        self._liveness.close()

    def _join(self) -> None:
        for thread in (self._consumer.scheduler, *(thread for _, thread in self._consumer.worker_threads)):
            assert isinstance(thread, threading.Thread)
            thread.join(2)

    def run_in_thread(self, uuid: str) -> None:
        """For the queue's thread: returns when the job is done, or is not this worker's."""
        assert self._loop is not None
        if not self._closing and not self._loop.is_closed():
            with suppress(CancelledError):
                asyncio.run_coroutine_threadsafe(self._run(uuid), self._loop).result()

    async def _run(self, uuid: str) -> None:
        if self._closing:  # its record says that it waits, and the next worker finds it
            return
        self._idle.clear()
        self._current = uuid
        try:
            job = await asyncio.to_thread(self._records.take, uuid, self._liveness.name)
            if job is not None:
                await self._do(job)
        except NotMine:
            log.warning("job %s is no longer this worker's: left alone", uuid)
        except JobsUnavailable as error:
            log.error("job %s: %s", uuid, error)
        finally:
            self._current = None
            self._idle.set()

    async def _do(self, job: Job) -> None:
        """Raises `NotMine` or `JobsUnavailable`: another attempt goes on from what is in the store."""
        interruption = self._interruption = Interruption()
        if job.cancelling:
            interruption.interrupt("cancelled")
        if self._closing:
            interruption.interrupt("stopped")
        watching = asyncio.create_task(self._watch(job, interruption))
        log.info("job %d: attempt %d at %s with %s", job.id, job.attempts, _names(job), job.model)
        try:
            interruption.check()
            if job.failures > self._retries:  # the process ended under it each time
                raise JobFailed(job.error or _NO_MESSAGE)
            await Reembedding(self._parts, job, self._liveness.name, interruption).run()
        except Interrupted as interrupted:
            if interrupted.reason == "stopped":
                await asyncio.to_thread(self._records.give_back, job, self._liveness.name)
            else:
                await self._end(job, "cancelled")
        except JobFailed as error:
            await self._end(job, "failed", str(error))
        except (ApiError, JobDelayed) as error:
            if isinstance(error, JobsUnavailable):
                raise
            await self._failed(job, error)
        except NotMine:
            raise
        except Exception:  # whatever it was, the job has an end, and the worker goes on
            log.exception("job %d failed", job.id)  # without its words: they may quote a document
            await self._end(job, "failed", _NO_MESSAGE)
        else:
            await asyncio.to_thread(self._records.finish, job, self._liveness.name, "completed")
            log.info("job %d is completed: %s", job.id, _names(job))
        finally:
            watching.cancel()
            self._interruption = None

    async def _watch(self, job: Job, interruption: Interruption) -> None:
        while True:
            with suppress(JobsUnavailable):
                if await asyncio.to_thread(self._records.is_cancelling, job):
                    interruption.interrupt("cancelled")
            await asyncio.sleep(_WATCH_PAUSE)

    async def _failed(self, job: Job, error: ApiError | JobDelayed) -> None:
        """Try again later, where that may help."""
        failures = (await asyncio.to_thread(self._records.get, job.uuid)).failures + 1
        if (isinstance(error, ApiError) and not is_temporary(error)) or failures > self._retries:
            await self._end(job, "failed", str(error))
            return
        told = float(error.headers.get("Retry-After", 0)) if isinstance(error, ApiError) else 0.0
        pause = min(max(_FIRST_PAUSE * 2 ** (failures - 1), told), LONGEST_PAUSE)
        back = self._records.give_back  # a sweep puts it in when the pause is over
        await asyncio.to_thread(back, job, self._liveness.name, error=str(error), pause=pause)
        log.warning("job %d failed for the %d. time, and is tried again in %d s: %s", job.id, failures, pause, error)

    async def _end(self, job: Job, status: str, error: str | None = None) -> None:
        """Without its result: what it has begun is dropped first, so that a kill in between leaves it to be ended."""
        store, now = self._parts.collections.store, await asyncio.to_thread(self._records.get, job.uuid)
        for target in now.targets:
            if target.version is None:
                continue
            try:
                found = await store.get(job.owner, target.collection)
                if found.current.number == target.version and found.filling is not None:
                    await store.abandon(found.filling)
            except CollectionNotFound:  # its versions went with it
                continue
            except ApiError as problem:
                log.error("job %d: what it began of %s is not dropped: %s", job.id, target.collection, problem)
        await asyncio.to_thread(self._records.finish, job, self._liveness.name, status, error)
        log.log(logging.ERROR if error else logging.INFO, "job %d is %s: %s", job.id, status, error or _names(job))

    async def _sweep_for_ever(self, queue: Queue) -> None:
        while True:
            started = time.monotonic()
            try:
                await asyncio.to_thread(self._sweep, queue)
                if not self._queue_is_there:
                    log.info("jobs go on: their records and the queue are there again")
                self._queue_is_there = True
            except (JobsUnavailable, QueueUnavailable) as error:
                if self._queue_is_there:
                    log.error("jobs wait: %s", error)
                self._queue_is_there = False
            await asyncio.sleep(max(_SWEEP_PAUSE, (time.monotonic() - started) / _SWEEP_SHARE))

    def _is_held(self, job: Job) -> bool:
        if job.worker == self._liveness.name:
            return job.uuid == self._current
        return job.worker is not None and self._liveness.is_alive(job.worker)

    def _sweep(self, queue: Queue) -> None:
        """Raises `JobsUnavailable` or `QueueUnavailable`."""
        for job in self._records.release(self._is_held):
            log.warning("job %d goes on: the process that ran it ended", job.id)
        due, named = self._records.due(), queue.waiting()
        for job in due:
            if job.uuid not in named:
                queue.put(job.uuid, job.priority)


def _names(job: Job) -> str:
    return ", ".join(each.collection for each in job.targets)
