"""Models of all kinds behind one server: sparse vectors, several outputs, the unified API, and a mix of it all."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file
from sentence_transformers import SparseEncoder

from tests.all_kinds import BGE_M3, models_file
from tests.checkpoints import WORDS
from tests.server import Server
from tests.threaded import AnyServer, ThreadedServer

TOLERANCE = 1e-4
TEXTS = ["the quick brown fox jumps", "a silent river of stone", "winter moon over the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_file(tmp_path_factory.mktemp("models")).parent


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ThreadedServer]:
    with ThreadedServer(folder / "models.yaml") as server:
        yield server


def post(server: AnyServer, path: str, **body: Any) -> httpx.Response:
    return server.client.post(path, json=body)


def data(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    return list(reply.json()["data"])


def error(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 400, reply.text
    return dict(reply.json()["error"])


# Sparse vectors.


@pytest.mark.parametrize("path", ["/v1/embed_sparse", "/api/v1/embed_sparse"])
def test_sparse_vectors_are_the_librarys(server: ThreadedServer, folder: Path, path: str) -> None:
    library = SparseEncoder(str(folder / "sparse" / "model"), device="cpu", local_files_only=True)
    expected = library.encode(TEXTS, convert_to_tensor=True).to_dense().numpy()
    for asked in (TEXTS, TEXTS[0]):
        found = data(post(server, path, model="sparse", input=asked))
        for row, each in zip(expected, found, strict=False):
            indices, values = each["embedding"]["indices"], each["embedding"]["values"]
            assert indices == sorted(indices) and set(each["embedding"]) == {"indices", "values"}
            dense = np.zeros_like(row)
            dense[indices] = values
            np.testing.assert_allclose(dense, row, atol=TOLERANCE)
    assert len(found) == 1


def test_the_largest_values_and_their_words(server: ThreadedServer, folder: Path) -> None:
    library = SparseEncoder(str(folder / "sparse" / "model"), device="cpu", local_files_only=True)
    [whole] = data(post(server, "/v1/embed_sparse", model="sparse", input=TEXTS[0]))
    [few] = data(post(server, "/v1/embed_sparse", model="sparse", input=TEXTS[0], max_active_dims=5, tokens=True))
    kept = few["embedding"]
    assert len(kept["indices"]) == 5 and kept["indices"] == sorted(kept["indices"])
    assert min(kept["values"]) >= sorted(whole["embedding"]["values"])[-5] - TOLERANCE
    assert kept["tokens"] == library.tokenizer.convert_ids_to_tokens(kept["indices"])


# Several outputs.


def test_one_call_gives_all_outputs_of_bge_m3(server: ThreadedServer) -> None:
    expected = load_file(BGE_M3 / "expected.safetensors")
    texts = json.loads((BGE_M3 / "texts.json").read_text())
    places = [place for place, text in enumerate(texts) if text]  # of which the library takes an empty one too
    outputs = ["dense", "sparse", "multi_vector"]
    found = data(
        post(
            server,
            "/v1/embeddings",
            model="bge-m3",
            input=[texts[place] for place in places],
            outputs=outputs,
            truncate=True,
        )
    )
    for place, each in zip(places, found, strict=True):
        np.testing.assert_allclose(each["embedding"], expected[f"{place}.dense"].ravel(), atol=TOLERANCE)
        np.testing.assert_allclose(each["multi_vector"], expected[f"{place}.multi_vector"], atol=TOLERANCE)
        assert each["sparse_embedding"]["indices"] == expected[f"{place}.indices"].tolist()
        np.testing.assert_allclose(each["sparse_embedding"]["values"], expected[f"{place}.values"], atol=TOLERANCE)


def test_only_what_is_asked_for_is_in_the_reply(server: ThreadedServer) -> None:
    keys = {"object", "index"}
    [plain] = data(post(server, "/v1/embeddings", model="bge-m3", input=TEXTS[0]))
    assert set(plain) == keys | {"embedding"}
    [some] = data(post(server, "/v1/embeddings", model="bge-m3", input=TEXTS[0], outputs=["sparse", "multi_vector"]))
    assert set(some) == keys | {"sparse_embedding", "multi_vector"}
    [alone] = data(post(server, "/v1/embed_sparse", model="bge-m3", input=TEXTS[0]))
    assert alone["embedding"] == some["sparse_embedding"]
    [coded] = data(
        post(
            server, "/v1/embeddings", model="bge-m3", input=TEXTS[0], outputs=["multi_vector"], encoding_format="base64"
        )
    )
    assert coded["multi_vector_shape"] == list(np.shape(some["multi_vector"]))


# What does not fit.


@pytest.mark.parametrize(
    ("path", "model", "route"),
    [
        ("/v1/embeddings", "sparse", "/v1/embed_sparse"),
        ("/v1/embeddings", "reranker", "/v1/rerank"),
        ("/embed", "reranker", "/v1/rerank"),
        ("/v1/embed_sparse", "dense", "/v1/embeddings"),
        ("/v1/embed_sparse", "pages", "/v1/embeddings"),
        ("/v1/embed_sparse", "reranker", "/v1/rerank"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_route_that_fits(
    server: ThreadedServer, path: str, model: str, route: str
) -> None:
    refused = post(server, path, model=model, input=["a"], texts=["a"])
    assert refused.status_code == 400 and f"ask {route}" in refused.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": []}, "outputs"),
        ({"outputs": ["rerank"]}, "outputs"),
        ({"outputs": "dense"}, "outputs"),
        ({"model": "dense", "outputs": ["dense", "multi_vector"]}, "the model gives dense, not multi_vector"),
        ({"outputs": ["dense"], "token_pool_factor": 2}, "token_pool_factor is for multi-vector models"),
    ],
)
def test_outputs_that_make_no_sense(server: ThreadedServer, fields: dict[str, Any], message: str) -> None:
    assert message in error(post(server, "/v1/embeddings", **{"model": "bge-m3", "input": "a", **fields}))["message"]


def test_bytes_are_of_one_output(server: ThreadedServer) -> None:
    body = {"model": "bge-m3", "input": "a", "outputs": ["dense", "sparse"]}
    reply = server.client.post("/v1/embeddings", json=body, headers={"Accept": "application/octet-stream"})
    assert "bytes are of one kind" in error(reply)["message"]


# The unified API.


def test_the_unified_api_takes_its_own_words(server: ThreadedServer) -> None:
    [expected] = data(post(server, "/v1/embeddings", model="dense", input=TEXTS[0], dimensions=8, normalize=True))
    options = {"truncate_dim": 8, "normalize_embeddings": True, "batch_size": 4}
    [one] = data(post(server, "/api/v1/embeddings", model="d", input=TEXTS[0], options=options))
    assert one == expected
    reply = post(server, "/api/v1/embeddings", model_id="d", texts=TEXTS, options=options)
    assert reply.status_code == 200
    assert len(reply.json()["embeddings"]) == 3 and reply.json()["embeddings"][0] == expected["embedding"]
    [sparse] = data(post(server, "/api/v1/embed_sparse", model_id="sparse", texts="a", options={"max_active_dims": 2}))
    assert len(sparse["embedding"]["indices"]) == 2
    prompted = data(post(server, "/api/v1/embeddings", model="d", input="a", options={"prompt_name": "query"}))
    assert prompted == data(post(server, "/v1/embeddings", model="d", input="a", input_type="query"))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("embeddings", {"show_progress_bar": True}, "'options.show_progress_bar' is not known here"),
        ("embeddings", {"max_active_dims": 3}, "max_active_dims"),
        ("embed_sparse", {"truncate_dim": 3}, "truncate_dim"),
        ("rerank", {"prompt": "x"}, "prompt"),
        ("embeddings", {"batch_size": 0}, "batch_size"),
        ("embeddings", [], "options"),
    ],
)
def test_options_that_would_do_nothing_are_refused_by_name(
    server: ThreadedServer, path: str, options: Any, message: str
) -> None:
    body = {"model": "dense", "input": "a", "query": "a", "documents": ["a"], "options": options}
    reply = post(server, f"/api/v1/{path}", **body)
    assert reply.status_code == 400 and message in reply.text


def test_an_option_and_the_field_that_means_the_same_exclude_each_other(server: ThreadedServer) -> None:
    body = {"model": "dense", "input": "a", "prompt": "x", "options": {"prompt": "y"}}
    assert "exclude each other" in post(server, "/api/v1/embeddings", **body).json()["detail"]


def test_every_route_takes_a_role(server: ThreadedServer) -> None:
    prompted = data(post(server, "/v1/embeddings", model="d", input="a", input_type="query"))[0]["embedding"]
    plain = data(post(server, "/v1/embeddings", model="d", input="a", input_type="document"))[0]["embedding"]
    assert not np.allclose(prompted, plain, atol=1e-3)
    for route, body in (("/embed", {"texts": ["a"]}), ("/api/v1/embeddings", {"texts": ["a"]})):
        reply = post(
            server, route, model="d", input_type="query", **body, **({"normalize": False} if route == "/embed" else {})
        )
        np.testing.assert_allclose(reply.json()["embeddings"][0], prompted, atol=1e-6)


def test_the_unified_api_lists_the_models(server: ThreadedServer) -> None:
    listed = server.client.get("/api/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["dense", "sparse", "reranker", "pages", "bge-m3", "broken"]
    assert server.client.get("/api/v1/models/d").json()["id"] == "dense"


def test_openais_client_at_the_unified_apis_address(server: ThreadedServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/api/v1", api_key="-")
    expected = data(post(server, "/v1/embeddings", model="dense", input=TEXTS))
    found = client.embeddings.create(model="d", input=TEXTS)
    np.testing.assert_allclose(
        [each.embedding for each in found.data], [each["embedding"] for each in expected], atol=1e-6
    )


# All of it at once.


def requests_of(seed: int, count: int) -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    made: list[tuple[str, dict[str, Any]]] = []
    for _ in range(count):
        texts = [text() for _ in range(rng.randint(1, 4))]
        kind = rng.choice(["dense", "sparse", "reranker", "pages", "bge-m3", "maxsim"])
        match kind:
            case "sparse":
                made.append(("/v1/embed_sparse", {"model": "sparse", "input": texts}))
            case "reranker":
                made.append(("/v1/rerank", {"model": "reranker", "query": text(), "documents": texts}))
            case "maxsim":
                made.append(("/v1/rerank", {"model": "pages", "query": text(), "documents": texts}))
            case "bge-m3":
                outputs = rng.sample(["dense", "sparse", "multi_vector"], rng.randint(1, 3))
                made.append(("/v1/embeddings", {"model": kind, "input": texts, "outputs": outputs}))
            case _:
                made.append(("/v1/embeddings", {"model": kind, "input": texts}))
    return made


def numbers(content: Any) -> list[float]:
    """All of a reply, in its order."""
    if isinstance(content, dict):
        content = [content[name] for name in sorted(content)]
    if isinstance(content, list):
        return [number for each in content for number in numbers(each)]
    return [float(content)] if isinstance(content, int | float) else []


def test_mixed_requests_while_models_come_and_go_are_answered_as_by_each_model_alone(
    server: ThreadedServer, folder: Path, tmp_path: Path
) -> None:
    asked = requests_of(seed=0, count=100)
    alone = [post(server, path, **body) for path, body in asked]
    assert {reply.status_code for reply in alone} == {200}
    sizes = [each.get("memory_bytes", 0) for each in server.client.get("/v1/models").json()["data"]]
    content = json.loads((folder / "models.yaml").read_text())
    content |= {"max_memory": int(max(sizes) * 1.1), "keep_alive": 1}
    file = tmp_path / "models.yaml"
    file.write_text(json.dumps(content))
    with Server("--config", str(file)) as small, ThreadPoolExecutor(max_workers=8) as threads:

        def ask(request: tuple[str, dict[str, Any]]) -> httpx.Response:
            return post(small, request[0], **request[1])

        broken = threads.submit(ask, ("/v1/embeddings", {"model": "broken", "input": "a"}))
        replies = list(threads.map(ask, asked))
        assert broken.result().status_code == 503 and broken.result().json()["error"]["code"] == "model_load_failed"
        for request, reply, expected in zip(asked, replies, alone, strict=True):
            assert reply.status_code == 200, (request, reply.text)
            np.testing.assert_allclose(
                numbers(reply.json()), numbers(expected.json()), atol=TOLERANCE, err_msg=str(request)
            )
        metrics = small.client.get("/metrics").text
        unloads = [line for line in metrics.splitlines() if line.startswith("mlx_embeddings_model_unloads_total")]
        assert sum(float(line.split()[-1]) for line in unloads) > 5  # or nothing came and went
        assert small.client.get("/health").status_code == 200
