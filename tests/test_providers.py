"""Models of other servers, over HTTP: what goes there, what comes back, and what is made of answers that are none."""

import base64
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scripted import DIMENSIONS, vector
from tests.server import MINILM, Server
from tests.upstream import (
    KEY,
    Handler,
    Upstream,
    always,
    first,
    good,
    hang,
    message,
    providers_server,
    reply_of,
    rows_of,
    upstream,
    vectors,
)


def _changed(**changes: Any) -> Any:
    def page(handler: Handler) -> None:
        body = reply_of(rows_of(handler.inputs))
        body["data"][0] |= changes
        handler.reply(body)

    return page


def _rows(make: Any) -> Any:
    return lambda handler: handler.reply(reply_of(make(rows_of(handler.inputs))))


def _floats(handler: Handler) -> None:
    rows = rows_of(handler.inputs)
    data = [{"index": index, "embedding": row.tolist()} for index, row in enumerate(rows)]
    handler.reply({"data": data[::-1]})


def _huge(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 30))
    handler.end_headers()
    for _ in range(1 << 10):
        handler.wfile.write(b" " * (1 << 20))


def _drop(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def _bomb(handler: Handler) -> None:
    handler.reply(b"\x1f\x8b", Content_Encoding="gzip")


_HTML = b"<html><body>Sign in, secret-of-the-page</body></html>"
_ECHO = {"error": {"message": f"no: Bearer {KEY} and {KEY}", "code": "x"}}
_NAN = np.full(DIMENSIONS, np.nan, dtype=np.float32)

# By name: the page, the status of our reply and what its message must say.
_UNUSABLE: dict[str, tuple[Any, int, str]] = {
    "html": (always(_HTML, Content_Type="text/html"), 502, "no JSON"),
    "empty": (always(b""), 502, "no JSON"),
    "list": (always([1]), 502, "something else than vectors"),
    "error": (always(_ECHO), 502, "an error, as if it were vectors"),
    "few": (_rows(lambda rows: rows[1:]), 502, "1 vectors for 2 inputs"),
    "many": (_rows(lambda rows: [*rows, rows[0]]), 502, "3 vectors for 2 inputs"),
    "duplicate": (_changed(index=1), 502, "indexes"),
    "outside": (_changed(index=7), 502, "indexes"),
    "noindex": (_changed(index="0"), 502, "indexes"),
    "ragged": (_rows(lambda rows: [rows[0][:4], *rows[1:]]), 502, "different sizes"),
    "none": (_rows(lambda rows: [row[:0] for row in rows]), 502, "different sizes, or empty"),
    "nan": (_rows(lambda rows: [_NAN, *rows[1:]]), 502, "NaN or infinity"),
    "nantext": (_changed(embedding=[float("nan")] * DIMENSIONS), 502, "no JSON"),
    "large": (_changed(embedding=[1e39] * DIMENSIONS), 502, "NaN or infinity"),
    "words": (_changed(embedding=["1"] * DIMENSIONS), 502, "something else than vectors"),
    "null": (_changed(embedding=None), 502, "something else than vectors"),
    "nested": (_changed(embedding=[[1.0]] * DIMENSIONS), 502, "something else than vectors"),
    "half": (_changed(embedding=base64.b64encode(b"12345").decode()), 502, "something else than vectors"),
    "notbase64": (_changed(embedding="%%%%"), 502, "something else than vectors"),
    "wrongsize": (
        _rows(lambda rows: [row[:7] for row in rows]),
        502,
        "vectors of 7 dimensions, and the model's have 8",
    ),
    "huge": (_huge, 502, "answered more than 865536 bytes"),
    "bomb": (_bomb, 502, "encoding"),
    "redirect": (always(b"", 302, Location="/good/v1/embeddings"), 502, "leads elsewhere"),
    "unauthorized": (always(_ECHO, 401), 502, "refuses this server's key"),
    "forbidden": (always(_ECHO, 403), 502, "refuses this server's key"),
    "missing": (always(_ECHO, 404), 502, "no such model"),
    "teapot": (always(_ECHO, 418), 502, "answered 418"),
    "broken": (always(_ECHO, 500), 503, "answered 500"),
    "limited": (always(_ECHO, 429), 503, "asked too often"),
    "drop": (_drop, 503, "broke off"),
    "hang": (hang(3), 503, "gave no answer in 1 s"),
}
_PAGES: dict[str, Any] = {name: page for name, (page, _, _) in _UNUSABLE.items()} | {
    "good": good,
    "floats": _floats,
    "shuffled": lambda handler: handler.reply(
        reply_of(rows_of(handler.inputs)) | {"data": reply_of(rows_of(handler.inputs))["data"][::-1]}
    ),
    "unit": _rows(lambda rows: [row / np.linalg.norm(row) for row in rows]),
    "flaky": first(always(_ECHO, 500), _drop, good),
    "wait": first(always(b"", 429, Retry_After="1"), good),
    "waitlong": always(b"", 429, Retry_After="120"),
    "refuse": always(_ECHO, 400),
    "toolong": always({"error": {"message": "This model's maximum context length is 8192 tokens"}}, 400),
    "sized": good,
    "far": good,
}


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream(_PAGES) as found:
        yield found


@pytest.fixture(scope="module")
def here(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("here")
    providers: dict[str, Any] = {
        name: {
            "url": f"{up.url}/{name}/v1",
            "api_key_env": "UP_KEY",
            "retries": 2 if name in ("flaky", "wait", "waitlong", "refuse") else 0,
            "timeout": "1s" if name == "hang" else "20s",
            "failure_threshold": 100,
        }
        for name in _PAGES
    }
    providers["good"] |= {"batch_size": 3, "max_in_flight": 2}
    providers["closed"] = {"url": "http://127.0.0.1:9/v1", "retries": 0}
    models = {
        f"{name}-model": {"provider": name, "name": "m", "dimensions": DIMENSIONS} for name in [*_PAGES, "closed"]
    }
    models["sized-model"] |= {"max_tokens": 77, "aliases": "other-name", "prompts": {"query": "ask: "}}
    models |= {name: {"provider": "good", "name": f"{name}-there"} for name in ("learnt", "changed")}
    with providers_server(folder, providers, models) as server:
        yield server


@pytest.mark.parametrize("name", ["good", "floats", "shuffled"])
def test_vectors_come_in_the_order_of_the_inputs_and_as_they_are(here: Server, name: str) -> None:
    texts = [f"text {number}" for number in range(7)]
    reply = here.embed([*texts, texts[2]], f"{name}-model")
    np.testing.assert_array_equal(vectors(reply), np.stack([vector(text) for text in (*texts, texts[2])]))
    assert reply.headers["x-embeddings-provider"] == name and "x-embeddings-fallback-from" not in reply.headers
    assert reply.json()["model"] == f"{name}-model"


def test_inputs_go_in_batches_of_which_a_bounded_number_is_under_way(here: Server, up: Upstream) -> None:
    def slow(handler: Handler) -> None:
        hang(0.1)(handler)
        good(handler)

    up.pages["good"], up.most_at_once = slow, 0
    up.requests["good"].clear()
    try:
        texts = [f"batched {number}" for number in range(11)]
        reply = here.embed(texts, "good-model")
    finally:
        up.pages["good"] = good
    np.testing.assert_array_equal(vectors(reply), np.stack([vector(text) for text in texts]))
    assert sorted(len(each["input"]) for each in up.requests["good"]) == [2, 3, 3, 3]
    assert up.most_at_once == 2
    assert reply.json()["usage"] == {"prompt_tokens": 33, "total_tokens": 33}


def test_what_is_sent(here: Server, up: Upstream) -> None:
    up.requests["sized"].clear()
    here.embed(["x", "y"], "other-name", input_type="query", dimensions=4, normalize=False, user="me")
    assert up.requests["sized"] == [{"model": "m", "input": ["ask: x", "ask: y"], "encoding_format": "base64"}]
    headers = {name.lower(): value for name, value in up.headers["sized"].items()}
    assert headers["authorization"] == f"Bearer {KEY}" and headers["accept-encoding"] == "identity"


def test_token_ids_go_as_they_are_apart_from_texts(here: Server, up: Upstream) -> None:
    up.requests["sized"].clear()
    reply = here.embed([[5, 6], "x", [7]], "sized-model")
    sent = [each["input"] for each in up.requests["sized"]]  # side by side
    assert sorted(sent, key=str) == [["x"], [[5, 6], [7]]]
    np.testing.assert_array_equal(vectors(reply), np.stack(rows_of([[5, 6], "x", [7]])))


def test_token_ids_that_no_request_can_hold_are_not_sent(here: Server, up: Upstream) -> None:
    up.requests["sized"].clear()
    for wrong in (2**63, 10**30, -1):
        reply = here.embed([[5], [6, wrong]], "sized-model")
        assert message(reply, 400, "invalid_token_id").startswith(f"input[1] has the token id {wrong}, ")
    assert not up.requests["sized"]
    assert here.embed([0, 2**63 - 1], "sized-model").status_code == 200
    assert up.requests["sized"][0]["input"] == [[0, 2**63 - 1]]


@pytest.mark.parametrize("name", sorted(_UNUSABLE))
def test_what_is_no_answer_is_told_and_not_returned(here: Server, name: str) -> None:
    _, status, said = _UNUSABLE[name]
    code = "provider_rejected_key" if name in ("unauthorized", "forbidden") else "provider_failed"
    reply = here.embed(["a", "b"], f"{name}-model")
    assert said in message(reply, status, code) and name in reply.text
    assert KEY not in reply.text and "secret-of-the-page" not in reply.text and "127.0.0.1" not in reply.text


def test_a_server_that_is_not_there(here: Server) -> None:
    assert "cannot be reached" in message(here.embed("a", "closed-model"), 503, "provider_failed")


def test_a_redirect_is_not_followed(here: Server, up: Upstream) -> None:
    before = len(up.requests["good"])
    here.embed("a", "redirect-model")
    assert len(up.requests["good"]) == before


def test_faults_that_pass_are_tried_again(here: Server, up: Upstream) -> None:
    np.testing.assert_array_equal(vectors(here.embed("a", "flaky-model")), [vector("a")])
    assert len(up.requests["flaky"]) == 3


def test_the_pause_that_a_provider_asks_for_is_kept_if_it_is_short(here: Server, up: Upstream) -> None:
    reply = here.embed("a", "wait-model")
    assert reply.status_code == 200 and 1 <= reply.elapsed.total_seconds() < 5
    assert len(up.requests["wait"]) == 2
    reply = here.embed("a", "waitlong-model")
    assert reply.status_code == 503 and reply.headers["retry-after"] == "120"
    assert reply.elapsed.total_seconds() < 1 and len(up.requests["waitlong"]) == 1


def test_an_input_that_is_refused_is_the_callers_fault(here: Server, up: Upstream) -> None:
    reply = here.embed("a", "refuse-model")
    assert "refuses the input: no: Bearer ... and ..." in message(reply, 400, "provider_refused_input")
    assert KEY not in reply.text and len(up.requests["refuse"]) == 1
    assert "8192 tokens" in message(here.embed("a", "toolong-model"), 400, "input_too_long")


def test_dimensions_are_cut_here_and_what_had_length_one_keeps_it(here: Server) -> None:
    cut = vectors(here.embed("a", "good-model", dimensions=5))
    np.testing.assert_array_equal(cut, [vector("a")[:5]])
    unit = vectors(here.embed("a", "unit-model", dimensions=5))
    np.testing.assert_allclose(unit[0], vector("a")[:5] / np.linalg.norm(vector("a")[:5]), rtol=1e-5)
    kept = vectors(here.embed("a", "unit-model", dimensions=5, normalize=False))
    assert np.linalg.norm(kept) < 0.999
    assert "dimensions is 9" in message(here.embed("a", "good-model", dimensions=9), 400, "invalid_value")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"truncate": "end"}, "truncate is for models that run here"),
        ({"truncate": True}, "truncate is for models that run here"),
        ({"adapter": "x"}, "adapter 'x' is not among"),
        ({"pool": "mean"}, "pool is for multi-vector models"),
        ({"token_pool_factor": 2}, "token_pool_factor is for multi-vector models"),
        ({"outputs": ["sparse"]}, "gives no sparse vectors"),
        ({"prompt_name": "nope"}, "not among the model's prompts: none"),
    ],
)
def test_what_needs_the_model_here_is_refused_by_name(here: Server, fields: dict[str, Any], said: str) -> None:
    reply = here.embed("a", "good-model", **fields)
    assert reply.status_code == 400 and said in reply.text


