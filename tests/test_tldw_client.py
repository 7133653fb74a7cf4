"""Clients of the tldw server, and OpenAI's, at /api/v1/embeddings of a server with a real model and one key."""

import base64
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.server import MINILM, Server

KEY = "sk-tldw-0123456789"
MODEL = "text-embedding-3-small"
# The ids of cl100k_base that the tldw server's documentation has, without the network that the real one comes from.
TOKENS = {
    15339: "hello", 11: ",", 1917: " world", 0: "!", 1115: " This", 374: " is", 264: " a", 1296: " test", 315: " of",
    279: " the", 40188: " embeddings", 5446: " API",
}  # fmt: skip
ENCODING = f"""
def few_of_cl100k():
    ranks = {{text.encode(): token for token, text in {TOKENS!r}.items()}}
    return {{"name": "few_of_cl100k", "pat_str": r"[\\s\\S]", "mergeable_ranks": ranks, "special_tokens": {{}}}}

ENCODING_CONSTRUCTORS = {{"few_of_cl100k": few_of_cl100k}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "tiktoken_ext").mkdir()
    (plugins / "tiktoken_ext" / "few_of_cl100k.py").write_text(ENCODING)
    environment = {
        "PYTHONPATH": f"{plugins}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "EMBEDDINGS_DIMENSION_POLICY": "pad",
        "MLX_EMBEDDINGS_API_KEY": KEY,
    }
    flags = "--model", MINILM, "--dtype", "float32", "--served-model-name", MODEL, "--token-encoding", "few_of_cl100k"
    with Server(*flags, environment=environment) as server:
        server.client.headers["X-API-KEY"] = KEY
        yield server


def create(server: Server, input: Any, **fields: Any) -> httpx.Response:
    return server.client.post("/api/v1/embeddings", json={"model": MODEL, "input": input, **fields})


def vectors(reply: httpx.Response) -> list[list[float]]:
    assert reply.status_code == 200, reply.text
    return [each["embedding"] for each in reply.json()["data"]]


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("header", ["X-API-KEY", "Authorization"])
def test_a_script_with_the_documented_client_class_works(server: Server, header: str) -> None:
    script = str(Path(__file__).parent / "clients" / "tldw.py")
    environment = {**os.environ, "NO_PROXY": "*"}
    command = [sys.executable, script, server.url, KEY, header]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = vectors(create(server, ["hello, world!", " This is a test", " of the embeddings API", "text1"]))
    assert_close(found["text"], expected[:1])
    assert_close(found["ids"], expected[:1])
    cut = np.array(expected[:3])[:, :12]
    assert_close(found["lists of ids"], cut / np.linalg.norm(cut, axis=1, keepdims=True))
    assert np.shape(found["texts"]) == (3, 512)
    assert_close(found["texts"][0][:384], expected[3])
    assert not np.any(np.array(found["texts"])[:, 384:])


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ('{"input": "Hello, world!", "model": "text-embedding-3-small"}', (1, 384)),
        ('{"input": [15339, 11, 1917, 0], "model": "text-embedding-3-small"}', (1, 384)),
        (
            '{"input": [[15339,11,1917,0],[1115,374,264,1296],[315,279,40188,5446]], "model": "text-embedding-3-small",'
            ' "dimensions": 512}',
            (3, 512),
        ),
    ],
)
@pytest.mark.parametrize("header", [f"X-API-KEY: {KEY}", f"Authorization: Bearer {KEY}"])
def test_the_documented_curl_commands_work(server: Server, header: str, body: str, shape: tuple[int, int]) -> None:
    command = f"curl -sS -X POST {server.url}/api/v1/embeddings -H 'Content-Type: application/json'"
    done = subprocess.run(
        [*shlex.split(command), "--noproxy", "*", "-H", header, "-d", body], capture_output=True, text=True, timeout=50
    )

    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert np.shape([each["embedding"] for each in reply["data"]]) == shape
    assert reply["object"] == "list" and reply["model"] == MODEL
    assert [(each["object"], each["index"]) for each in reply["data"]] == [
        ("embedding", index) for index in range(shape[0])
    ]
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("dimensions", [None, 12, 400])
def test_base64_has_the_same_vectors(server: Server, dimensions: int | None) -> None:
    plain = vectors(create(server, ["a", "b"], encoding_format="float", user="somebody", dimensions=dimensions))
    coded = vectors(create(server, ["a", "b"], encoding_format="base64", dimensions=dimensions))

    assert_close([np.frombuffer(base64.b64decode(str(each)), dtype="<f4") for each in coded], plain)
    assert np.shape(plain) == (2, dimensions or 384)


@pytest.mark.parametrize(("policy", "length"), [(None, 400), ("", 400), ("pad", 400), ("ignore", 384)])
def test_the_policy_of_dimensions_is_told_and_may_be_chosen(server: Server, policy: str | None, length: int) -> None:
    headers = {} if policy is None else {"X-Embeddings-Dimensions-Policy": policy}
    body = {"model": MODEL, "input": "a", "dimensions": 400}
    reply = server.client.post("/api/v1/embeddings", json=body, headers=headers)

    assert np.shape(vectors(reply)) == (1, length)
    assert reply.headers["x-embeddings-dimensions-policy"] == (policy or "pad")
    assert reply.headers["x-embeddings-provider"] == "local"
    assert "x-embeddings-fallback-from" not in reply.headers


def test_the_one_keys_holder_is_an_admin(server: Server) -> None:
    def said(method: str, path: str, body: object = None) -> Any:
        reply = server.client.request(method, f"/api/v1/embeddings{path}", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    warmed = said("POST", "/models/warmup", {"model": MODEL})
    assert (warmed["warmed"], warmed["dimension"]) == (True, 384)
    assert said("POST", "/models/download", {"model": MODEL})["downloaded"] is True
    described = {"model": MODEL, "provider": "local", "dimension": 384, "max_tokens": 256, "allowed": True}
    assert said("GET", f"/models/{MODEL}").items() >= described.items()
    assert said("DELETE", "/cache")["entries_removed"] == 0
    assert said("GET", "/circuit-breakers") == {}
    assert said("GET", "/metrics")["active_requests"] == 0


@pytest.mark.parametrize("route", ["", "/batch"])
def test_inputs_that_are_too_long_are_told_by_index_and_tokens(server: Server, route: str) -> None:
    texts = ["short", "word " * 600, "fine", "word " * 300]
    body = {"model": MODEL, "texts" if route else "input": texts}
    reply = server.client.post(f"/api/v1/embeddings{route}", json=body)

    assert reply.status_code == 400
    said = reply.json()
    assert set(said) == {"error", "message", "details"} and said["error"] == "input_too_long"
    assert "[1] has 602 tokens, the model takes 256" in said["message"]
    assert said["details"] == [
        {"index": 1, "tokens": 602, "max_tokens": 256},
        {"index": 3, "tokens": 302, "max_tokens": 256},
    ]


def test_openais_client_shows_messages_and_codes(server: Server) -> None:
    transport = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/api/v1", api_key=KEY, max_retries=0, http_client=transport) as client:
        assert len(client.embeddings.create(model=MODEL, input="a").data[0].embedding) == 384
        with pytest.raises(openai.BadRequestError, match="has 602 tokens, the model takes 256") as too_long:
            client.embeddings.create(model=MODEL, input="word " * 600)
        with pytest.raises(openai.NotFoundError, match="the model 'none' is not served here") as unknown:
            client.embeddings.create(model="none", input="a")

    assert (too_long.value.code, unknown.value.code) == ("input_too_long", "model_not_found")
    assert (unknown.value.param, unknown.value.type) == ("model", "not_found_error")


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"input": "a", "model": "none"}, 404, "the model 'none' is not served here"),
        ({"input": "", "model": MODEL}, 400, "is an empty string"),
        ({"input": "a"}, 400, "model is missing"),
        ({"input": "a", "model": MODEL, "dimensions": 0}, 400, "dimensions"),
        ({"input": [[15339, 99999]], "model": MODEL}, 400, "has an id that few_of_cl100k does not know"),
        ({"input": ["a"] * 2049, "model": MODEL}, 400, "has 2049 items, the limit is 2048"),
    ],
)
def test_other_errors_have_a_detail(server: Server, body: dict[str, Any], status: int, detail: str) -> None:
    reply = server.client.post("/api/v1/embeddings", json=body)

    assert reply.status_code == status
    assert detail in reply.json()["detail"]
    assert "error" not in reply.json()


def test_the_rest_of_the_unified_api_keeps_its_errors(server: Server) -> None:
    for path in ("/api/v1/embed_sparse", "/api/v1/rerank", "/api/v1/embeddingsx"):
        said = server.client.post(path, json={"model": "none"}).json()
        assert said["error"]["message"] and "detail" not in said
