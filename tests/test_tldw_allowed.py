"""Which models and providers may be used, and which is meant when none is named: for every route."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.scripted import DIMENSIONS
from tests.server import Server
from tests.upstream import Upstream, always, good, providers_server, upstream


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream({"openai": good, "other": good, "down": always(b"", 500)}) as found:
        yield found


@pytest.fixture(scope="module")
def server(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    providers: dict[str, Any] = {
        "openai": {"url": f"{up.url}/openai/v1", "any_model": True},
        "other": {"url": f"{up.url}/other/v1"},
        "down": {"url": f"{up.url}/down/v1", "retries": 0, "failure_threshold": 1000},
    }
    remote = {"name": "m", "dimensions": DIMENSIONS}
    models: dict[str, Any] = {
        "elsewhere": remote | {"provider": "other"},
        "by-alias": remote | {"provider": "down", "aliases": ["short"], "fallback": ["refused", "elsewhere"]},
        "refused": remote | {"provider": "openai", "name": "gone"},
    }
    settings: dict[str, Any] = {
        "allowed_models": ["elsewhere", "short", "openai:text-*"],
        "allowed_providers": ["openai", "other", "down"],
        "default_model": "openai:text-embedding-3-small",
    }
    with providers_server(tmp_path_factory.mktemp("allowed"), providers, models, **settings) as server:
        yield server


def embed(server: Server, model: str | None, path: str = "/api/v1/embeddings", **headers: str) -> httpx.Response:
    body = {"input": "a", "texts": ["a"]} if path.endswith("/batch") else {"input": "a"}
    return server.client.post(path, json=body | ({} if model is None else {"model": model}), headers=headers)


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("POST", "/v1/embeddings", {"input": "a"}),
        ("POST", "/v1/embed_sparse", {"input": "a"}),
        ("POST", "/v1/rerank", {"query": "a", "documents": ["a"]}),
        ("POST", "/embed", {"inputs": "a"}),
        ("POST", "/api/v1/embeddings", {"input": "a"}),
        ("POST", "/api/v1/embed_sparse", {"input": "a"}),
        ("POST", "/api/v1/rerank", {"query": "a", "documents": ["a"]}),
        ("POST", "/api/v1/embeddings/batch", {"texts": ["a"]}),
        ("POST", "/api/v1/embeddings/models/warmup", {}),
        ("POST", "/api/v1/embeddings/models/download", {}),
        ("POST", "/v1/models/{}/load", None),
        ("GET", "/v1/models/{}", None),
        ("GET", "/api/v1/models/{}", None),
    ],
)
def test_every_route_refuses_what_is_served_and_not_allowed(
    server: Server, method: str, path: str, fields: dict[str, Any] | None
) -> None:
    # What nobody serves is taken to be of the default model's provider, which takes any.
    for name, status in {"toy": 403, "refused": 403, "openai:gpt": 403, "none": 403, "other:none": 404}.items():
        body = None if fields is None else fields | {"model": name}
        reply = server.client.request(method, path.format(name), json=body)

        assert reply.status_code == status, (name, reply.text)
        assert ("not allowed" if status == 403 else "not served here") in reply.text


@pytest.mark.parametrize(
    ("model", "headers"),
    [
        ("elsewhere", {}),
        ("m", {"x-provider": "other"}),
        ("openai:text-embedding-3-small", {}),
        ("text-anything", {"x-provider": "openai"}),
        ("text-embedding-3-large", {}),  # is not served, and looked for at the default model's provider
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/v1/embeddings", "/api/v1/embeddings/batch"])
def test_what_is_allowed_is_answered(server: Server, path: str, model: str, headers: dict[str, str]) -> None:
    assert embed(server, model, path, **headers).status_code == 200


def test_a_model_is_allowed_by_its_alias_and_a_fallback_by_itself(server: Server) -> None:
    for name in ("by-alias", "short", "down:m"):
        reply = embed(server, name)
        assert (reply.status_code, reply.headers["x-embeddings-provider"]) == (200, "other"), reply.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/v1/embeddings", "/api/v1/embeddings/batch"])
def test_no_model_means_the_default_model(server: Server, up: Upstream, path: str) -> None:
    reply = embed(server, None, path)

    assert (reply.status_code, reply.headers["x-embeddings-provider"]) == (200, "openai"), reply.text
    assert up.requests["openai"][-1]["model"] == "text-embedding-3-small"
    assert reply.json()["model"].removeprefix("openai:") == "text-embedding-3-small"
    refused = embed(server, None, path, **{"x-provider": "openai"})
    assert refused.status_code == 400 and "model is missing" in refused.text


def test_embed_and_what_admins_do_take_the_default_model_too(server: Server) -> None:
    reply = server.client.post("/embed", json={"inputs": "a"})
    warmed = server.client.post("/api/v1/embeddings/models/warmup", json={})
    download = server.client.post("/api/v1/embeddings/models/download", json={})

    assert (reply.status_code, reply.headers["x-embeddings-provider"]) == (200, "openai")
    assert (warmed.json()["provider"], warmed.json()["model"]) == ("openai", "text-embedding-3-small")
    assert (download.status_code, "at its provider 'openai'" in download.json()["detail"]) == (400, True)


def test_lists_say_what_is_allowed(server: Server) -> None:
    said = server.client.get("/api/v1/embeddings/models").json()

    allowed = {each["model"]: each["allowed"] for each in said["data"]}
    assert allowed == {
        "toy": False, "elsewhere": True, "by-alias": True, "refused": False, "text-embedding-3-small": True
    }  # fmt: skip
    assert [each["model"] for each in said["data"] if each["default"]] == ["text-embedding-3-small"]
    assert said["allowed_models"] == ["elsewhere", "short", "openai:text-*"]
    assert said["allowed_providers"] == ["openai", "other", "down"]
    usable = ["elsewhere", "by-alias", "openai:text-embedding-3-small"]
    assert [each["id"] for each in server.client.get("/v1/models").json()["data"]] == usable
    assert server.client.get("/").json()["models"] == usable
    described = server.client.get("/api/v1/embeddings/models/toy").json()
    assert (described["allowed"], described["provider"]) == (False, "local")
    config = server.client.get("/api/v1/embeddings/providers-config").json()
    assert (config["default_provider"], config["default_model"]) == ("openai", "text-embedding-3-small")
    assert config["providers"] == [
        {"name": "openai", "models": ["text-embedding-3-small"]},
        {"name": "other", "models": ["elsewhere"]},
        {"name": "down", "models": ["by-alias"]},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allowed_models": ["tyo"]}, "--allowed-models tyo: no such model is served; served: toy, far"),
        ({"allowed_models": ["nobody:*"]}, "--allowed-models nobody:*: no such model"),
        ({"allowed_providers": ["opnai"]}, "--allowed-providers opnai: there is no such provider; known: local, api"),
        ({"allowed_models": ["far"], "allowed_providers": ["local"]}, "together leave no model"),
        ({"default_model": "tyo"}, "--default-model: the model 'tyo' is not served here"),
        (
            {"default_model": "far", "allowed_models": ["toy"]},
            "--default-model: the model 'far' is served here, and not",
        ),
    ],
)
def test_lists_of_what_is_not_there_end_the_start(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    file = tmp_path / "models.yaml"
    served = {
        "models": {"toy": {"name": "./toy"}, "far": {"provider": "api", "name": "m"}},
        "providers": {"api": {"url": "http://127.0.0.1:9/v1"}},
    }
    file.write_text(json.dumps(served | settings))  # JSON is YAML
    with pytest.raises(SettingsError) as raised:
        create_app(load_settings({"config": str(file)}))

    assert message in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_providers": ["huggingface"]},
        {"allowed_models": ["t*"]},
        {"allowed_models": ["local:toy"]},
        {"allowed_models": ["huggingface:toy"]},
    ],
)
def test_this_server_is_a_provider_of_several_names(up: Upstream, tmp_path: Path, settings: dict[str, Any]) -> None:
    far = {"name": "m", "provider": "other", "dimensions": DIMENSIONS}
    providers = {"other": {"url": f"{up.url}/other/v1"}}
    with providers_server(tmp_path, providers, {"far": far}, **settings) as server:
        assert embed(server, "toy").status_code == 200
        assert embed(server, "far").status_code == 403


@pytest.mark.parametrize("pattern", ["m", "far", "also", "other:m", "other:far", "other:also"])
def test_a_model_elsewhere_is_allowed_by_all_that_it_is_called(tmp_path: Path, pattern: str) -> None:
    file = tmp_path / "models.yaml"
    served = {
        "models": {"toy": {"name": "./toy"}, "far": {"provider": "other", "name": "m", "aliases": ["also"]}},
        "providers": {"other": {"url": "http://127.0.0.1:9/v1"}},
    }
    file.write_text(json.dumps(served | {"allowed_models": [pattern]}))  # JSON is YAML
    models = create_app(load_settings({"config": str(file)})).state.runtime.models
    assert [model.name for model in models.usable()] == ["far"]
    assert models.asked(pattern) is models.asked("m") is models.asked("far")