def test_images_are_refused_and_urls_are_texts(here: Server) -> None:
    assert "takes text only" in here.embed([{"image": "aGk="}], "good-model").text
    url = "https://example.com/a.png"
    np.testing.assert_array_equal(vectors(here.embed(url, "good-model")), [vector(url)])


def test_other_routes_take_them_too(here: Server) -> None:
    bare = here.client.post("/embed", json={"model": "good-model", "inputs": ["a"], "normalize": False})
    np.testing.assert_array_equal(np.array(bare.json(), dtype=np.float32), [vector("a")])
    assert bare.headers["x-embeddings-provider"] == "good"
    ranked = here.client.post("/v1/rerank", json={"model": "unit-model", "query": "a", "documents": ["b", "a"]}).json()
    assert [each["index"] for each in ranked["results"]] == [1, 0]
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1)
    sparse = here.client.post("/v1/embed_sparse", json={"model": "good-model", "input": "a", "tokens": True})
    assert (sparse.status_code, sparse.json()["error"]["code"]) == (400, "wrong_model_type")
    texts = here.client.post("/api/v1/embeddings", json={"model": "good-model", "texts": ["a"]}).json()
    np.testing.assert_array_equal(np.array(texts["embeddings"], dtype=np.float32), [vector("a")])


def test_dimensions_are_learnt_where_the_file_says_none(here: Server) -> None:
    before = here.client.get("/v1/models/learnt").json()
    assert "dimensions" not in before and (before["provider"], before["loaded"]) == ("good", True)
    assert vectors(here.embed("a", "learnt")).shape == (1, DIMENSIONS)
    assert here.client.get("/v1/models/learnt").json()["dimensions"] == DIMENSIONS


