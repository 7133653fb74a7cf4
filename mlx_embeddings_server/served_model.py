"""One served model's life: found, loaded when it is first asked for, unloaded, loaded again."""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypeVar

from mlx_embeddings_backends import detect
from mlx_embeddings_backends.base import Backend, LoadOptions, ModelInfo
from mlx_embeddings_backends.errors import ModelError
from mlx_embeddings_backends.progress import Progress
from mlx_embeddings_server import memory
from mlx_embeddings_server.cache.identity import files_of, identity_of
from mlx_embeddings_server.downloads import Download
from mlx_embeddings_server.engine.engine import Engine
from mlx_embeddings_server.engine.turns import DeviceTurns
from mlx_embeddings_server.engine.worker import State as WorkerState
from mlx_embeddings_server.errors import Unavailable
from mlx_embeddings_server.found import Found
from mlx_embeddings_server.logs import TOLD_IN_FULL
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.providers.local import LocalProvider
from mlx_embeddings_server.registry import ModelSpec

log = logging.getLogger(__name__)

Load = Callable[[detect.Choice, Path, LoadOptions], Backend]
Result = TypeVar("Result")
State = WorkerState | Literal["unloaded", "loading", "unloading", "failed"]

# Seconds before a load that failed is tried again, doubled with each failure in a row, and the most.
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the models of a process share."""

    metrics: Metrics
    load: Load
    queue_tokens: int
    turns: DeviceTurns
    keep_results: bool = False  # models are to know what their vectors may be kept under


class ServedModel:
    """A model under the name that requests call it by. Used on the event loop, but for `load_now`.

    `make_room` is awaited before a load, with the bytes that it will take. Raises `ModelError` where there is none.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        parts: Parts,
        make_room: Callable[["ServedModel", int], Awaitable[None]],
        found: Found | None = None,
    ) -> None:
        self.name = self.label = name
        self.spec = spec
        self.found = found
        self.created = int(time.time())
        self.users = 0  # requests that hold the model
        self.used_at = time.monotonic()
        self.download = Download(self._find)
        self.files: bytes | None = None  # a hash over those of the loaded model, if its vectors are kept
        self.identity: bytes | None = None  # what they are cached under, then
        self.reserved_bytes = 0  # of memory, while it is being loaded
        self._parts = parts
        self._make_room = make_room
        self._provider: LocalProvider | None = None
        self._info: ModelInfo | None = None
        self._changing: asyncio.Task[None] | None = None  # a load or an unload under way
        self._thread: threading.Thread | None = None  # of a load
        self._is_leaving = False
        self._idle = asyncio.Event()
        self._gone = asyncio.Event()  # it is not leaving
        self._gone.set()
        self._stopped = asyncio.Event()
        self._failures = 0  # loads in a row
        self._failure: Exception | None = None
        self._retry_at = 0.0

    @property
    def state(self) -> State:
        if self._is_leaving:
            return "unloading"
        if self._provider is not None:
            return self._provider.engine.state
        if self._changing is not None:
            return "loading"
        return "failed" if self._failure is not None else "unloaded"

    @property
    def reason(self) -> str | None:
        """Why it is not ready, in words that tell nothing of the machine."""
        if self._provider is not None:
            return self._provider.engine.reason
        return "it could not be loaded: the log says why" if self._failure is not None else None

    @property
    def is_loaded(self) -> bool:
        return self._provider is not None and not self._is_leaving

    @property
    def known_info(self) -> ModelInfo | None:
        """Since its first load, whether it is loaded now or not."""
        return self._info

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "the model has to be in use"
        return self._info

    @property
    def provider(self) -> LocalProvider:
        assert self._provider is not None, "the model has to be in use"
        return self._provider

    @property
    def engine(self) -> Engine | None:
        return None if self._provider is None else self._provider.engine

    @property
    def held_bytes(self) -> int:
        """Of memory: while it is loaded, leaves, or is being loaded."""
        return self.reserved_bytes or (self.memory_bytes if self._provider is not None else 0)

    @property
    def memory_bytes(self) -> int:
        """That it takes, or will take."""
        if self._info is not None and self._info.memory_bytes:
            return self._info.memory_bytes
        return self.found.weight_bytes if self.found is not None else 0

    # For requests

    async def __aenter__(self) -> Self:
        """Load the model if it is not, and keep it from being unloaded. Raises `Unavailable`."""
        while not self._is_usable:
            if self._changing is None:
                self._refuse_while_resting()
                self._start(self._load())
            await self._until_changed()
        self.users += 1
        self._idle.clear()
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.users -= 1
        self.used_at = time.monotonic()
        if not self.users:
            self._idle.set()

    @property
    def _is_usable(self) -> bool:
        if self._provider is None or self._is_leaving:
            return False
        # A pinned one that is dead needs a new process, which /livez asks for.
        return self._provider.engine.state != "dead" or self.spec.pinned

    def _refuse_while_resting(self) -> None:
        """Raises `Unavailable` for a while after a load that failed."""
        if self._failure is not None and (left := self._retry_at - time.monotonic()) > 0:
            seconds = max(1, round(left))
            raise Unavailable(
                f"the model {self.name!r} could not be loaded, the server's log says why; it is tried again in "
                f"{seconds} s",
                code="model_load_failed",
                headers={"Retry-After": str(seconds)},
            )

    def _start(self, change: Awaitable[None]) -> None:
        self._changing = asyncio.ensure_future(change)

    async def _until_changed(self) -> None:
        """Or until the server stops. The change does not end when its waiter is cancelled."""
        if (changing := self._changing) is not None:
            stopped = asyncio.ensure_future(self._stopped.wait())
            try:
                await asyncio.wait([changing, stopped], return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopped.cancel()
        if self._stopped.is_set():
            raise Unavailable("the server is shutting down", code="backend_lost")

    async def until_gone(self) -> None:
        """Once it does not leave any more: whether it is loaded again then is another question."""
        await self._gone.wait()

    # Loading and unloading

    def load_now(self) -> None:
        """Before there is an event loop. Raises `ModelError`."""
        self.found = self.found or Found.of(self.spec)
        self._provider = self._load_found(self.found)

    async def load(self) -> None:
        """Now, whenever it failed last. Raises `Unavailable`."""
        self._retry_at = 0.0
        async with self:
            pass

    async def unload(self) -> None:
        """Once the requests that hold it are answered; those that come meanwhile wait, and have it loaded again.

        Raises `Unavailable` when the server stops meanwhile.
        """
        while self._changing is not None:
            await self._until_changed()
        if self._provider is not None:
            self._start(self._unload(self._provider))
            await self._until_changed()

    async def _load(self) -> None:
        try:
            if self._provider is not None:  # its worker is dead
                await self._drop(self._provider)
            if self.found is None:
                self.found = await self.download.start()
            await self._make_room(self, self.memory_bytes)
            provider = await self._in_thread(partial(self._load_found, self.found))
            try:
                await self._make_room(self, self.memory_bytes)  # now it is known what it takes
            except ModelError:
                await asyncio.to_thread(self._end, provider)
                raise
            self._provider = provider
        except ModelError as error:
            self._rest(error)
        except Exception as error:  # whatever it was, those that wait are answered, and the other models go on
            log.exception("loading %s failed", self.name, extra=TOLD_IN_FULL)
            self._rest(error)
        finally:
            self.reserved_bytes, self._changing = 0, None

    async def _find(self, progress: Progress) -> Found:
        self.found = await self._in_thread(partial(Found.of, self.spec, progress))
        self._retry_at = 0.0  # whatever failed last, there is something to try now
        return self.found

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """In a thread that nobody waits for at the end, as asyncio does for its own: a download may take an hour."""
        loop, done = asyncio.get_running_loop(), asyncio.Future[Result]()

        def run() -> None:
            try:
                settle = partial(done.set_result, work())
            except BaseException as error:
                settle = partial(done.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: None if done.cancelled() else settle())

        self._thread = threading.Thread(target=run, name=f"load-{self.name}", daemon=True)
        self._thread.start()
        return await done

    def _rest(self, error: Exception) -> None:
        self._failures += 1
        self._failure = error
        pause = min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE)
        self._retry_at = time.monotonic() + pause
        self._parts.metrics.observe_failed_load(self.name)
        log.error("%s could not be loaded, and will not be tried again for %d s: %s", self.name, pause, error)

    def _load_found(self, found: Found) -> LocalProvider:
        """Blocks until the model can answer. Raises `ModelError`."""
        started = time.monotonic()
        checkpoint, spec, parts = found.checkpoint, self.spec, self._parts
        options = LoadOptions(
            spec.device, spec.dtype, spec.max_image_tokens, checkpoint.base, checkpoint.adapters, spec.kind
        )
        engine = Engine(
            self.name,
            partial(self._load_backend, found, options),
            queue_tokens=parts.queue_tokens,
            batch_tokens=spec.max_batch_tokens,
            observe=partial(parts.metrics.observe_batch, self.name),
            turns=parts.turns,
        )
        try:
            info = engine.load()
            _check_dimensions(spec, info)
        except ModelError:
            engine.unload()
            self._free_memory()
            raise
        self._info = replace(info, prompts={**info.prompts, **spec.prompts})
        self._failure, self._failures = None, 0
        self.used_at = time.monotonic()
        parts.metrics.watch_queue(self.name, engine.queue)
        parts.metrics.observe_load(self.name, time.monotonic() - started, info.memory_bytes)
        memory.settle()
        _announce(self.name, found, info)
        return LocalProvider(engine)

    def _load_backend(self, found: Found, options: LoadOptions) -> Backend:
        """Also when a worker that was lost starts again: the files may be others by then."""
        checkpoint, choice = found.checkpoint, found.choice
        files = files_of(checkpoint) if self._parts.keep_results else None
        backend = self._parts.load(choice, checkpoint.folder, options)
        self.files = files
        if files is not None:
            self.identity = identity_of(files, backend.info, choice.target, options.kind, options.max_image_tokens)
        return backend

    async def _unload(self, provider: LocalProvider) -> None:
        try:
            await self._drop(provider)
        except Exception:  # its requests are answered, and it is gone: it can be loaded again
            log.exception("unloading %s failed", self.name, extra=TOLD_IN_FULL)
        finally:
            self._changing = None

    async def _drop(self, provider: LocalProvider) -> None:
        self._is_leaving = True
        self._gone.clear()
        try:
            while self.users and provider.engine.state != "dead":
                await self._idle.wait()
            try:
                await asyncio.to_thread(self._end, provider)
            finally:
                self._provider = None  # whatever its end was, it answers nothing any more
        finally:
            self._is_leaving = False
            self._gone.set()
        self._parts.metrics.observe_unload(self.name)
        log.info("unloaded %s", self.name)

    def _end(self, provider: LocalProvider) -> None:
        """Blocks until the model is gone from memory."""
        provider.unload()
        self._free_memory()

    def _free_memory(self) -> None:
        memory.release()  # first, what refers to the device's memory
        if self.found is not None:
            detect.free_memory(self.found.choice.backend)

    # The end

    def stop(self) -> None:
        """Fail every request that is not answered yet; the worker ends after the batch that runs."""
        if self._provider is not None:
            self._provider.engine.stop()
        if self._changing is not None and not (loop := self._changing.get_loop()).is_closed():
            loop.call_soon_threadsafe(self._stopped.set)

    def close(self, deadline: float) -> bool:
        """Stop, and wait for the worker. False: it still runs a batch, or the model is being loaded."""
        if self._thread is not None and self._thread.is_alive():
            return False
        if self._provider is None:
            return True
        self._provider.close()
        return self._provider.engine.join(max(0.0, deadline - time.monotonic()))


def _check_dimensions(spec: ModelSpec, info: ModelInfo) -> None:
    """What says that a fallback fits must be true. Raises `ModelError`."""
    if spec.dimensions not in (None, info.dimensions):
        raise ModelError(f"its vectors have {info.dimensions} dimensions, and `dimensions` is {spec.dimensions}")


_ORIGINS = {
    "local": "from a local folder",
    "packaged": "from an installed package",
    "cache": "revision {} from the cache",
    "hub": "revision {} from the hub",
}


def _announce(name: str, found: Found, info: ModelInfo) -> None:
    snapshot, choice = found.checkpoint.snapshot, found.choice
    log.info(
        "serving %s: %s, backend %s (%s), device %s, dtype %s, %d dimensions, %d tokens at most, takes %s, gives %s%s",
        name,
        _ORIGINS[snapshot.source].format(snapshot.revision),
        info.backend,
        choice.reason if choice.verified else f"{choice.reason}, not verified",
        info.device,
        info.dtype,
        info.dimensions,
        info.max_tokens,
        " and ".join(info.modalities),
        "scores" if info.output == "rerank" else f"{', '.join(info.outputs)} vectors",
        f", adapters {', '.join(info.adapters)}" if info.adapters else "",
    )
