"""Each route of the tldw server's API, over HTTP, with users who are told apart by tokens."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pytest

from tests.cached import metric
from tests.scripted import DIMENSIONS, vector
from tests.server import Server
from tests.test_access_tokens import SECRET, claims, signed
from tests.upstream import Upstream, always, good, providers_server, upstream

ROUTES = [
    ("POST", ""), ("POST", "/batch"), ("GET", "/models"), ("GET", "/models/toy"), ("GET", "/providers-config"),
    ("GET", "/health"),
]  # fmt: skip
ADMIN_ROUTES = [
    ("GET", "/metrics"), ("DELETE", "/cache"), ("GET", "/circuit-breakers"), ("POST", "/circuit-breakers/down/reset"),
    ("POST", "/models/warmup"), ("POST", "/models/download"), ("GET", "/models/download/toy"),
]  # fmt: skip


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream({"openai": good, "other": good, "down": always(b"", 500)}) as found:
        yield found


@pytest.fixture(scope="module")
def server(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    providers: dict[str, Any] = {
        "openai": {"url": f"{up.url}/openai/v1", "models": ["text-embedding-3-small", "text-embedding-3-large"]},
        "other": {"url": f"{up.url}/other/v1", "any_model": True},
        "down": {"url": f"{up.url}/down/v1", "retries": 0, "failure_threshold": 2, "recovery": "1h"},
    }
    models: dict[str, Any] = {
        "acme/named": {"provider": "other", "name": "its-name", "dimensions": DIMENSIONS, "max_tokens": 77},
        "broken": {"provider": "down", "name": "m", "dimensions": DIMENSIONS},
        "falls": {"provider": "down", "name": "m", "dimensions": DIMENSIONS, "fallback": ["toy"]},
    }
    folder = tmp_path_factory.mktemp("tldw")
    with providers_server(
        folder, providers, models, cache=True, jwt_secret=SECRET, jwt_admin_claim="admin", allowed_models=["*"]
    ) as server:
        server.client.headers["Authorization"] = f"Bearer {signed(claims(aud=None, iss=None, admin=True))}"
        yield server


USER = {"Authorization": f"Bearer {signed(claims(aud=None, iss=None, exp=int(time.time()) + 3600))}"}


def ask(server: Server, method: str, path: str, **more: Any) -> httpx.Response:
    return server.client.request(method, f"/api/v1/embeddings{path}", **more)


def answer(server: Server, method: str, path: str, **more: Any) -> Any:
    reply = ask(server, method, path, **more)
    assert reply.status_code == 200, reply.text
    return reply.json()


def embed(server: Server, text: str, model: str, **headers: str) -> httpx.Response:
    return ask(server, "POST", "", json={"model": model, "input": text}, headers=headers)


def assert_vectors(rows: Any, *texts: str) -> None:
    np.testing.assert_array_equal(np.array(rows, dtype=np.float32), [vector(text) for text in texts])


# Who may


@pytest.mark.parametrize(("method", "path"), [*ROUTES, *ADMIN_ROUTES])
def test_every_route_wants_to_know_who_calls(server: Server, method: str, path: str) -> None:
    reply = ask(server, method, path, headers={"Authorization": ""})

    assert reply.status_code == 401
    assert reply.json()["detail"] and "error" not in reply.json()


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_what_is_for_admins_is_refused_to_others(server: Server, method: str, path: str) -> None:
    reply = ask(server, method, path, headers=USER)

    assert (reply.status_code, reply.json()["detail"]) == (403, "this is for admins: ask whoever runs the server")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_all_else_is_for_everybody(server: Server, method: str, path: str) -> None:
    body = {"model": "toy", "input": "a", "texts": ["a"]} if path else {"model": "toy", "input": "a"}
    assert ask(server, method, path, headers=USER, json=body if method == "POST" else None).status_code == 200


def test_what_does_not_exist_has_a_detail_too(server: Server) -> None:
    missing, wrong = ask(server, "GET", "/nothing"), ask(server, "PATCH", "/models")

    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "GET / lists the endpoints" in missing.json()["detail"] and "PATCH" in wrong.json()["detail"]


# POST /api/v1/embeddings


@pytest.mark.parametrize(
    ("model", "headers", "told", "provider"),
    [
        ("toy", {}, "toy", "local"),
        ("local:toy", {}, "local:toy", "local"),
        ("huggingface:toy", {}, "huggingface:toy", "local"),
        ("toy", {"x-provider": "huggingface"}, "huggingface:toy", "local"),
        ("toy", {"x-provider": "HuggingFace"}, "huggingface:toy", "local"),
        ("Local:toy", {}, "local:toy", "local"),
        ("huggingface:toy", {"x-provider": "local"}, "local:toy", "local"),
        ("toy", {"x-provider": ""}, "toy", "local"),
        ("acme/named", {}, "acme/named", "other"),
        ("its-name", {}, "acme/named", "other"),
        ("other:its-name", {}, "other:acme/named", "other"),
        ("its-name", {"x-provider": "other"}, "other:acme/named", "other"),
        ("any", {"x-provider": "other"}, "other:any", "other"),
        ("text-embedding-3-small", {"x-provider": "openai"}, "text-embedding-3-small", "openai"),
        ("openai:text-embedding-3-small", {"x-provider": "openai"}, "text-embedding-3-small", "openai"),
        ("openai:text-embedding-3-small", {}, "text-embedding-3-small", "openai"),
        ("text-embedding-3-small", {}, "text-embedding-3-small", "openai"),
    ],
)
def test_the_reply_names_the_provider_where_the_request_does(
    server: Server, model: str, headers: dict[str, str], told: str, provider: str
) -> None:
    reply = embed(server, "a", model, **headers)

    assert reply.status_code == 200, reply.text
    assert (reply.json()["model"], reply.headers["x-embeddings-provider"]) == (told, provider)
    assert_vectors([reply.json()["data"][0]["embedding"]], "a")
    again = embed(server, "a", told)
    assert (again.status_code, again.json()["model"]) == (200, told)


def test_a_fallback_is_told(server: Server) -> None:
    reply = embed(server, "a", "falls")
    named = embed(server, "a", "falls", **{"x-provider": "down"})

    assert (reply.json()["model"], named.json()["model"]) == ("toy", "local:toy")
    assert (reply.headers["x-embeddings-provider"], reply.headers["x-embeddings-fallback-from"]) == ("local", "down")


# Two models are called m by their provider: it is not said which one is meant.
@pytest.mark.parametrize(("model", "header"), [("toy", "nowhere"), ("none", "local"), ("none", None), ("m", None)])
def test_unknown_models_and_providers_are_not_found(server: Server, model: str, header: str | None) -> None:
    reply = embed(server, "a", model, **({} if header is None else {"x-provider": header}))

    assert reply.status_code == 404
    assert reply.json()["code"] in ("model_not_found", "provider_not_found") and reply.json()["detail"]


# POST /api/v1/embeddings/batch


@pytest.mark.parametrize(
    ("fields", "model", "provider"),
    [
        ({}, "toy", "local"),
        ({"model": "toy"}, "toy", "local"),
        ({"model": "toy", "provider": "local"}, "toy", "local"),
        ({"model": "text-embedding-3-small", "provider": "openai"}, "text-embedding-3-small", "openai"),
        ({"model": "other:anything"}, "anything", "other"),
        ({"model": "falls"}, "toy", "local"),
    ],
)
def test_a_batch_is_answered_in_its_order(server: Server, fields: dict[str, str], model: str, provider: str) -> None:
    texts = ["one", "https://example.com/a.png", "one", "three"]
    reply = ask(server, "POST", "/batch", json={"texts": texts, **fields})

    assert reply.status_code == 200, reply.text
    said = reply.json()
    assert set(said) == {"embeddings", "model", "provider", "count"}
    assert (said["model"], said["provider"], said["count"]) == (model, provider, 4)
    assert_vectors(said["embeddings"], *texts)
    assert reply.headers["x-embeddings-provider"] == provider
    assert reply.headers.get("x-embeddings-fallback-from") == ("down" if fields.get("model") == "falls" else None)


@pytest.mark.parametrize(("policy", "dimensions", "length"), [("reduce", 4, 4), ("pad", 12, 12), ("ignore", 3, 8)])
def test_a_batch_has_dimensions(server: Server, policy: str, dimensions: int, length: int) -> None:
    body = {"texts": ["a"], "model": "toy", "dimensions": dimensions}
    reply = ask(server, "POST", "/batch", json=body, headers={"X-Embeddings-Dimensions-Policy": policy})

    assert reply.headers["x-embeddings-dimensions-policy"] == policy
    expected = np.pad(vector("a"), (0, 4))[:length]
    np.testing.assert_array_equal(np.array(reply.json()["embeddings"][0], dtype=np.float32), expected)


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({}, "texts is missing"),
        ({"texts": []}, "texts is an empty list"),
        ({"texts": "a"}, "texts must be a list of strings"),
        ({"texts": ["a", ""]}, "texts[1] is an empty string"),
        ({"texts": ["a", [1, 2]]}, "texts[1] must be a string: token ids and images are for POST /api/v1/embeddings"),
        ({"texts": [{"text": "a"}]}, "texts[0] must be a string"),
        ({"texts": ["a"], "dimensions": 9}, "dimensions is 9, the most is 8"),
        ({"texts": ["a"], "dimensions": "many"}, "dimensions"),
        ({"model": None, "provider": "local", "texts": ["a"]}, "model is missing"),
        ({"texts": ["a"] * 20_481}, "texts has 20481 items, the limit is 20480"),
    ],
)
def test_a_batch_that_is_wrong_is_told_where(server: Server, fields: dict[str, Any], detail: str) -> None:
    reply = ask(server, "POST", "/batch", json={"model": "toy", **fields})

    assert reply.status_code == 400
    assert detail in reply.json()["detail"]


# Models


def test_models_are_listed_with_their_providers(server: Server) -> None:
    said = answer(server, "GET", "/models", headers=USER)

    listed = {(each["provider"], each["model"]): each for each in said["data"]}
    assert set(listed) == {
        ("local", "toy"), ("other", "acme/named"), ("down", "broken"), ("down", "falls"),
        ("openai", "text-embedding-3-small"), ("openai", "text-embedding-3-large"),
    }  # fmt: skip
    assert all(each["allowed"] is True for each in said["data"])
    assert [key for key, each in listed.items() if each["default"]] == [("local", "toy")]
    assert (said["allowed_models"], said["allowed_providers"]) == (["*"], None)
    for provider, model in listed:  # as they are listed they can be asked for
        if provider != "down":
            for headers in ({}, {"x-provider": provider}):
                reply = embed(server, "a", model, **headers)
                assert (reply.status_code, reply.headers["x-embeddings-provider"]) == (200, provider)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acme/named", {"model": "acme/named", "provider": "other", "dimension": DIMENSIONS, "max_tokens": 77}),
        ("other:its-name", {"model": "acme/named", "provider": "other", "dimension": DIMENSIONS, "max_tokens": 77}),
        ("toy", {"model": "toy", "provider": "local", "dimension": DIMENSIONS, "max_tokens": 512}),
        ("huggingface:toy", {"model": "toy", "provider": "local", "dimension": DIMENSIONS, "max_tokens": 512}),
        ("openai:text-embedding-3-large", {"model": "text-embedding-3-large", "provider": "openai"}),
        ("text-embedding-3-large", {"model": "text-embedding-3-large", "provider": "openai"}),
        ("text-embedding-3-large?provider=openai", {"model": "text-embedding-3-large", "provider": "openai"}),
        ("toy?provider=", {"model": "toy", "provider": "local"}),
    ],
)
def test_a_model_is_described(server: Server, name: str, expected: dict[str, Any]) -> None:
    embed(server, "a", "toy")
    said = answer(server, "GET", f"/models/{name}", headers=USER)

    assert said.items() >= (expected | {"allowed": True}).items()
    assert {"dimension", "max_tokens"} <= said.keys()
    assert ask(server, "GET", f"/models/{name.replace('/', '%2F')}").json() == said


def test_a_model_that_is_not_served_is_not_described(server: Server) -> None:
    reply = ask(server, "GET", "/models/none/at/all")

    assert (reply.status_code, reply.json()["code"]) == (404, "model_not_found")
    assert ask(server, "GET", "/models/toy?provider=openai").status_code == 404


def test_the_providers_have_their_models(server: Server) -> None:
    assert answer(server, "GET", "/providers-config", headers=USER) == {
        "default_provider": "local",
        "default_model": "toy",
        "providers": [
            {"name": "local", "models": ["toy"]},
            {"name": "openai", "models": ["text-embedding-3-small", "text-embedding-3-large"]},
            {"name": "other", "models": ["acme/named"]},
            {"name": "down", "models": ["broken", "falls"]},
        ],
    }


# State


def test_health_has_the_cache_and_the_circuits(server: Server) -> None:
    embed(server, "kept for health", "toy")
    said = answer(server, "GET", "/health", headers=USER)

    assert (said["status"], said["service"], said["active_requests"]) == ("healthy", "mlx-embeddings-server", 0)
    age = datetime.now(UTC) - datetime.fromisoformat(said["timestamp"])
    assert abs(age.total_seconds()) < 60 and said["timestamp"].endswith("Z")
    stats = said["cache_stats"]
    assert (stats["enabled"], stats["max_size"], stats["ttl_seconds"]) == (True, 5000, 3600) and stats["size"] >= 1
    assert set(said["circuit_breakers"]) == {"openai", "other", "down"}
    assert said["circuit_breakers"]["openai"].items() >= {"state": "closed", "failure_count": 0}.items()


def test_metrics_are_json(server: Server) -> None:
    embed(server, "counted", "toy")
    said = answer(server, "GET", "/metrics")

    assert {"cache", "active_requests", "circuit_breakers", "counters", "gauges", "histograms"} <= said.keys()
    counted = {each["labels"]["route"] for each in said["counters"]["mlx_embeddings_requests_total"]}
    assert "/api/v1/embeddings" in counted


def test_the_cache_is_cleared(server: Server) -> None:
    answer(server, "DELETE", "/cache")
    for text in ("first", "second", "first"):
        assert embed(server, text, "toy").status_code == 200

    assert answer(server, "DELETE", "/cache") == {"message": "Cache cleared successfully", "entries_removed": 2}
    assert answer(server, "GET", "/health")["cache_stats"]["size"] == 0


def test_a_circuit_is_shown_and_reset(server: Server, up: Upstream) -> None:
    assert answer(server, "POST", "/circuit-breakers/down/reset")
    for _ in range(3):
        assert embed(server, "a", "broken").status_code == 503
    state = answer(server, "GET", "/circuit-breakers")["down"]
    asked = len(up.requests["down"])

    assert (state["state"], state["failure_count"]) == ("open", 2)
    assert datetime.fromisoformat(state["opened_at"]).tzinfo and state["retry_after"] > 3000
    said = answer(server, "POST", "/circuit-breakers/down/reset")
    assert said == {"message": "Circuit breaker for 'down' reset successfully"}
    assert answer(server, "GET", "/circuit-breakers")["down"]["state"] == "closed"
    embed(server, "a", "broken")
    assert len(up.requests["down"]) == asked + 1


@pytest.mark.parametrize("provider", ["nobody", "local"])
def test_a_provider_without_a_circuit_is_not_found(server: Server, provider: str) -> None:
    reply = ask(server, "POST", f"/circuit-breakers/{provider}/reset")

    assert reply.status_code == 404
    assert "known: openai, other, down" in reply.json()["detail"]


# Warming up


def test_a_model_that_is_loaded_is_warmed_up_by_a_text_all_the_same(server: Server) -> None:
    embed(server, "so that it is loaded", "toy")
    before = metric(server, 'batch_items_sum{model="toy"}')
    for _ in range(2):  # the cache does not stand between
        answer(server, "POST", "/models/warmup", json={"model": "toy"})

    assert metric(server, 'batch_items_sum{model="toy"}') == before + 2


def test_a_model_is_warmed_up(server: Server, up: Upstream) -> None:
    said = answer(server, "POST", "/models/warmup", json={"model": "toy"})
    assert said.items() >= {"status": "ok", "provider": "local", "model": "toy", "warmed": True, "dimension": 8}.items()

    before = len(up.requests["openai"])
    said = answer(server, "POST", "/models/warmup", json={"model": "text-embedding-3-large", "provider": "openai"})
    assert (said["provider"], said["model"], said["warmed"]) == ("openai", "text-embedding-3-large", True)
    assert len(up.requests["openai"]) > before


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"model": "none"}, 404, "is not served here"),
        ({"model": "toy", "provider": "nowhere"}, 404, "there is no provider 'nowhere' here"),
        ({}, 400, "model is missing"),
        ({"model": "broken"}, 503, "try again later"),
    ],
)
def test_what_cannot_be_warmed_up_says_why(server: Server, body: dict[str, str], status: int, detail: str) -> None:
    reply = ask(server, "POST", "/models/warmup", json=body)

    assert reply.status_code == status
    assert detail in reply.json()["detail"]