def test_loading_learns_the_dimensions_anew(here: Server, up: Upstream) -> None:
    up.pages["good"] = _rows(lambda rows: [row[:4] for row in rows])
    try:
        assert vectors(here.embed("a", "changed")).shape == (1, 4)
    finally:
        up.pages["good"] = good
    assert "and the model's have 4" in message(here.embed("a", "changed"), 502, "provider_failed")
    assert here.client.post("/v1/models/changed/load").json()["dimensions"] == DIMENSIONS
    assert vectors(here.embed("a", "changed")).shape == (1, DIMENSIONS)


def test_what_is_known_of_a_model(here: Server) -> None:
    model = here.client.get("/v1/models/sized-model").json()
    assert (model["dimensions"], model["max_tokens"], model["owned_by"]) == (DIMENSIONS, 77, "sized")
    assert here.client.get("/v1/models/good-model").json()["max_tokens"] is None
    health = here.client.get("/health").json()
    assert health["status"] == "ok" and health["circuit_breakers"]["good"]["state"] == "closed"
    assert here.client.post("/v1/models/good-model/load").json()["state"] == "ready"
    assert here.client.post("/v1/models/html-model/load").status_code == 502


def test_no_key_and_no_input_is_in_the_log(here: Server) -> None:
    here.embed("a text of one's own", "unauthorized-model")
    here.wait_for_log("the provider 'unauthorized' refuses this server's key")
    assert KEY not in here.log and "a text of one's own" not in here.log and "Traceback" not in here.log
    assert KEY not in here.client.get("/metrics").text and KEY not in here.client.get("/health").text


