"""A worker that is killed at any point: its job goes on, and nothing is lost or doubled."""

import random
import signal
import time
from pathlib import Path
from typing import cast

import chromadb
import numpy as np
from chromadb.api.client import Client
from chromadb.config import Settings
from numpy.typing import NDArray

from mlx_embeddings_server.stores.base import Collection, EmbeddedDocument
from mlx_embeddings_server.stores.opening import open_store
from tests.jobs import configured, jobs_server, schedule, until, vector_of
from tests.stores import MINI, run, text

OWNER = "everybody"  # the one user, where there are no tokens
KILLS = 5
DOCUMENTS = 300


def stored(folder: Path, index: str) -> tuple[dict[str, str], dict[str, NDArray[np.float32]]]:
    """Each document's text, and its vector, as they are in Chroma."""
    client = cast("Client", chromadb.PersistentClient(str(folder), Settings(anonymized_telemetry=False)))
    try:
        found = client.get_collection(index, embedding_function=None).get(include=["metadatas", "embeddings"])
    finally:
        client.close()
    ids, metadatas, vectors = found["ids"], found["metadatas"], found["embeddings"]
    assert metadatas is not None and vectors is not None and len(set(ids)) == len(ids)
    texts = [str(each["mlx-embeddings:text"]) for each in metadatas]
    return dict(zip(ids, texts, strict=True)), dict(zip(ids, map(np.asarray, vectors), strict=True))


def collection_of(folder: Path, documents: list[EmbeddedDocument] | None = None) -> Collection:
    """As it is while no server runs; first made of the documents, where there are some."""
    store = open_store("chroma", folder / "collections")
    try:
        if documents is not None:
            run(store.create(OWNER, "notes", MINI))
            run(store.upsert(OWNER, "notes", MINI, documents))
        assert run(store.stats(OWNER, "notes")).count == DOCUMENTS
        return run(store.get(OWNER, "notes"))
    finally:
        store.close()


def test_a_job_that_is_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    words = {f"id-{number}": f"words of {number}" for number in range(DOCUMENTS)}
    first = collection_of(tmp_path, [text(number, words=f"words of {number}") for number in range(DOCUMENTS)])
    file = configured(tmp_path, {"new": {"seconds": 0.004}})
    dice, job, done = random.Random(4), None, [0]
    for _ in range(KILLS):
        with jobs_server(file) as server:
            job = job or schedule(server.client, collection="notes", embedder_version="new")
            # Some of them before it is taken, some while it runs.
            found = until(server.client, job, "queued", "running", "completed", done=dice.choice([0, done[-1] + 1]))
            done.append(found["progress"]["done"])
            time.sleep(dice.uniform(0, 0.2))
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        if done[-1] < DOCUMENTS:
            now = collection_of(tmp_path)
            assert now.current == first.current or now.filling is None  # it may have been done meanwhile
    assert job is not None and done == sorted(done)  # what was done is not done again
    with jobs_server(file) as server:
        ended = until(server.client, job, "completed")
        assert ended["progress"] == {"done": DOCUMENTS, "total": DOCUMENTS}
        assert ended["attempts"] > KILLS // 2
        server.stop()
    now = collection_of(tmp_path)
    assert now.facts.model == "new" and now.current.number == 2 and now.filling is None
    texts, vectors = stored(tmp_path / "collections" / "chroma" / "index", now.current.index)
    assert texts == words
    for id, vector in vectors.items():
        np.testing.assert_allclose(vector, vector_of("new", words[id]), rtol=1e-6)  # Chroma rounds the last bit
    store = open_store("chroma", tmp_path / "collections")
    assert run(store.clean_up(0)) == 0  # no index is left over
    store.close()
