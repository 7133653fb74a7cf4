"""What the API refuses, and how it says so: every row of the contract's errors, against a real server."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from tests.server import MINILM, Server

KEY = "sesame"
LIMIT = 100_000
LONG, LONGER = "word " * 300, "word " * 400  # 302 and 402 tokens, with the two special ones
JSON = {"Content-Type": "application/json"}
HUGE = "9" * 10_000

# Where a message must not look: of a path only /v1 and the like may be shown, and the hub's id of the model.
LEAKS = re.compile(r"Traceback|\.py\b|site-packages|/(work|home|root|usr|tmp|opt|var|private|Users)/|File \"")


@pytest.fixture(scope="module", autouse=True)
def _nothing_breaks(server: Server) -> Iterator[None]:
    """Whatever was sent: afterwards the server answers, is well, and has logged no unexpected error."""
    logged = len(server.log)
    yield
    assert server.embed("a").status_code == 200
    assert server.client.get("/health").json()["status"] == "ok"
    assert "Traceback" not in server.log[logged:]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A key, small bodies, `dimensions` ignored, and an encoding whose vocabulary cannot be had."""
    flags = "--api-key", KEY, "--max-request-bytes", str(LIMIT), "--dimensions-policy", "ignore"
    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens there
    environment = {
        "TIKTOKEN_CACHE_DIR": str(tmp_path_factory.mktemp("tiktoken")),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), nowhere),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
    }
    with Server("--model", MINILM, *flags, "--token-encoding", "cl100k_base", environment=environment) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


