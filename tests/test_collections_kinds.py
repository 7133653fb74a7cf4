"""Collections of real models of every kind: prompts by role, inputs that are too long, and who makes none."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.all_kinds import models_file
from tests.threaded import ThreadedServer

PLACE = "/v1/collections"
TEXTS = ["the cat sat", "a dog ran home", "birds fly"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedServer]:
    folder = tmp_path_factory.mktemp("kinds")
    file = models_file(folder, collections="chroma", collections_path=folder / "kept")
    with ThreadedServer(file) as server:
        yield server


def make(server: ThreadedServer, name: str, model: str) -> str:
    reply = server.client.post(PLACE, json={"name": name, "embedding_model": model})
    assert reply.status_code == 201, reply.text
    return f"{PLACE}/{name}"


@pytest.mark.parametrize(
    ("model", "status", "code", "told"),
    [
        ("pages", 409, "collection_mismatch", "use Qdrant"),
        ("sparse", 400, "wrong_model_type", "sparse"),
        ("reranker", 400, "wrong_model_type", "/v1/rerank"),
        ("broken", 503, "model_load_failed", "could not be loaded"),
    ],
)
def test_a_model_without_vectors_for_the_store_makes_no_collection(
    server: ThreadedServer, model: str, status: int, code: str, told: str
) -> None:
    reply = server.client.post(PLACE, json={"name": f"of-{model}", "embedding_model": model})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code) and told in error["message"]
    assert f"of-{model}" not in [each["name"] for each in server.client.get(PLACE).json()]


@pytest.mark.parametrize("model", ["dense", "bge-m3"])
def test_texts_are_embedded_as_documents_and_questions_as_queries(server: ThreadedServer, model: str) -> None:
    notes = make(server, f"roles-{model}", model)
    documents = [{"id": text, "text": text} for text in TEXTS]
    assert server.client.post(f"{notes}/documents", json={"documents": documents}).is_success

    def vectors(inputs: list[str], role: str) -> Any:
        data = server.embed(inputs, model=model, input_type=role, normalize=True).json()["data"]
        return np.array([each["embedding"] for each in data])

    [question] = vectors(["cat dog"], "query")
    wanted = dict(zip(TEXTS, vectors(TEXTS, "document") @ question, strict=True))
    as_document = vectors(TEXTS, "document") @ vectors(["cat dog"], "document")[0]
    if model == "dense":  # it has a prompt for queries
        assert np.abs(as_document - list(wanted.values())).max() > 1e-3
    results = server.client.post(f"{notes}/query", json={"query": "cat dog"}).json()["results"]
    assert {each["id"]: each["score"] for each in results} == pytest.approx(wanted, abs=1e-4)


def test_what_is_too_long_is_refused_by_its_place_or_cut_when_that_is_asked_for(server: ThreadedServer) -> None:
    notes = make(server, "long", "d")
    documents = ["the cat", "the cat " * 500, "a dog"]
    reply = server.client.post(f"{notes}/documents", json={"documents": documents})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "input_too_long") and "documents[1]" in error["message"]
    there = "/api/v1/embeddings/collections/long/documents"
    assert server.client.post(there, json={"documents": documents}).json()["error"] == "input_too_long"
    assert server.client.get(f"{notes}/stats").json()["count"] == 0
    reply = server.client.post(f"{notes}/documents", json={"documents": documents, "truncate": True})
    assert reply.status_code == 200 and reply.headers["x-embeddings-truncated"] == "1"
    assert reply.json()["usage"]["truncated_inputs"] == [1]
    [_, long, _] = server.client.get(f"{notes}/documents", params={"ids": reply.json()["ids"]}).json()["documents"]
    assert long["text"] == documents[1]  # all of it is kept
    error = server.client.post(f"{notes}/query", json={"query": "the cat " * 500}).json()["error"]
    assert error["code"] == "input_too_long" and error["param"] == "query"
