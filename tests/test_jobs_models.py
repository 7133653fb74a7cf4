"""Jobs with models of other kinds: of another server, and multi-vector ones of pages and texts; and beside a cache."""

import base64
import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.checkpoints import sentence_transformer
from tests.conftest import DATA
from tests.jobs import (
    COLLECTIONS,
    all_of,
    check_vectors,
    collection,
    configured,
    document,
    job_of,
    jobs_server,
    schedule,
    until,
    upsert,
)
from tests.scripted import vector
from tests.server import Server
from tests.upstream import Handler, Upstream, always, first, good, reply_of, upstream

COLQWEN = DATA / "colqwen2_5"
EXPECTED = load_file(COLQWEN / "expected.safetensors")
TEXTS: list[str] = json.loads((COLQWEN / "queries.json").read_text())


def there(handler: Handler) -> None:
    """A model of 8 dimensions that refuses one text."""
    if any("refuse" in text for text in handler.inputs):
        return handler.reply({"error": {"message": "this text is not for me"}}, 400)
    handler.reply(reply_of([vector(f"there: {text}") for text in handler.inputs]))


@pytest.fixture(scope="module")
def pages() -> Iterator[Upstream]:
    with upstream({"there": there, "busy": good}) as pages:
        yield pages


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pages: Upstream) -> Iterator[Server]:
    """The models `old` and `new` are here, the others at providers, of which no list says how large vectors are."""
    providers = {
        name: {"url": f"{pages.url}/{name}/v1", "retries": 0, "failure_threshold": 50} for name in ("there", "busy")
    }
    file = configured(
        tmp_path_factory.mktemp("jobs"), {"old": {}, "new": {"dimensions": 6}}, providers=providers, cache=True
    )
    settings = json.loads(file.read_text())
    settings["models"] |= {name: {"name": "m", "provider": name} for name in providers}
    file.write_text(json.dumps(settings))
    with jobs_server(file) as server:
        yield server


def test_a_model_of_another_server_embeds_a_collection_anew(server: Server, pages: Upstream) -> None:
    client = server.client
    name = collection(client, [document(number) for number in range(300)])
    before = all_of(client, name)
    job = schedule(client, collection=name, embedder_version="there", embedder_name="there")
    done = until(client, job, "completed")
    assert (done["embedder_name"], done["embedder_version"]) == ("there", "there")
    assert done["progress"] == {"done": 300, "total": 300} and done["attempts"] == 1
    sent = [text for body in pages.requests["there"] for text in body["input"] if text.startswith("words")]
    assert sorted(sent) == sorted(f"words of {number}" for number in range(300))
    assert all_of(client, name) == before
    check_vectors(client, name, "there")
    told = client.get(f"{COLLECTIONS}/{name}/stats").json()
    assert told["metadata"]["provider"] == "there" and told["embedding_dimension"] == 8


def test_a_document_that_the_provider_refuses_is_named(server: Server) -> None:
    name = collection(server.client, [document(number, "refuse me" if number == 7 else "") for number in range(20)])
    failed = until(server.client, schedule(server.client, collection=name, embedder_version="there"), "failed")
    assert "'id-7'" in failed["error"] and "not for me" in failed["error"] and failed["attempts"] == 1
    check_vectors(server.client, name, "old")


@pytest.mark.parametrize("away", [always({}, 503), always({}, 429)], ids=["fails", "is-full"])
def test_a_provider_that_is_away_is_asked_again(server: Server, pages: Upstream, away: Any) -> None:
    client = server.client
    name = collection(client, [document(number) for number in range(20)])
    pages.pages["busy"] = first(away, good)
    job = schedule(client, collection=name, embedder_version="busy")
    until(client, job, "completed")
    check_vectors(client, name, "busy")


def test_a_provider_that_takes_no_key_fails_the_job_in_the_end_and_tells_why(server: Server, pages: Upstream) -> None:
    client = server.client
    name = collection(client, [document(1)])
    pages.pages["busy"] = always({}, 401)
    job = schedule(client, collection=name, embedder_version="busy")
    server.wait_for_log(rf"job {job['id']} failed for the 1\. time")
    assert "key" in job_of(client, job)["error"]
    pages.pages["busy"] = good
    until(client, job, "completed")


def test_a_job_leaves_the_cache_to_callers(server: Server) -> None:
    client = server.client

    def entries() -> int:
        return int(client.get("/health").json()["cache"]["size"])

    name = collection(client, [document(number, f"seldom asked for {number}") for number in range(50)])
    before = entries()
    until(client, schedule(client, collection=name, embedder_version="new"), "completed")
    assert entries() == before
    for _ in range(2):
        client.post("/v1/embeddings", json={"model": "new", "input": "often asked for"}).raise_for_status()
    assert entries() == before + 1


# Multi-vectors


def data_uri(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((COLQWEN / f"{name}.png").read_bytes()).decode()


@pytest.fixture(scope="module")
def qdrant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models of pages, which differ in nothing but their folder, and one of texts."""
    folder = tmp_path_factory.mktemp("pages")
    models = {name: {"name": str(shutil.copytree(COLQWEN / "checkpoint", folder / name))} for name in ("old", "pages")}
    models["texts"] = {"name": str(sentence_transformer(folder / "texts"))}
    file = configured(folder, {}, collections="qdrant", backend="torch", dtype="float32")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"models": models}))
    with Server("--config", str(file)) as server:
        yield server


def scores(server: Server, name: str, query: str, model: str) -> dict[str, float]:
    body = {"query": query, "model": model}
    reply = server.client.post(f"{COLLECTIONS}/{name}/query", json=body).raise_for_status()
    return {each["id"]: each["score"] for each in reply.json()["results"]}


def max_sim(query: NDArray[np.float32], page: NDArray[np.float32]) -> float:
    return float((query @ page.T).max(axis=1).sum())


def test_pages_and_texts_get_the_multi_vectors_of_another_model(qdrant: Server) -> None:
    client = qdrant.client
    documents: list[dict[str, Any]] = [{"id": each, "image": data_uri(each)} for each in ("image_0", "image_1")]
    documents += [{"id": f"document_{number}", "text": text} for number, text in enumerate(TEXTS)]
    name = collection(client, documents)
    before = all_of(client, name)
    until(client, schedule(client, collection=name, embedder_version="pages"), "completed")
    assert all_of(client, name) == before
    for number, text in enumerate(TEXTS):
        wanted = {each["id"]: max_sim(EXPECTED[f"query_{number}"], EXPECTED[each["id"]]) for each in documents}
        assert scores(qdrant, name, text, "pages") == pytest.approx(wanted, rel=2e-4)
    job = schedule(client, collection=name, embedder_version="texts")  # which has no use for pages
    failed = until(client, job, "failed")
    assert "'image_" in failed["error"]
    assert len(scores(qdrant, name, TEXTS[0], "pages")) == len(documents)


def test_a_collection_of_one_vector_a_text_becomes_one_of_many_and_back(qdrant: Server) -> None:
    client = qdrant.client
    client.post(COLLECTIONS, json={"name": "dense", "embedding_model": "texts"}).raise_for_status()
    upsert(client, "dense", [{"id": f"document_{number}", "text": text} for number, text in enumerate(TEXTS)])
    before = scores(qdrant, "dense", TEXTS[0], "texts")
    until(client, schedule(client, collection="dense", embedder_version="pages"), "completed")
    wanted = {f"document_{each}": max_sim(EXPECTED["query_0"], EXPECTED[f"document_{each}"]) for each in range(3)}
    assert scores(qdrant, "dense", TEXTS[0], "pages") == pytest.approx(wanted, rel=2e-4)
    until(client, schedule(client, collection="dense", embedder_version="texts"), "completed")
    assert scores(qdrant, "dense", TEXTS[0], "texts") == pytest.approx(before, abs=1e-5)
