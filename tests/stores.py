"""Stores for tests: an embedded Chroma and Qdrant, a Chroma server of its own, and what is put into them."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_server.stores.base import Document, EmbeddedDocument, EmbeddingFacts, Scalar
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.store import VectorStore

T = TypeVar("T")

QDRANT_SERVER = "MLX_EMBEDDINGS_TEST_QDRANT"  # such as qdrant+http://localhost:6333; the tests leave it as it was
NO_QDRANT = f"needs a Qdrant server: its URL in {QDRANT_SERVER}"
KINDS = ["chroma", "chroma-server", "qdrant", *(["qdrant-server"] if os.environ.get(QDRANT_SERVER) else [])]
DIMENSION = 8

MINI = EmbeddingFacts("mini", "local", "example/mini", "abc123", "dense", DIMENSION)
OTHER = EmbeddingFacts("other", "local", "example/other", "def456", "dense", 4)
PAGES = EmbeddingFacts("pages", "local", "example/pages", None, "multi_vector", DIMENSION)


class ChromaServer:
    """`chroma run` of the installed package, on a free port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        command = Path(sys.executable).parent / "chroma"
        flags = ["run", "--path", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen([command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("chroma run does not answer")
            time.sleep(0.05)
        return self

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/v2/heartbeat", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[VectorStore]:
    """A store by the name of its kind: chroma, chroma-server, qdrant, qdrant-server."""
    with ExitStack() as stack:
        target = kind
        if kind == "chroma-server":
            target = stack.enter_context(ChromaServer(folder / "server")).url
        elif kind == "qdrant-server":
            target = os.environ[QDRANT_SERVER]
        yield stack.enter_context(closing(open_store(target, folder)))


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(limited())


async def re_embed(store: VectorStore, owner: str, name: str, facts: EmbeddingFacts, *, at_once: int = 100) -> None:
    """As a job does it: from where an earlier one was killed, to the switch."""
    version = await store.begin_version(owner, name, facts)
    while True:
        while waiting := (await store.waiting(owner, name, version))[:at_once]:
            found = await store.documents(owner, name, ids=[each.id for each in waiting])
            await store.fill(version, waiting, again(found, facts))
        if await store.switch(owner, name, version):
            return


def vector(number: int, dimension: int = DIMENSION) -> NDArray[np.float32]:
    """One of length 1 for each number, always the same."""
    made = np.random.default_rng(number).normal(size=dimension).astype(np.float32)
    return made / np.linalg.norm(made)


def text(
    number: int, facts: EmbeddingFacts = MINI, *, words: str = "", metadata: Mapping[str, Scalar] | None = None
) -> EmbeddedDocument:
    """The document `id-NUMBER` with the number's vector."""
    document = Document(f"id-{number}", words or f"text {number}", None, metadata or {})
    return EmbeddedDocument(document, vector(number, facts.dimension))


def again(documents: Sequence[Document], facts: EmbeddingFacts) -> list[EmbeddedDocument]:
    """As another model embeds the stored documents: the vector follows from the text alone."""
    return [EmbeddedDocument(each, vector_of(each.text or "", facts.dimension)) for each in documents]


def vector_of(words: str, dimension: int) -> NDArray[np.float32]:
    return vector(int.from_bytes(words.encode()[-6:] or b"\0", "big"), dimension)


def run_script(script: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Python code in a process of its own that prints a line when it has come to where the test goes on."""
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )
