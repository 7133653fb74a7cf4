"""A server in a thread of the test's own process: as it is over HTTP, and started in a tenth of the time that a process
takes. For tests that start many, and end none by a signal.
"""

import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import uvicorn
from fastapi import FastAPI

from mlx_embeddings_backends import detect
from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.http_protocol import BoundedHttpProtocol
from mlx_embeddings_server.served_model import Load
from mlx_embeddings_server.settings import load_settings
from tests.server import Server


class ThreadedServer:
    """`with ThreadedServer(file, load) as server:` reads the file for --config anew each time; or give settings."""

    keep_alive = 75  # seconds, as with the launcher

    def __init__(self, file: Path | None = None, load: Load = detect.load, **settings: object) -> None:
        self._settings = settings if file is None else {"config": str(file), **settings}
        self._load = load

    def __enter__(self) -> Self:
        app = create_app(load_settings(self._settings), load=self._load)
        listener = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(self._config(app))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return self

    def _config(self, app: FastAPI) -> uvicorn.Config:
        return uvicorn.Config(
            app, http=BoundedHttpProtocol, log_config=None, access_log=False, timeout_keep_alive=self.keep_alive
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def embed(self, input: object, model: str, **fields: object) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": model, "input": input, **fields})


AnyServer = Server | ThreadedServer
