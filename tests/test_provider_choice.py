"""Which model a request means, where other servers have some: by name, by provider, or one that nobody listed."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.scripted import DIMENSIONS, vector
from tests.server import Server
from tests.threaded import ThreadedServer
from tests.upstream import Upstream, always, good, message, providers_server, upstream, vectors


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream(dict.fromkeys(("good", "sized", "far"), good)) as found:
        yield found


@pytest.fixture(scope="module")
def here(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    providers: dict[str, Any] = {name: {"url": f"{up.url}/{name}/v1", "failure_threshold": 100} for name in up.pages}
    providers["good"] |= {"any_model": True}
    providers["far"] |= {"models": ["listed"]}
    models: dict[str, Any] = {
        f"{name}-model": {"provider": name, "name": "m", "dimensions": DIMENSIONS} for name in ("good", "sized")
    }
    models["sized-model"] |= {"aliases": "other-name"}
    with providers_server(tmp_path_factory.mktemp("here"), providers, models) as server:
        yield server


@pytest.mark.parametrize(
    ("model", "provider", "served"),
    [
        ("good:m", None, "good-model"),
        ("m", "good", "good-model"),
        ("good:m", "good", "good-model"),
        ("good-model", "good", "good-model"),
        ("sized:other-name", None, "sized-model"),
        ("far:listed", None, "far:listed"),
        ("listed", "far", "far:listed"),
        ("good:whatever", None, "good:whatever"),
        ("whatever/else:v1", "good", "good:whatever/else:v1"),
        ("local:toy", None, "toy"),
        ("toy", "local", "toy"),
        ("huggingface:toy", None, "toy"),
    ],
)
def test_models_by_provider(here: Server, up: Upstream, model: str, provider: str | None, served: str) -> None:
    headers = {} if provider is None else {"X-Provider": provider}
    reply = here.client.post("/v1/embeddings", json={"model": model, "input": "a"}, headers=headers)
    np.testing.assert_array_equal(vectors(reply), [vector("a")])
    assert reply.json()["model"] == served
    if served.startswith("good:"):
        assert up.requests["good"][-1]["model"] == served.removeprefix("good:")


@pytest.mark.parametrize(
    ("model", "provider", "code", "said"),
    [
        ("far:other", None, "model_not_found", "served: toy, "),
        ("other", "far", "model_not_found", "any model of good, as PROVIDER:MODEL"),
        ("nobody:m", None, "model_not_found", "'nobody:m' is not served here"),
        ("m", "nobody", "provider_not_found", "no provider 'nobody' here; known: local, good, "),
        ("good-model", "local", "model_not_found", "'local:good-model' is not served"),
        ("toy", "far", "model_not_found", "'far:toy' is not served"),
        ("good:", None, "model_not_found", "served: toy"),
        ("good:" + "x" * 300, None, "model_not_found", "served: toy"),
        ("good:a\nb", None, "model_not_found", "served: toy"),
    ],
)
def test_what_no_provider_may_serve(here: Server, model: str, provider: str | None, code: str, said: str) -> None:
    headers = {} if provider is None else {"x-provider": provider}
    reply = here.client.post("/v1/embeddings", json={"model": model, "input": "a"}, headers=headers)
    assert said in message(reply, 404, code)


def test_an_id_that_two_models_have_says_which(tmp_path: Path, up: Upstream) -> None:
    file = tmp_path / "models.yaml"
    names = ("good", "far")
    providers = {name: {"url": f"{up.url}/{name}/v1"} for name in names}
    models = {name: {"provider": name, "name": "same", "dimensions": DIMENSIONS} for name in names}
    file.write_text(json.dumps({"providers": providers, "models": models}))  # JSON is YAML
    with ThreadedServer(file) as server:
        said = message(server.embed("a", "same"), 404, "model_not_found")
        assert said == "several models are called 'same' by their providers: ask for one of good, far"


def test_who_looks_at_models_has_none_forgotten(here: Server, up: Upstream) -> None:
    assert here.embed("a", "good:looked-at").status_code == 200
    for number in range(101):
        path = f"/v1/models/good:seen-{number}" if number % 2 else f"/api/v1/embeddings/models/good:seen-{number}"
        assert here.client.get(path).status_code == 200
    before = len(up.requests["good"])
    assert here.embed("b", "good:looked-at").status_code == 200
    assert len(up.requests["good"]) == before + 1  # its vectors' size is known


def test_a_model_that_a_caller_makes_up_is_not_found(here: Server, up: Upstream) -> None:
    up.pages["good"] = always({"error": {"message": "no such model"}}, 404)
    try:
        reply = here.embed("a", "good:made-up")
    finally:
        up.pages["good"] = good
    assert "has no model 'made-up'" in message(reply, 404, "model_not_found")


def test_models_that_callers_name_are_no_labels(here: Server) -> None:
    with ThreadPoolExecutor(8) as clients:
        names = [f"good:label-{number}" for number in range(250)]
        statuses = {reply.status_code for reply in clients.map(here.embed, ["a"] * len(names), names)}
    assert statuses == {200}
    labels = set(re.findall(r'model="([^"]*)"', here.client.get("/metrics").text))
    assert {label for label in labels if label.startswith("good:")} == {"good:other"}


def test_of_models_that_callers_name_the_least_recently_used_one_is_forgotten(here: Server, up: Upstream) -> None:
    here.embed("a", "good:forgotten")
    for number in range(120):
        assert here.embed("a", f"good:number-{number}").status_code == 200
        if number in (0, 90):
            here.embed("a", "good:used")
    up.requests["good"].clear()
    for name in ("used", "forgotten"):
        np.testing.assert_array_equal(vectors(here.embed("a", f"good:{name}")), [vector("a")])
    # Of the one that was forgotten the vectors' size is learnt again.
    asked = [(each["model"], each["input"]) for each in up.requests["good"]]
    assert asked == [("used", ["a"]), ("forgotten", ["dimensions"]), ("forgotten", ["a"])]


def test_the_policy_for_dimensions_by_request(here: Server) -> None:
    def embed(policy: str, dimensions: int) -> httpx.Response:
        body = {"model": "toy", "input": "a", "dimensions": dimensions}
        return here.client.post("/v1/embeddings", json=body, headers={"X-Embeddings-Dimensions-Policy": policy})

    np.testing.assert_array_equal(vectors(embed("pad", 10)), [[*vector("a"), 0, 0]])
    np.testing.assert_array_equal(vectors(embed("ignore", 10)), [vector("a")])
    assert embed("ignore", 10).headers["x-embeddings-dimensions-policy"] == "ignore"
    assert "must be one of reduce, pad, ignore" in message(embed("shrink", 4), 400, "invalid_value")
    assert here.embed("a", "toy").headers["x-embeddings-dimensions-policy"] == "reduce"
    tei = here.client.post(
        "/embed",
        json={"inputs": "a", "dimensions": 10, "normalize": False},
        headers={"x-embeddings-dimensions-policy": "pad"},
    )
    assert tei.headers["x-embeddings-dimensions-policy"] == "pad" and tei.json()[0][8:] == [0, 0]
