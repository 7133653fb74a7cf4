"""A worker in a process of its own: does the jobs that a server was asked for, with models that it loads by itself."""

import asyncio
import logging
import os
import signal
from typing import NoReturn

from mlx_embeddings_backends import detect
from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.ending import end_process
from mlx_embeddings_server.logs import configure_logging
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.served_model import Load
from mlx_embeddings_server.settings import Settings, SettingsError
from mlx_embeddings_server.stores.opening import parse_target

log = logging.getLogger(__name__)


def work(settings: Settings, *, load: Load = detect.load) -> NoReturn:
    """Until a signal, then the process ends; at a second one at once. Raises `SettingsError` or `ModelError`."""
    configure_logging(settings.log_format)
    if settings.collections is None:
        raise SettingsError("a worker needs --collections, and the same --collections-path as the server")
    if parse_target(settings.collections)[1] is None:
        raise SettingsError(
            f"--collections {settings.collections}: a worker needs a store by URL, as one inside the process is the "
            "server's alone: let the server do its jobs by itself, with --reembed-worker"
        )
    app = create_app(settings.model_copy(update={"reembed_worker": True}), load=load, preloads=False)
    runtime: Runtime = app.state.runtime

    async def live() -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()

        def stop(number: int) -> None:
            if stopped.is_set():
                os._exit(128 + number)
            log.info("signal %d: the job that runs is given back; a second signal ends at once", number)
            stopped.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        async with app.router.lifespan_context(app):
            await stopped.wait()

    asyncio.run(live())
    end_process(is_idle=runtime.models.close())
