"""A server, or a worker of its own, whose models tests can slow down and hold. Also run as a script.

A model's vectors follow from its folder's name and the text. In its folder, `script.json` may hold `dimensions`,
`seconds` (of a text), `max_tokens` and `lenient`: then texts that begin with tests.scripted's words do not do what they
say there. While a file `hold` is there, it computes nothing; a file `broken` makes loads fail.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Backend, Item, LoadOptions, Prepared, Truncate
from mlx_embeddings_backends.detect import Choice
from mlx_embeddings_backends.errors import InputTooLong
from mlx_embeddings_server.main import argument_parser
from mlx_embeddings_server.serve import serve
from mlx_embeddings_server.settings import load_settings
from mlx_embeddings_server.work import work
from tests.scripted import DIMENSIONS, ScriptedBackend, vector
from tests.server import Server

JOBS = "/api/v1/embeddings/reembed"
COLLECTIONS = "/api/v1/embeddings/collections"


_numbers = count()


def vector_of(model: str, text: str, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    return np.resize(vector(f"{model}: {text}"), dimensions)


class FolderBackend(ScriptedBackend):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = json.loads((folder / "script.json").read_bytes())
        self.seconds, self.is_lenient = script.get("seconds", 0), script.get("lenient", False)
        self.info = replace(
            self.info, dimensions=script.get("dimensions", DIMENSIONS), max_tokens=script.get("max_tokens", 10_000)
        )

    def prepare(self, items: Sequence[Item], truncate: Truncate = "none") -> list[Prepared]:
        prepared, most = super().prepare(items, truncate), self.info.max_tokens
        too_long = [(place, each.tokens) for place, each in enumerate(prepared) if each.tokens > most]
        if too_long and truncate == "none":
            raise InputTooLong(too_long, most)
        for place, _ in too_long:
            prepared[place] = Prepared(" ".join(prepared[place].payload.split()[:most]), tokens=most, truncated=True)
        return prepared

    def run(self, batch: list[str]) -> NDArray[np.float32]:
        while (self.folder / "hold").exists():
            time.sleep(0.01)
        time.sleep(self.seconds * len(batch))
        rows = np.stack([vector_of(self.folder.name, text, self.info.dimensions) for text in batch])
        if self.is_lenient:
            return rows
        return np.where(np.isnan(super().run(batch)).any(axis=1, keepdims=True), np.float32(np.nan), rows)


def load(choice: Choice, folder: Path, options: LoadOptions) -> Backend:
    if (folder / "broken").exists():
        raise RuntimeError("the file is there")
    return FolderBackend(folder)


def configured(folder: Path, models: Mapping[str, Mapping[str, Any]], **settings: Any) -> Path:
    """The file for --config. `models` has each one's script; a setting that is None is left out."""
    entries = {}
    for name, script in models.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        (own / "config.json").write_text('{"model_type": "bert"}')
        (own / "script.json").write_text(json.dumps(script))
        entries[name] = {"name": str(own)}
    file = folder / "models.yaml"
    given = {"collections": "chroma", "collections_path": str(folder / "collections"), "reembed_worker": True}
    chosen = {name: value for name, value in {**given, **settings}.items() if value is not None}
    file.write_text(json.dumps({"models": entries, **chosen}))  # JSON is YAML
    return file


def jobs_server(file: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Server:
    return Server("--config", str(file), *flags, command=("-m", "tests.jobs", "serve"), environment=environment)


class WorkerProcess:
    """`mlx-embeddings-server worker` in a process of its own."""

    def __init__(self, file: Path, *flags: str) -> None:
        self.file, self.flags = file, flags

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Waits until it does jobs."""
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        command = [sys.executable, "-m", "tests.jobs", "worker", "--config", str(self.file), *self.flags]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 60
        while "worker has started" not in self.log:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self._log.close()

    def __exit__(self, *failure: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.close()


def schedule(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(f"{JOBS}/schedule", json=fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def job_of(client: httpx.Client, job: Mapping[str, Any]) -> dict[str, Any]:
    return dict(client.get(f"{JOBS}/jobs/{job['id']}").raise_for_status().json())


def until(
    client: httpx.Client, job: Mapping[str, Any], *statuses: str, done: int = 0, seconds: float = 60
) -> dict[str, Any]:
    """The job, once it has one of the statuses, and so many documents done."""
    deadline = time.monotonic() + seconds
    while True:
        found = job_of(client, job)
        if found["status"] in statuses and found["progress"]["done"] >= done:
            return found
        assert found["status"] in ("queued", "running"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def collection(client: httpx.Client, documents: Sequence[dict[str, Any]]) -> str:
    name = f"notes-{next(_numbers)}"
    client.post(COLLECTIONS, json={"name": name, "embedding_model": "old"}).raise_for_status()
    upsert(client, name, documents)
    return name


def notes(client: httpx.Client, count: int = 100) -> str:
    """A collection of so many documents with vectors of the model `old`."""
    return collection(client, [document(number) for number in range(count)])


def document(number: int, text: str = "", **metadata: object) -> dict[str, Any]:
    return {"id": f"id-{number}", "text": text or f"words of {number}", "metadata": metadata or {"n": number}}


def upsert(client: httpx.Client, name: str, documents: Sequence[dict[str, Any]]) -> None:
    client.post(f"{COLLECTIONS}/{name}/documents", json={"documents": list(documents)}).raise_for_status()


def best(client: httpx.Client, name: str, text: str, model: str) -> tuple[str, float]:
    """The id and score of the document most like the text, whose vector is that of the model."""
    body = {"query": text, "n_results": 1, "model": model}
    (hit,) = client.post(f"{COLLECTIONS}/{name}/query", json=body).raise_for_status().json()["results"]
    return hit["id"], round(hit["score"], 4)


def all_of(client: httpx.Client, name: str) -> dict[str, dict[str, Any]]:
    reply = client.get(f"{COLLECTIONS}/{name}/documents", params={"limit": 1000}).raise_for_status()
    return {each["id"]: each for each in reply.json()["documents"]}


def check_vectors(client: httpx.Client, name: str, model: str) -> None:
    """Documents have the vector that the model makes of their text: its text finds it, with a cosine of 1."""
    documents = all_of(client, name)
    assert client.get(f"{COLLECTIONS}/{name}/stats").json()["count"] == len(documents)
    for id, found in list(documents.items())[:: max(1, len(documents) // 20)]:
        assert best(client, name, found["text"], model) == (id, 1.0)


if __name__ == "__main__":
    run = {"serve": serve, "worker": work}[sys.argv[1]]
    flags = vars(argument_parser().parse_args(sys.argv[2:]))
    run(load_settings({name: value for name, value in flags.items() if value is not None}), load=load)
