"""Another model in the place of one that fails, and a circuit that opens, is tried and closes: over HTTP."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.scripted import DIMENSIONS, vector
from tests.server import Server
from tests.upstream import Handler, Upstream, always, good, hang, providers_server, reply_of, rows_of, upstream

_PROVIDERS = ("down", "up", "small", "circuit", "reset", "trial", "left", "keyless", "busy")


def _small(handler: Handler) -> None:
    handler.reply(reply_of([row[:4] for row in rows_of(handler.inputs)]))


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    pages: dict[str, Any] = dict.fromkeys(_PROVIDERS, always(b"", 500)) | {"up": good, "small": _small}
    with upstream(pages | {"keyless": always(b"", 401), "busy": hang(5)}) as found:
        yield found


@pytest.fixture(scope="module")
def here(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("here")
    providers: dict[str, Any] = {
        name: {"url": f"{up.url}/{name}/v1", "retries": 0, "timeout": "5s", "failure_threshold": 1000}
        for name in _PROVIDERS
    }
    for name in ("circuit", "reset", "trial", "left"):
        providers[name] |= {"failure_threshold": 2, "recovery": "1s"}
    providers["busy"] |= {"timeout": "1s", "max_in_flight": 1}
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "bert"}')
    (broken / "script.json").write_text("{}")
    (broken / "broken").touch()
    down = {"provider": "down", "name": "m", "dimensions": DIMENSIONS}
    models: dict[str, Any] = {
        "to-toy": down | {"fallback": ["toy"]},
        "to-up": down | {"fallback": ["keyless-model", "up:m", "toy"]},
        "to-list": down | {"fallback": ["keyless-model"]},
        "keyless-model": {"provider": "keyless", "name": "m", "dimensions": DIMENSIONS, "fallback": "toy"},
        "to-small": down | {"fallback": ["small:m", "toy"]},
        "to-small-alone": down | {"fallback": ["small:m"]},
        "to-small-allowed": down | {"fallback": ["small:m"], "fallback_other_dimensions": True},
        "unknown-to-toy": {"provider": "down", "name": "other", "fallback": ["toy"]},
        "unknown-to-all": {
            "provider": "down", "name": "other", "fallback": ["toy"], "fallback_other_dimensions": True
        },
        "broken": {"name": str(broken), "dimensions": DIMENSIONS, "fallback": ["up:m"]},
        "to-down": {"provider": "keyless", "name": "m", "dimensions": DIMENSIONS, "fallback": ["down:m"]},
    }  # fmt: skip
    for name in ("circuit", "reset", "trial", "left"):
        models[f"{name}-model"] = {"provider": name, "name": "m", "dimensions": DIMENSIONS}
    models["circuit-model"]["fallback"] = "toy"
    models["busy-model"] = {"provider": "busy", "name": "m", "dimensions": DIMENSIONS}
    models["busy-to-toy"] = models["busy-model"] | {"fallback": "toy"}
    with providers_server(folder, providers, models) as server:
        yield server


def circuit(server: Server, name: str) -> dict[str, Any]:
    return dict(server.client.get("/health").json()["circuit_breakers"][name])


def check(reply: httpx.Response, provider: str, original: str | None, model: str) -> None:
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-embeddings-provider"] == provider
    assert reply.headers.get("x-embeddings-fallback-from") == original
    assert reply.json()["model"] == model
    np.testing.assert_array_equal(np.array(reply.json()["data"][0]["embedding"], dtype=np.float32), vector("a"))


@pytest.mark.parametrize(
    ("asked", "provider", "original", "model"),
    [
        ("toy", "local", None, "toy"),
        ("to-toy", "local", "down", "toy"),
        ("to-up", "up", "down", "up:m"),  # the second of its list, before what the first's own list has
        ("to-list", "local", "down", "toy"),  # of the fallback's own list
        ("keyless-model", "local", "keyless", "toy"),
        ("to-small", "local", "down", "toy"),  # the first has other dimensions
        ("broken", "up", "local", "up:m"),  # it cannot be loaded
        ("unknown-to-all", "local", "down", "toy"),
    ],
)
def test_the_next_is_tried(here: Server, asked: str, provider: str, original: str | None, model: str) -> None:
    check(here.embed("a", asked), provider, original, model)


def test_all_routes_have_fallbacks(here: Server) -> None:
    embed = here.client.post("/embed", json={"model": "to-toy", "inputs": ["a"], "normalize": False})
    unified = here.client.post("/api/v1/embeddings", json={"model_id": "to-toy", "input": "a"})
    rerank = here.client.post("/v1/rerank", json={"model": "to-small-alone", "query": "a", "documents": ["a", "b"]})
    for reply, provider in ((embed, "local"), (unified, "local"), (rerank, "small")):
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-embeddings-fallback-from"] == "down"
        assert reply.headers["x-embeddings-provider"] == provider
    assert rerank.json()["model"] == "small:m"


def test_other_dimensions_are_refused_unless_they_are_allowed(here: Server) -> None:
    reply = here.embed("a", "to-small-alone")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "provider_failed")
    said = (
        "not taken in its place: 'small:m' has 4 dimensions, and 'to-small-alone' 8 (`fallback_other_dimensions: true`"
    )
    assert said in reply.text
    # Also where both would be cut to one size.
    assert here.embed("a", "to-small-alone", dimensions=2).status_code == 503
    allowed = here.embed("a", "to-small-allowed")
    assert len(allowed.json()["data"][0]["embedding"]) == 4 and allowed.headers["x-embeddings-provider"] == "small"


def test_dimensions_that_nobody_knows_do_not_fit(here: Server) -> None:
    reply = here.embed("a", "unknown-to-toy")
    assert reply.status_code == 503 and "the dimensions of 'unknown-to-toy' are not known" in reply.text


def test_the_first_failure_is_told_where_all_fail(here: Server) -> None:
    assert here.embed("a", "to-down").json()["error"]["code"] == "provider_rejected_key"


def test_what_the_fallback_cannot_do_is_the_first_ones_failure(here: Server) -> None:
    assert here.embed("a", "to-toy", dimensions=9).status_code == 400  # the caller's own fault, before anyone is asked
    reply = here.embed("nan a", "to-toy")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "provider_failed")


def test_token_ids_mean_something_else_to_another_model(here: Server) -> None:
    for ids in ([1, 2], [[1, 2]], ["a", [1]]):
        assert here.embed(ids, "to-toy").status_code == 503


def test_the_callers_faults_are_not_passed_on(here: Server, up: Upstream) -> None:
    up.pages["down"] = always({"error": {"message": "too bad"}}, 400)
    try:
        reply = here.embed("a", "to-toy")
    finally:
        up.pages["down"] = always(b"", 500)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "provider_refused_input")
    assert "x-embeddings-fallback-from" not in reply.headers


def test_a_circuit_opens_is_tried_and_closes(here: Server, up: Upstream) -> None:
    assert circuit(here, "circuit") == {
        "state": "closed", "failure_count": 0, "opened_at": None, "retry_after": None
    }  # fmt: skip
    check(here.embed("a", "circuit-model"), "local", "circuit", "toy")
    assert circuit(here, "circuit")["failure_count"] == 1
    here.embed("a", "circuit-model")
    found = circuit(here, "circuit")
    assert (found["state"], found["failure_count"], found["retry_after"]) == ("open", 2, 1)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found["opened_at"])) < timedelta(seconds=60)
    asked = len(up.requests["circuit"])
    check(here.embed("a", "circuit-model"), "local", "circuit", "toy")
    assert len(up.requests["circuit"]) == asked  # it is left alone
    assert here.client.get("/v1/models/circuit-model").json()["state"] == "unavailable"
    assert here.client.get("/health").status_code == 200
    time.sleep(1.1)
    assert circuit(here, "circuit")["state"] == "half_open"
    here.embed("a", "circuit-model")  # which fails again
    assert circuit(here, "circuit")["state"] == "open" and len(up.requests["circuit"]) == asked + 1
    time.sleep(1.1)
    up.pages["circuit"] = good
    check(here.embed("a", "circuit-model"), "circuit", None, "circuit-model")
    assert circuit(here, "circuit") == {"state": "closed", "failure_count": 0, "opened_at": None, "retry_after": None}


def test_an_open_circuit_says_when_to_come_back(here: Server) -> None:
    for _ in range(2):
        here.embed("a", "reset-model")
    reply = here.embed("a", "reset-model")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "failed 2 times in a row and is left alone for another 1 s" in reply.text


def test_one_request_tries_a_half_open_circuit(here: Server, up: Upstream) -> None:
    for _ in range(2):
        here.embed("a", "trial-model")
    time.sleep(1.1)
    before = len(up.requests["trial"])

    def slow(handler: Handler) -> None:
        hang(0.7)(handler)
        good(handler)

    up.pages["trial"] = slow
    with ThreadPoolExecutor(8) as clients:
        statuses = sorted(reply.status_code for reply in clients.map(here.embed, ["a"] * 8, ["trial-model"] * 8))
    assert statuses == [200] + [503] * 7 and len(up.requests["trial"]) == before + 1
    assert circuit(here, "trial")["state"] == "closed"


def test_a_client_that_leaves_says_nothing_of_the_provider(here: Server, up: Upstream) -> None:
    for _ in range(2):
        here.embed("a", "left-model")
    time.sleep(1.1)
    up.pages["left"] = hang(3)
    with pytest.raises(httpx.ReadTimeout):
        here.client.post("/v1/embeddings", json={"model": "left-model", "input": "a"}, timeout=0.2)
    deadline = time.monotonic() + 5
    while circuit(here, "left")["retry_after"] is not None:  # until it is seen that the client has gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert circuit(here, "left")["state"] == "half_open" and circuit(here, "left")["failure_count"] == 2


def test_refusals_of_inputs_and_of_models_do_not_open_a_circuit(here: Server, up: Upstream) -> None:
    for status in (400, 404):
        up.pages["reset"] = always(b"", status)
        time.sleep(1.1)
        for _ in range(5):
            here.embed("a", "reset-model")
        assert circuit(here, "reset")["state"] == "closed"


def test_a_provider_that_hangs_has_no_turn_for_others_who_are_passed_on(here: Server) -> None:
    with ThreadPoolExecutor(6) as clients:
        alone = list(clients.map(here.embed, ["a"] * 6, ["busy-model"] * 6))
        helped = list(clients.map(here.embed, ["a"] * 6, ["busy-to-toy"] * 6))
    # Two have their turn, the second when the first gives up, and wait for an answer.
    codes = [(reply.status_code, reply.json()["error"]["code"]) for reply in alone]
    assert set(codes) == {(503, "provider_failed"), (429, "provider_busy")}
    assert codes.count((429, "provider_busy")) >= 3
    busy = next(reply for reply in alone if reply.status_code == 429)
    assert "'busy' has been busy for 1 s" in busy.text and busy.headers["retry-after"] == "1"
    for reply in helped:
        check(reply, "local", "busy", "toy")


def _wait_for_queue(server: Server, model: str, tokens: int) -> None:
    deadline = time.monotonic() + 5
    while True:
        [found] = [each for each in server.client.get("/health").json()["models"] if each["id"] == model]
        if found["queue"]["tokens"] == tokens:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def test_a_full_queue_is_passed_on_where_the_file_says_so(up: Upstream, tmp_path: Path) -> None:
    providers = {"up": {"url": f"{up.url}/up/v1"}}
    models = {
        name: {
            "name": str(tmp_path / "toy"),
            "dimensions": DIMENSIONS,
            "fallback": "up:m",
            "fallback_when_full": passes,
        }
        for name, passes in (("passes", True), ("waits", False))
    }
    with (
        providers_server(tmp_path, providers, models, max_queue_tokens=20) as here,
        ThreadPoolExecutor(2) as clients,
    ):
        for name in ("passes", "waits"):
            assert here.embed("a", name).headers["x-embeddings-provider"] == "local"
            slow = []
            for tokens in (0, 18):  # that wait: the first runs, the second waits for it
                slow.append(clients.submit(here.embed, f"work 2 {tokens} {'word ' * 15}", name))
                time.sleep(0.3)
                _wait_for_queue(here, name, tokens)
            reply = here.embed("a " * 18, name)
            if name == "passes":
                assert (reply.status_code, reply.headers.get("x-embeddings-provider")) == (200, "up"), reply.text
            else:
                assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
            assert [each.result().status_code for each in slow] == [200, 200]


def test_a_lost_worker_is_a_failure_of_its_model(up: Upstream, tmp_path: Path) -> None:
    providers = {"up": {"url": f"{up.url}/up/v1"}}
    models = {
        "toy": {"name": str(tmp_path / "toy"), "dimensions": DIMENSIONS, "fallback": "up:m", "pinned": True},
    }
    with (
        providers_server(tmp_path, providers, models, drain_timeout=0.1) as here,
        ThreadPoolExecutor(1) as clients,
    ):
        (tmp_path / "toy" / "broken").touch()  # it cannot be loaded again
        clients.submit(here.embed, "die now", "toy")  # waits for it
        deadline = time.monotonic() + 20
        while here.client.get("/v1/models/toy").json()["state"] != "restarting":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        check(here.embed("a", "toy"), "up", "local", "up:m")
        here.stop()


def test_what_cannot_fit_is_refused_at_the_start(up: Upstream, tmp_path: Path) -> None:
    providers = {"up": {"url": f"{up.url}/up/v1"}}
    models = {
        "toy": {"name": str(tmp_path / "toy"), "pinned": True, "fallback": "far"},
        "far": {"provider": "up", "name": "m", "dimensions": 4},
    }
    with (
        pytest.raises(RuntimeError, match="'far' has 4 dimensions, and 'toy' 8"),
        providers_server(tmp_path, providers, models),
    ):
        pass


def test_dimensions_of_a_model_here_must_be_what_the_file_says(tmp_path: Path) -> None:
    models = {"toy": {"name": str(tmp_path / "toy"), "pinned": True, "dimensions": 4}}
    with (
        pytest.raises(RuntimeError, match="its vectors have 8 dimensions, and `dimensions` is 4"),
        providers_server(tmp_path, {}, models),
    ):
        pass