def test_what_is_in_the_cache_is_not_asked_for_again(up: Upstream, tmp_path: Path) -> None:
    providers = {name: {"url": f"{up.url}/{name}/v1"} for name in ("sized", "far")}
    models = {name: {"provider": name, "name": "m", "dimensions": DIMENSIONS} for name in providers}
    with providers_server(tmp_path, providers, models, cache=True) as here:
        up.requests.clear()
        replies = [here.embed(["a", "b", "a"][:count], "sized") for count in (2, 3)]
        assert [each["input"] for each in up.requests["sized"]] == [["a", "b"]]
        np.testing.assert_array_equal(vectors(replies[1])[:2], vectors(replies[0]))
        assert replies[1].headers["x-embeddings-provider"] == "sized"
        here.embed("a", "far")  # the same name at another server is another model
        assert [each["input"] for each in up.requests["far"]] == [["a"]]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_no_key_goes_to_a_server_whose_certificate_nobody_vouches_for(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=up", "-days", "2"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)
    models = {"m": {"provider": "tls", "name": "m", "dimensions": DIMENSIONS}}
    with upstream({"tls": good}, ours) as tls:
        providers = {"tls": {"url": f"{tls.url}/tls/v1", "api_key_env": "UP_KEY", "retries": 0}}
        with providers_server(tmp_path, providers, models) as here:
            assert "cannot be reached" in message(here.embed("a", "m"), 503, "provider_failed")
            here.wait_for_log("CERTIFICATE_VERIFY_FAILED")
    assert not tls.requests


def test_another_instance_of_this_server_gives_its_vectors_bit_for_bit(
    server: Server, reference_texts: list[str], tmp_path: Path
) -> None:
    providers = {"there": {"url": f"{server.url}/v1/"}}
    models = {"far": {"provider": "there", "name": MINILM}}
    with providers_server(tmp_path, providers, models) as here:
        texts = [text for text in (*reference_texts, reference_texts[0]) if text and len(text) < 500]
        direct = server.embed(texts, encoding_format="base64").json()
        through = here.embed(texts, "far", encoding_format="base64").json()
        assert [each["embedding"] for each in through["data"]] == [each["embedding"] for each in direct["data"]]
        once = texts[:-1]  # of a text that stands twice each share is a guess
        assert here.embed(once, "far").json()["usage"] == server.embed(once).json()["usage"]
        cut = [each.embed(texts, model, dimensions=64) for each, model in ((here, "far"), (server, MINILM))]
        np.testing.assert_allclose(vectors(cut[0]), vectors(cut[1]), atol=1e-6)
        ids = [101, 7592, 102]
        np.testing.assert_array_equal(vectors(here.embed(ids, "far")), vectors(server.embed(ids)))
        long = here.embed([*texts, "word " * 300, "short"], "far")
        said = f"input[{len(texts)}] has 302 tokens, the model takes 256: send shorter inputs"
        assert message(long, 400, "input_too_long") == said
        assert long.json()["error"]["details"] == [{"index": len(texts), "tokens": 302, "max_tokens": 256}]
