"""Pages and texts of a multi-vector model in Qdrant: found by colpali-engine's own scores."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from qdrant_client import QdrantClient
from safetensors.numpy import load_file

from tests.conftest import DATA
from tests.server import Server

COLQWEN = DATA / "colqwen2_5"
EXPECTED = load_file(COLQWEN / "expected.safetensors")
TEXTS: list[str] = json.loads((COLQWEN / "queries.json").read_text())
PLACE = "/v1/collections/pages"


def data_uri(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((COLQWEN / f"{name}.png").read_bytes()).decode()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(COLQWEN))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def server(kept: Path, site: str) -> Iterator[Server]:
    flags = ("--model", str(COLQWEN / "checkpoint"), "--served-model-name", "colqwen", "--dtype", "float32")
    store = ("--collections", "qdrant", "--collections-path", str(kept), "--allow-private-image-urls")
    with Server(*flags, *store) as server:
        made = server.client.post("/v1/collections", json={"name": "pages", "embedding_model": "colqwen"})
        assert made.json()["metadata"] == {
            "provider": "local",
            "embedding_model": "colqwen",
            "embedding_dimension": 128,
        }
        documents = [
            {"id": "image_0", "image": data_uri("image_0"), "metadata": {"page": 1}},
            {"id": "image_1", "image": f"{site}/image_1.png", "metadata": {"page": 2}},
            {"id": "page_resized", "image": data_uri("page_resized"), "metadata": {"page": 3}},
            *({"id": f"document_{n}", "text": text} for n, text in enumerate(TEXTS)),
        ]
        reply = put(server, *documents)
        assert reply.status_code == 200 and reply.json()["count"] == 6, reply.text
        yield server


def put(server: Server, *documents: object) -> httpx.Response:
    return server.client.post(f"{PLACE}/documents", json={"documents": documents})


def ask(server: Server, query: object, **fields: Any) -> list[dict[str, Any]]:
    reply = server.client.post(f"{PLACE}/query", json={"query": query, **fields})
    assert reply.status_code == 200, reply.text
    return list(reply.json()["results"])


def max_sim(query: NDArray[np.float32], document: NDArray[np.float32]) -> float:
    return float((query @ document.T).max(axis=1).sum())


NAMES = ("image_0", "image_1", "page_resized", "document_0", "document_1", "document_2")


@pytest.mark.parametrize("place", range(3))
def test_a_question_finds_pages_by_the_scores_of_colpali_engine(server: Server, place: int) -> None:
    wanted = {name: max_sim(EXPECTED[f"query_{place}"], EXPECTED[name]) for name in NAMES}
    results = ask(server, TEXTS[place], include=["metadata"])
    assert [each["id"] for each in results] == sorted(NAMES, key=lambda name: -wanted[name])
    assert {each["id"]: each["score"] for each in results} == pytest.approx(wanted, rel=2e-4)
    assert all(each["distance"] is None for each in results)
    [best] = ask(server, TEXTS[place], where={"page": {"$gte": 2}}, n_results=1)
    assert best["id"] == max(("image_1", "page_resized"), key=lambda name: wanted[name])


def test_a_page_is_found_by_its_picture(server: Server) -> None:
    [best] = ask(server, {"image": data_uri("image_1")}, n_results=1)
    assert best["id"] == "image_1" and best["score"] == pytest.approx(len(EXPECTED["image_1"]), rel=1e-4)


def test_pages_come_back_as_they_were_sent(server: Server, site: str) -> None:
    reply = server.client.get(f"{PLACE}/documents", params={"ids": ["image_1", "image_0", "document_2"]})
    assert reply.json()["documents"] == [
        {"id": "image_1", "text": None, "image": f"{site}/image_1.png", "metadata": {"page": 2}},
        {"id": "image_0", "text": None, "image": data_uri("image_0"), "metadata": {"page": 1}},
        {"id": "document_2", "text": TEXTS[2], "image": None, "metadata": {}},
    ]


def test_a_text_that_is_an_address_is_a_text_in_a_document(server: Server, site: str) -> None:
    assert put(server, {"id": "address", "text": f"{site}/image_0.png"}).is_success
    reply = server.client.post("/v1/embeddings", json={"model": "colqwen", "input": [{"text": f"{site}/image_0.png"}]})
    vectors = len(reply.json()["data"][0]["embedding"])
    [found] = ask(server, {"text": f"{site}/image_0.png"}, n_results=1)
    assert found["id"] == "address" and vectors < len(EXPECTED["image_0"])
    assert server.client.delete(f"{PLACE}/documents", params={"ids": "address"}).json() == {"deleted": 1}


def test_a_page_with_a_text_is_kept_with_the_vectors_that_the_two_have_together(server: Server) -> None:
    both = {"image": data_uri("image_0"), "text": "What is on this page?"}
    assert put(server, {"id": "both", **both}).is_success
    [row] = server.client.post("/v1/embeddings", json={"model": "colqwen", "input": [both]}).json()["data"]
    scores = {each["id"]: each["score"] for each in ask(server, TEXTS[0])}
    wanted = max_sim(EXPECTED["query_0"], np.array(row["embedding"], np.float32))
    assert scores["both"] == pytest.approx(wanted, rel=2e-4) and scores["both"] != pytest.approx(scores["image_0"])
    reply = server.client.get(f"{PLACE}/documents", params={"ids": "both"})
    assert reply.json()["documents"] == [{"id": "both", **both, "metadata": {}}]
    assert server.client.delete(f"{PLACE}/documents", params={"ids": "both"}).json() == {"deleted": 1}


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("data:image/png;base64,AAAA", "documents[1]"),
        ("/none.png", "documents[1]"),
        ("file:///etc/passwd", "documents[1]"),
    ],
)
def test_a_page_that_cannot_be_read_is_named_and_nothing_is_stored(
    server: Server, site: str, image: str, told: str
) -> None:
    reply = put(server, {"id": "good", "text": "a text"}, {"image": site + image if image[0] == "/" else image})
    assert reply.status_code == 400 and told in reply.json()["error"]["message"], reply.text
    assert server.client.get(f"{PLACE}/documents", params={"ids": "good"}).json()["documents"] == []


def test_means_of_rows_and_columns_are_kept_beside_all_vectors(server: Server, kept: Path) -> None:
    """What the first of the two stages looks at. Looked at by Qdrant's own client: the server is no more."""
    reply = server.client.post(
        "/v1/embeddings",
        json={"model": "colqwen", "input": [{"image": data_uri("image_0")}], "include": ["patches"]},
    )
    grid = reply.json()["data"][0]["patches"]
    assert server.stop() == 0
    client = QdrantClient(path=str(kept / "qdrant" / "index"))
    [collection] = client.get_collections().collections
    points, _ = client.scroll(collection.name, with_vectors=True)
    vectors: dict[str, Any] = {(point.payload or {})["id"]: point.vector for point in points}
    client.close()
    assert vectors.keys() == set(NAMES)
    page, text = vectors["image_0"], vectors["document_1"]
    cosines = (np.array(page["original"]) * EXPECTED["image_0"]).sum(axis=1)
    assert cosines.min() > 0.9999
    around = len(EXPECTED["image_0"]) - grid["rows"] * grid["columns"]
    counts = [len(page[name]) for name in ("rows", "columns")]
    assert counts == [around + grid["rows"], around + grid["columns"]]
    assert np.array(text["rows"]).shape == EXPECTED["document_1"].shape
