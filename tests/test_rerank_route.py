"""Reranking over HTTP: by pairs, by MaxSim and by cosine, in all shapes that clients know."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer

from tests.all_kinds import COLQWEN, models_file
from tests.threaded import ThreadedServer

QUERY = "the quick fox"
DOCUMENTS = ["the lazy dog", "a fox jumps over the river", "silent music", "winter moon", "the quick brown fox"]
TOLERANCE = 1e-4
Scores = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = models_file(tmp_path_factory.mktemp("models"))
    content = json.loads(file.read_text())
    content["models"]["prompted"] = content["models"]["reranker"] | {"prompts": {"query": "the winter "}}
    file.write_text(json.dumps(content))
    return file.parent


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ThreadedServer]:
    with ThreadedServer(folder / "models.yaml") as server:
        yield server


@pytest.fixture(scope="module")
def raw(folder: Path) -> Scores:
    """The documents' scores before the activation."""
    model = CrossEncoder(str(folder / "reranker"), device="cpu", local_files_only=True)
    pairs: Any = [(QUERY, document) for document in DOCUMENTS]
    return np.asarray(model.predict(pairs, activation_fn=torch.nn.Identity()), dtype=np.float32)


def post(server: ThreadedServer, path: str = "/v1/rerank", **fields: Any) -> httpx.Response:
    body = {"model": "reranker", "query": QUERY, "documents": DOCUMENTS, **fields}
    return server.client.post(path, json={name: value for name, value in body.items() if value is not None})


def results(server: ThreadedServer, path: str = "/v1/rerank", **fields: Any) -> list[dict[str, Any]]:
    reply = post(server, path, **fields)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["results"])


def scores_of(found: list[dict[str, Any]], name: str = "relevance_score") -> Scores:
    """In the order of the documents. The results must be sorted."""
    given = [each[name] for each in found]
    assert given == sorted(given, reverse=True)
    by_index = {each["index"]: each[name] for each in found}
    return np.array([by_index[index] for index in range(len(found))], dtype=np.float32)


def error(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 400, reply.text
    return dict(reply.json()["error"])


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/api/v1/rerank"])
def test_a_cross_encoder_gives_the_librarys_scores(server: ThreadedServer, raw: Scores, path: str) -> None:
    np.testing.assert_allclose(scores_of(results(server, path, raw_scores=True)), raw, atol=TOLERANCE)
    np.testing.assert_allclose(scores_of(results(server, path)), 1 / (1 + np.exp(-raw)), atol=TOLERANCE)


def test_the_best_and_their_documents(server: ThreadedServer, raw: Scores) -> None:
    best = int(raw.argmax())
    for name in ("top_n", "top_k"):
        fields: dict[str, Any] = {name: 2}
        [first, second] = results(server, return_documents=True, **fields)
        assert first["index"] == best and first["document"] == {"text": DOCUMENTS[best]}
        assert first["relevance_score"] >= second["relevance_score"]
    asked = [{"text": document} for document in DOCUMENTS]
    assert results(server, documents=asked, return_documents=True)[0]["document"] == {"text": DOCUMENTS[best]}
    assert "document" not in results(server)[0]
    assert len(results(server, top_n=100)) == len(DOCUMENTS)


def test_a_reply_says_what_it_took(server: ThreadedServer) -> None:
    reply = post(server)
    content = reply.json()
    assert content["model"] == "reranker" and content["object"] == "rerank"
    assert content["usage"]["prompt_tokens"] == content["usage"]["total_tokens"] > len(DOCUMENTS) * 4
    assert "inference" in reply.headers["Server-Timing"]


def test_teis_request_has_teis_reply(server: ThreadedServer, raw: Scores) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, "return_text": True}
    reply = server.client.post("/rerank", json=body)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    np.testing.assert_allclose(scores_of(found, "score"), raw, atol=TOLERANCE)
    assert all(each["text"] == DOCUMENTS[each["index"]] for each in found)
    assert set(server.client.post("/rerank", json=body | {"return_text": False}).json()[0]) == {"index", "score"}


def test_what_is_wrong_with_teis_request_is_told_as_tei_does(server: ThreadedServer) -> None:
    refused = server.client.post("/rerank", json={"query": QUERY, "texts": ["a", ""]})
    assert refused.status_code == 400 and refused.json()["error_type"] == "Validation"
    assert refused.json()["error"].startswith("texts[1] is an empty string")


def test_the_files_prompt_is_put_before_the_query(server: ThreadedServer, raw: Scores) -> None:
    found = scores_of(results(server, model="prompted", raw_scores=True))
    by_hand = scores_of(results(server, query=f"the winter {QUERY}", raw_scores=True))
    np.testing.assert_allclose(found, by_hand, atol=TOLERANCE)
    assert not np.allclose(found, raw, atol=TOLERANCE)


def test_what_is_too_long_is_cut_only_if_asked_and_said(server: ThreadedServer) -> None:
    documents = ["short", "the river " * 200]
    refused = error(post(server, documents=documents))
    assert refused["code"] == "input_too_long" and refused["message"].startswith("documents[1] has ")
    assert refused["details"][0]["index"] == 1
    reply = post(server, documents=documents, truncate=True)
    assert reply.json()["usage"]["truncated_inputs"] == [1]
    assert reply.headers["X-Embeddings-Truncated"] == "1"
    for model in ("reranker", "dense"):
        for truncate in (True, None):
            refused = error(post(server, model=model, query="the river " * 200, truncate=truncate))
            assert refused["code"] == "input_too_long" and refused["message"].startswith("query ")


