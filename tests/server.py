"""A real server in a process of its own, for tests that speak HTTP to it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import httpx

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
START_SECONDS = 120
# For a server's environment: those that compute for users have them, where tests otherwise make do with one.
ALL_THREADS = {"OMP_NUM_THREADS": str(os.cpu_count())}


class Server:
    """`with Server("--model", ...) as server:` starts it on a free port, waits until it listens, and ends it."""

    def __init__(
        self,
        *flags: str,
        command: Sequence[str] = ("-m", "mlx_embeddings_server.main"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = [sys.executable, *command, *flags, "--port", "0"]
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
        self.url = ""

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+b")
        self.process = subprocess.Popen(self.command, env=self.environment, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + START_SECONDS
        while not (match := re.search(r"(?:listening|running) on (http://[^\s\"]+)", self.log)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                said = self.log
                self._log.close()
                raise RuntimeError(f"the server did not start:\n{said}")
            time.sleep(0.05)
        self.url = match[1]
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._log.close()

    @property
    def log(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def wait_for_log(self, pattern: str, seconds: float = 20) -> None:
        """A request is logged after its reply has gone out."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.log):
            assert time.monotonic() < deadline, f"{pattern} is not in the log:\n{self.log}"
            time.sleep(0.05)

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def embed(self, input: object, model: str = MINILM, **fields: object) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": model, "input": input, **fields})