def error_of(reply: httpx.Response, status: int, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The error in OpenAI's shape, with nothing in it that is not the caller's business."""
    assert reply.status_code == status, reply.text
    assert reply.headers["Content-Type"] == "application/json" and reply.headers["X-Request-Id"]
    assert not LEAKS.search(reply.text), reply.text
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert ("details" in error) == (error["code"] == "input_too_long")
    assert error["type"] == kind
    return error


INPUTS: list[tuple[Any, str, str]] = [  # input, code, in the message
    (None, "invalid_type", "null"),
    (5, "invalid_type", "an integer"),
    (1.5, "invalid_type", "a number"),
    (True, "invalid_type", "a boolean"),
    ("", "empty_input", "input is an empty string"),
    ([""], "empty_input", "input[0] is an empty string"),
    (["a", "b", ""], "empty_input", "input[2] is an empty string"),
    ([], "empty_input", "input is an empty list"),
    ([[]], "empty_input", "input[0] is an empty list of token ids"),
    (["a", []], "empty_input", "input[1] is an empty list of token ids"),
    (["a"] * 2049, "too_many_inputs", "2049 items, the limit is 2048"),
    ([[101, 102]] * 2049, "too_many_inputs", "2049 items, the limit is 2048"),
    ([None], "invalid_type", "input[0] must be a string, a list of token ids or an item, not null"),
    (["a", True], "invalid_type", "input[1]"),
    (["a", 1], "invalid_type", "input[1]"),
    ([["a"]], "invalid_type", "input[0][0] must be a token id (an integer), not a string"),
    ([[[1]]], "invalid_type", "input[0][0] must be a token id (an integer), not a list"),
    ([101, True], "invalid_type", "input[1] must be a token id (an integer), not a boolean"),
    ([True, 101], "invalid_type", "input[0]"),
    ([101, "a"], "invalid_type", "input[1]"),
    ([101, [102]], "invalid_type", "input[1]"),
    ([101.5], "invalid_type", "not a number"),
    ([["a"], [101, 2.0]], "invalid_type", "input[0][0]"),
    ([[101], [101, 2.0]], "invalid_type", "input[1][1] must be a token id (an integer), not a number"),
    ([-1], "invalid_token_id", "token id -1"),
    ([30522], "invalid_token_id", "input[0] has the token id 30522"),
    ([[101], [101], [101, 100_000]], "invalid_token_id", "input[2] has the token id 100000"),
    ([[101, 100_257]], "invalid_token_id", "--token-encoding"),
    ([2**63], "invalid_token_id", str(2**63)),
    ([10**30], "invalid_token_id", str(10**30)),
    ({}, "invalid_type", '{"text": ...}'),
    ({"text": ""}, "empty_input", "input.text is an empty string"),
    ({"text": 5}, "invalid_type", "input.text must be a string, not an integer"),
    ({"text": None}, "invalid_type", "input.text must be a string, not null"),
    (["a", {"text": ["a"]}], "invalid_type", "input[1].text must be a string, not a list"),
    ({"text": "a", "weight": 1}, "invalid_type", "weight"),
    ([{"txet": "a"}], "invalid_type", "txet"),
    ([{}], "invalid_type", "it is an empty object"),
    ({"image": "https://example.com/cat.png"}, "unsupported_modality", "this model takes text only"),
    (["a", {"text": "a", "image": "x"}], "unsupported_modality", "input[1] has an image"),
    ([{"title": "a", "year": 2017}], "invalid_type", 'input[0] must be {"title": ..., "abstract": ...}'),
]


@pytest.mark.parametrize(("value", "code", "message"), INPUTS)
def test_an_input_that_is_none(server: Server, value: Any, code: str, message: str) -> None:
    error = error_of(server.embed(value), 400)
    assert (error["param"], error["code"]) == ("input", code)
    assert message in error["message"]


FIELDS: list[tuple[dict[str, Any], str, str | None, str]] = [  # fields, param, code, in the message
    ({"model": None}, "model", "missing_required_parameter", "model is missing"),
    ({"model": 5}, "model", "invalid_value", "string"),
    ({"model": [MINILM]}, "model", "invalid_value", "string"),
    ({"encoding_format": "hex"}, "encoding_format", "invalid_value", "'float' or 'base64'"),
    ({"encoding_format": 5}, "encoding_format", "invalid_value", "'float' or 'base64'"),
    ({"dimensions": 0}, "dimensions", "invalid_value", "greater than or equal to 1"),
    ({"dimensions": -5}, "dimensions", "invalid_value", "greater than or equal to 1"),
    ({"dimensions": 385}, "dimensions", "invalid_value", "dimensions is 385, the most is 384"),
    ({"dimensions": 2**70}, "dimensions", "invalid_value", "384"),
    ({"dimensions": "5"}, "dimensions", "invalid_value", "integer"),
    ({"dimensions": True}, "dimensions", "invalid_value", "integer"),
    ({"dimensions": 5.5}, "dimensions", "invalid_value", "integer"),
    ({"dimensions": [5]}, "dimensions", "invalid_value", "integer"),
    ({"input_type": "passage"}, "input_type", "invalid_value", "'query' or 'document'"),
    ({"input_type": 5}, "input_type", "invalid_value", "'query' or 'document'"),
    ({"prompt": 5}, "prompt", "invalid_value", "string"),
    ({"prompt": ["a"]}, "prompt", "invalid_value", "string"),
    ({"prompt_name": 5}, "prompt_name", "invalid_value", "string"),
    ({"prompt_name": "nope"}, "prompt_name", "invalid_value", "'nope' is not among the model's prompts"),
    ({"prompt": "a", "input_type": "query"}, "prompt", "invalid_value", "input_type and prompt exclude each other"),
    (
        {"prompt": "a", "prompt_name": "query"},
        "prompt_name",
        "invalid_value",
        "prompt and prompt_name exclude each other",
    ),
    ({"prompt_name": "query", "input_type": "query"}, "prompt_name", "invalid_value", "exclude each other"),
    ({"prompt": "a", "input": [101, 102]}, "input", "invalid_value", "a prompt cannot be put before token ids"),
    ({"prompt": "a", "input": ["a", [101, 102]]}, "input", "invalid_value", "a prompt cannot be put before token ids"),
    ({"prompt": LONG, "truncate": "end"}, "input", "input_too_long", "prompt"),
    ({"truncate": "middle"}, "truncate", "invalid_value", "'none', 'end' or 'start'"),
    ({"truncate": "true"}, "truncate", "invalid_value", "'none', 'end' or 'start'"),
    ({"truncate": 1}, "truncate", "invalid_value", "'none', 'end' or 'start'"),
    ({"normalize": "yes"}, "normalize", "invalid_value", "boolean"),
    ({"normalize": 1}, "normalize", "invalid_value", "boolean"),
    ({"output_dtype": "int4"}, "output_dtype", "invalid_value", "'int8'"),
    ({"output_dtype": 8}, "output_dtype", "invalid_value", "'int8'"),
    ({"token_pool_factor": 2}, "token_pool_factor", "invalid_value", "multi-vector models"),
    ({"pool": "rows"}, "pool", "invalid_value", "multi-vector models"),
]


@pytest.mark.parametrize(("fields", "param", "code", "message"), FIELDS)
def test_a_field_of_a_wrong_value(
    server: Server, fields: dict[str, Any], param: str, code: str | None, message: str
) -> None:
    reply = server.client.post("/v1/embeddings", json={"model": MINILM, "input": "a"} | fields)
    error = error_of(reply, 400)
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]


def test_every_input_that_is_too_long_is_named_by_its_own_index(server: Server) -> None:
    inputs = ["a", "a", LONGER, "b", LONG, LONGER, [101] * 257]
    error = error_of(server.embed(inputs), 400)
    assert (error["param"], error["code"]) == ("input", "input_too_long")
    assert error["message"].startswith("input[2] has 402 tokens, the model takes 256")
    assert '"truncate": "end"' in error["message"]
    lengths = [(each["index"], each["tokens"]) for each in error["details"]]
    assert lengths == [(2, 402), (4, 302), (5, 402), (6, 257)]
    assert all(each.keys() == {"index", "tokens", "max_tokens"} for each in error["details"])
    assert {each["max_tokens"] for each in error["details"]} == {256}


def test_a_text_of_the_greatest_length_is_none_too_long(server: Server) -> None:
    assert server.embed("word " * 254).json()["usage"]["prompt_tokens"] == 256
    assert error_of(server.embed("word " * 255), 400)["details"] == [{"index": 0, "tokens": 257, "max_tokens": 256}]


def body(rest: str) -> bytes:
    return f'{{"model": "{MINILM}", {rest}}}'.encode()


BODIES: list[tuple[bytes, str | None, str, str]] = [  # body, param, code, in the message
    (b"", None, "invalid_json", "not valid JSON"),
    (b"{", None, "invalid_json", "not valid JSON"),
    (b"not json", None, "invalid_json", "not valid JSON"),
    (body('"input": "a"') + b" more", None, "invalid_json", "trailing characters"),
    (body('"input": "a",'), None, "invalid_json", "not valid JSON"),
    (b"\xff\xfe{\x00}\x00", None, "invalid_json", "not valid JSON"),
    (b"\xef\xbb\xbf" + body('"input": "a"'), None, "invalid_json", "not valid JSON"),
    (body('"input": "x"').replace(b"x", b"\xff"), None, "invalid_json", "unicode"),
    (body('"input": "x"').replace(b"x", b"\xed\xa0\x80"), None, "invalid_json", "unicode"),
    (body(r'"input": "\ud800"'), None, "invalid_json", "not valid JSON"),
    (body(r'"input": ["a", "\udc00 b"]'), None, "invalid_json", "not valid JSON"),
    (body(r'"input": "a", "user": "\ud800"'), None, "invalid_json", "not valid JSON"),
    (b"[]", None, "invalid_json", "must be a JSON object"),
    (b'"a"', None, "invalid_json", "must be a JSON object"),
    (b"null", None, "invalid_json", "must be a JSON object"),
    (b"{}", "input", "missing_required_parameter", "input is missing"),
    (b'{"input": "a"}', "model", "missing_required_parameter", "model is missing"),
    (body('"user": "a"'), "input", "missing_required_parameter", "input is missing"),
    (body(f'"input": {"[" * 100_000}'), None, "invalid_json", "recursion limit"),
    (body(f'"input": {"[" * 100_000}{"]" * 100_000}'), None, "invalid_json", "recursion limit"),
    (body(f'"input": "a", "extra": {"[" * 100_000}{"]" * 100_000}'), None, "invalid_json", "recursion limit"),
    (body('"input": "a", "extra": ' + '{"a":' * 1000 + "1" + "}" * 1000), None, "invalid_json", "recursion limit"),
    (body(f'"input": {"[" * 90}{"]" * 90}'), "input", "invalid_type", "input[0][0]"),
    (body(f'"input": {HUGE}'), None, "invalid_json", "number out of range"),
    (body(f'"input": [{HUGE}]'), None, "invalid_json", "number out of range"),
    (body(f'"input": "a", "dimensions": {HUGE}'), None, "invalid_json", "number out of range"),
    (body('"input": "a", "dimensions": 1e2'), "dimensions", "invalid_value", "integer"),
    (body('"input": "a", "dimensions": 1e999'), "dimensions", "invalid_value", "integer"),
    (body('"input": "a", "dimensions": NaN'), "dimensions", "invalid_value", "integer"),
    (body('"input": [1e999]'), "input", "invalid_type", "not a number"),
]


@pytest.mark.parametrize(("content", "param", "code", "message"), BODIES, ids=[f"{each[0][:60]!r}" for each in BODIES])
def test_a_body_that_is_no_request(server: Server, content: bytes, param: str | None, code: str, message: str) -> None:
    error = error_of(server.client.post("/v1/embeddings", content=content, headers=JSON), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonl"]
)
def test_a_body_that_is_no_json_by_its_header(server: Server, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    error = error_of(server.client.post("/v1/embeddings", content=body('"input": "a"'), headers=headers), 415)
    assert (error["param"], error["code"]) == (None, "unsupported_media_type")
    assert content_type in error["message"] and "application/json" in error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", None])
def test_json_by_its_header(server: Server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert server.client.post("/v1/embeddings", content=body('"input": "a"'), headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["nope", "", "../../etc/passwd", "all\0", "😀", MINILM.upper()])
def test_an_unknown_model(server: Server, name: str) -> None:
    error = error_of(server.embed("a", model=name), 404, "not_found_error")
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["message"].endswith(f"served: {MINILM}")


def test_unknown_paths_and_methods(server: Server) -> None:
    error = error_of(server.client.get("/v1/models/nope"), 404, "not_found_error")
    assert error["code"] == "model_not_found" and MINILM in error["message"]
    for path in ("/nope", "/v1/nope", "/v1"):
        assert error_of(server.client.get(path), 404, "not_found_error")["code"] == "unknown_url"
    for method, path in (("GET", "/v1/embeddings"), ("PUT", "/v1/embeddings"), ("DELETE", "/v1/models")):
        reply = server.client.request(method, path)
        assert error_of(reply, 405)["code"] == "method_not_allowed"
        assert reply.headers["Allow"] in ("GET", "POST")


# Odd, and yet a text.


def vector(reply: httpx.Response) -> NDArray[np.float32]:
    assert reply.status_code == 200, reply.text
    return np.array(reply.json()["data"][0]["embedding"], dtype=np.float32)


@pytest.mark.parametrize("text", [" ", "\n\t ", "\u200b", "\0"])
def test_a_text_of_nothing_to_see_has_the_vector_of_the_empty_text(
    server: Server, text: str, reference_texts: list[str], reference_vectors: NDArray[np.float32]
) -> None:
    expected = reference_vectors[reference_texts.index("")]
    assert vector(server.embed(text)) @ expected >= 0.9999


@pytest.mark.parametrize(("text", "same"), [("a\0b", "ab"), ("\ufeffa", "a"), ("A\u0301", "a"), ("\ufffda", "a")])
def test_characters_that_the_models_tokenizer_drops(server: Server, text: str, same: str) -> None:
    np.testing.assert_allclose(vector(server.embed(text)), vector(server.embed(same)), atol=1e-5)


def test_of_two_keys_of_one_name_the_last_counts(server: Server) -> None:
    reply = server.client.post("/v1/embeddings", content=body('"input": "a", "input": "b c"'), headers=JSON)
    np.testing.assert_allclose(vector(reply), vector(server.embed("b c")), atol=1e-5)


# Limits, keys and what cannot be had.


def sized(size: int) -> bytes:
    """A request of so many bytes."""
    return body('"input": "a", "user": "$"').replace(b"$", b"x" * (size - len(body('"input": "a", "user": ""'))))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(strict: Server, chunked: bool) -> None:
    def post(size: int) -> httpx.Response:
        content = sized(size)
        assert len(content) == size
        parts = (content[start : start + 60_000] for start in range(0, size, 60_000))
        return strict.client.post("/v1/embeddings", content=parts if chunked else content, headers=JSON)

    assert post(LIMIT).status_code == 200
    for size in (LIMIT + 1, 30 * LIMIT):
        error = error_of(post(size), 413)
        assert (error["param"], error["code"]) == (None, "request_too_large")
        assert str(LIMIT) in error["message"]
    assert post(LIMIT).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY}{KEY}"},
        {"X-API-Key": "wrong"},
        {"X-API-Key": ""},
        {"Authorization": "Bearer ÿ"},
    ],
)
def test_no_key_or_a_wrong_one(strict: Server, headers: dict[str, str]) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for reply in (
        httpx.post(f"{strict.url}/v1/embeddings", content=b"{", headers=encoded, trust_env=False),
        httpx.get(f"{strict.url}/v1/models", headers=encoded, trust_env=False),
    ):
        error = error_of(reply, 401, "authentication_error")
        assert (error["param"], error["code"]) == (None, "invalid_api_key")
        assert KEY not in reply.text and "Authorization: Bearer" in error["message"]


def test_too_many_dimensions_are_no_error_where_they_are_ignored(strict: Server) -> None:
    for dimensions in (1, 385, 2**70):
        reply = strict.embed("a", dimensions=dimensions)
        assert reply.headers["X-Embeddings-Dimensions-Policy"] == "ignore"
        assert vector(reply).shape == (384,)


def test_a_vocabulary_that_cannot_be_had(strict: Server) -> None:
    error = error_of(strict.embed([[9906, 1917]]), 503, "server_error")
    assert (error["param"], error["code"]) == (None, "token_encoding_unavailable")
    assert "cl100k_base" in error["message"] and "TIKTOKEN_CACHE_DIR" in error["message"]
    assert strict.embed("texts need none").status_code == 200


@pytest.mark.parametrize(
    ("kind", "key", "call"),
    [
        (openai.BadRequestError, KEY, {"input": ""}),
        (openai.NotFoundError, KEY, {"input": "a", "model": "nope"}),
        (openai.AuthenticationError, "wrong", {"input": "a"}),
        (openai.InternalServerError, KEY, {"input": [9906]}),
        (openai.APIStatusError, KEY, {"input": "a" * LIMIT}),
    ],
)
def test_the_official_client_raises_what_it_raises_for_openai(
    strict: Server, kind: type[openai.APIStatusError], key: str, call: dict[str, Any]
) -> None:
    transport = openai.DefaultHttpxClient(trust_env=False)
    with (
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key=key, max_retries=0, http_client=transport) as client,
        pytest.raises(kind) as raised,
    ):
        client.embeddings.create(**{"model": MINILM} | call)
    error = raised.value.response.json()["error"]
    assert error["code"] and error["message"] in raised.value.message
    assert (raised.value.type, raised.value.code, raised.value.param) == (error["type"], error["code"], error["param"])
    assert raised.value.request_id == raised.value.response.headers["X-Request-Id"]


def test_the_log_of_the_strict_server_has_no_unexpected_error(strict: Server) -> None:
    assert strict.client.get("/health").json()["status"] == "ok"
    assert "Traceback" not in strict.log and KEY not in strict.log