def test_a_documents_other_keys_are_only_given_back(server: ThreadedServer, raw: Scores) -> None:
    """As Cohere's clients send them."""
    documents = [{"id": place, "title": "none", "text": text} for place, text in enumerate(DOCUMENTS)]
    found = results(server, documents=documents, raw_scores=True, return_documents=True)
    np.testing.assert_allclose(scores_of(found), raw, atol=TOLERANCE)
    assert [each["document"] for each in found] == [documents[each["index"]] for each in found]


def test_null_is_as_good_as_left_out(server: ThreadedServer) -> None:
    body = {"model": None, "model_id": "reranker", "query": QUERY, "documents": DOCUMENTS, "top_n": None, "top_k": 2}
    assert len(server.client.post("/v1/rerank", json=body).json()["results"]) == 2


def test_many_documents(server: ThreadedServer) -> None:
    documents = [f"{DOCUMENTS[place % 5]} {place}" for place in range(2000)]
    found = scores_of(results(server, documents=documents, raw_scores=True))
    for place in (0, 777, 1999):
        [alone] = results(server, documents=[documents[place]], raw_scores=True)
        assert abs(alone["relevance_score"] - found[place]) < TOLERANCE


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"documents": []}, "empty_input", "documents is an empty list"),
        ({"documents": None}, "missing_required_parameter", "documents is missing"),
        ({"documents": "one"}, "invalid_type", "documents must be a list"),
        ({"documents": ["a", ""]}, "empty_input", "documents[1] is an empty string"),
        ({"documents": ["a", 5]}, "invalid_type", "documents[1] must be a string"),
        ({"documents": [1, 2]}, "invalid_type", "documents[0] must be a string"),
        ({"documents": [[1, 2]]}, "invalid_type", "documents[0] must be a string"),
        ({"documents": ["a"] * 2049}, "too_many_inputs", "documents has 2049 items"),
        ({"documents": [{"image": "AAAA"}]}, "unsupported_modality", "documents[0] has an image"),
        ({"texts": ["a"]}, None, "documents and texts exclude each other"),
        ({"top_n": 1, "top_k": 1}, "invalid_value", "top_n and top_k mean the same"),
        ({"model_id": "dense"}, "invalid_value", "model and model_id mean the same"),
        ({"query": ""}, "empty_input", "query is an empty string"),
        ({"query": ["a"]}, "invalid_type", "query must be a string"),
        ({"query": None}, "missing_required_parameter", "query is missing"),
        ({"top_n": 0}, "invalid_value", "top_n"),
        ({"top_n": True}, "invalid_value", "top_n"),
        ({"model": "sparse"}, "wrong_model_type", "'sparse' gives sparse vectors: ask /v1/embed_sparse"),
    ],
)
def test_a_bad_request_is_refused_with_what_is_wrong(
    server: ThreadedServer, fields: dict[str, Any], code: str | None, message: str
) -> None:
    refused = error(post(server, **fields))
    assert refused["code"] == code and message in refused["message"]
    assert server.client.get("/health").status_code == 200


def page(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((COLQWEN / f"{name}.png").read_bytes()).decode()


def test_pages_are_scored_by_late_interaction(server: ThreadedServer) -> None:
    """colpali-engine's vectors, and its score: `einsum("bnd,csd->bcns").max(dim=3).sum(dim=2)`."""
    expected = load_file(COLQWEN / "expected.safetensors")
    query = json.loads((COLQWEN / "queries.json").read_text())[0]
    names = ["image_0", "image_1"]
    found = scores_of(
        results(server, model="pages", query=query, documents=[page(names[0]), {"image": page(names[1])}])
    )
    for place, name in enumerate(names):
        products = torch.einsum("nd,sd->ns", expected["query_0"], expected[name])
        assert abs(float(products.max(dim=1).values.sum()) - found[place]) < 1e-3


def test_texts_are_scored_by_late_interaction_too(server: ThreadedServer) -> None:
    [first, *_] = results(server, model="pages", documents=["a fox", "the sea"])
    assert first["relevance_score"] > 1  # a sum over the query's vectors


def test_a_dense_model_scores_by_cosine(server: ThreadedServer, folder: Path) -> None:
    library = SentenceTransformer(str(folder / "dense" / "model"), device="cpu", local_files_only=True)
    query = library.encode(["query: " + QUERY], normalize_embeddings=True)
    expected = library.encode(DOCUMENTS, normalize_embeddings=True) @ query[0]
    np.testing.assert_allclose(scores_of(results(server, model="d")), expected, atol=TOLERANCE)


def test_a_query_that_is_too_long_is_named(server: ThreadedServer) -> None:
    assert error(post(server, model="dense", query="the river " * 200))["message"].startswith("query has ")
    assert error(post(server, model="dense", documents=["a", "the river " * 200]))["message"].startswith("documents[1]")


def test_a_broken_image_is_named(server: ThreadedServer) -> None:
    refused = error(post(server, model="pages", documents=["text", {"image": "AAAA"}]))
    assert refused["code"] == "invalid_image" and refused["message"].startswith("documents[1] is no image")
    refused = error(post(server, model="pages", query={"image": "AAAA"}))
    assert refused["code"] == "invalid_image" and refused["message"].startswith("query")
