"""Runs the app under uvicorn: the log, the signals, and the order of a clean end."""

import ipaddress
import logging
import os
import socket
import sys
import time
from types import FrameType
from typing import NoReturn

import uvicorn

from mlx_embeddings_backends import detect
from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.ending import end_process
from mlx_embeddings_server.http_protocol import BoundedHttpProtocol
from mlx_embeddings_server.logs import configure_logging
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.served_model import Load
from mlx_embeddings_server.settings import Settings, SettingsError

log = logging.getLogger(__name__)

# Seconds for what is left after draining: closing connections, stopping workers.
_LAST_STEPS_TIMEOUT = 1


def serve(settings: Settings, *, load: Load = detect.load) -> NoReturn:
    """Load the models, then open the port; the process ends after a signal. Raises `SettingsError` or `ModelError`."""
    configure_logging(settings.log_format)
    # Bound now, so that a port in use is told at once; listening, and so open to clients, when the models are loaded.
    listener = _bind(settings.host, settings.port)
    app = create_app(settings, load=load)
    runtime: Runtime = app.state.runtime
    runtime.models.load()
    if runtime.access is None and not _is_loopback(settings.host):
        log.warning("anyone who reaches %s can use this server: set --api-key to ask for a key", settings.host)
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_STEPS_TIMEOUT,
    )
    DrainingServer(config, runtime).run(sockets=[listener])
    end_process(is_idle=runtime.models.close())


class DrainingServer(uvicorn.Server):
    """On the first signal: refuse new work, answer what is in flight, end. On the second: end."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for listening in server.sockets:
                host, port, *_ = listening.getsockname()
                log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._runtime.draining:
            os._exit(128 + sig)
        self._runtime.draining = True
        self._deadline = time.monotonic() + self._runtime.settings.drain_timeout
        log.info(
            "signal %d: finishing %d requests in flight; a second signal ends at once", sig, self._runtime.in_flight
        )

    async def on_tick(self, counter: int) -> bool:
        if self._runtime.draining and not self.should_exit:
            left = self._runtime.in_flight
            if left and time.monotonic() >= self._deadline:
                log.warning("%d requests were not finished within --drain-timeout", left)
                self._runtime.models.stop()  # answers them with 503
            self.should_exit = left == 0 or time.monotonic() >= self._deadline
        return await super().on_tick(counter)


def _bind(host: str, port: int) -> socket.socket:
    """Raises `SettingsError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # A name such as localhost may have both kinds of address: clients that know one know IPv4.
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would let two servers have the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SettingsError(f"--host {host} --port {port}: {error.strerror}") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
