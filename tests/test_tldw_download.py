"""Downloads that an admin begins and watches, from a stand-in for the Hugging Face Hub."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cached import until
from tests.hub import Hub
from tests.server import Server

SHARDS = {"model-00001-of-00002.safetensors": 600_000, "model-00002-of-00002.safetensors": 390_000}
LAST = "model-00002-of-00002.safetensors"
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "script.json": b"{}",
    "tokenizer.json": b" " * 10_000,
    "model.safetensors.index.json": json.dumps({"weight_map": dict(enumerate(SHARDS))}).encode(),
    **{name: bytes(size) for name, size in SHARDS.items()},
}
NAMES = ("tiny", "asked", "failing", "unsized")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        server.files = {f"acme/{name}": dict(FILES) for name in NAMES} | {"acme/empty": {"README.md": b""}}
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("downloads")
    file = folder / "models.yaml"
    models: dict[str, Any] = {name: {"name": f"acme/{name}"} for name in (*NAMES, "empty", "away")}
    models["far"] = {"provider": "api", "name": "m"}
    providers = {"api": {"url": "http://127.0.0.1:9/v1"}}
    file.write_text(json.dumps({"models": models, "providers": providers}))  # JSON is YAML
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    with Server("--config", str(file), command=("-m", "tests.scripted_models"), environment=environment) as server:
        yield server


@pytest.fixture
def held(hub: Hub) -> Iterator[threading.Event]:
    """The last shard, which comes when this is set."""
    event = hub.held[LAST] = threading.Event()
    yield event
    event.set()
    hub.held.clear()


def start(server: Server, name: str) -> httpx.Response:
    return server.client.post("/api/v1/embeddings/models/download", json={"model": name})


def download(server: Server, name: str) -> dict[str, Any]:
    reply = server.client.get(f"/api/v1/embeddings/models/download/{name}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def has(server: Server, name: str, **values: Any) -> Callable[[], bool]:
    return lambda: download(server, name).items() >= values.items()


def test_a_download_tells_how_far_it_is(server: Server, hub: Hub, held: threading.Event) -> None:
    told = {"provider": "local", "model": "tiny"}
    assert download(server, "tiny") == told | {"status": "not_started", "downloaded": False, "percent": None}

    begun = start(server, "tiny")
    assert (begun.status_code, begun.json()["status"], begun.json()["downloaded"]) == (202, "downloading", False)
    # All but the last shard, of all.
    part = round(100 * (sum(map(len, FILES.values())) - SHARDS[LAST]) / sum(map(len, FILES.values())), 1)
    until(has(server, "tiny", percent=part))
    described = server.client.get("/api/v1/embeddings/models/tiny").json()
    assert described["download"] == {"status": "downloading", "percent": part}
    assert (start(server, "tiny").status_code, hub.requests.count(f"GET {LAST}")) == (202, 1)

    held.set()
    until(has(server, "tiny", status="ok", downloaded=True, percent=100.0))
    assert start(server, "tiny").status_code == 200
    assert "download" not in server.client.get("/api/v1/embeddings/models/tiny").json()
    asked = len(hub.requests)
    assert server.embed("a", "tiny").status_code == 200
    assert len(hub.requests) == asked


def test_a_request_for_a_model_waits_for_the_download_that_runs(
    server: Server, hub: Hub, held: threading.Event
) -> None:
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(server.embed, "a", "asked")
        until(lambda: (download(server, "asked")["percent"] or 0) > 50)
        assert start(server, "asked").status_code == 202
        assert not reply.done()
        held.set()
        assert reply.result().status_code == 200
    assert download(server, "asked")["downloaded"] is True


def test_a_download_that_failed_says_why_and_is_begun_again(server: Server, hub: Hub) -> None:
    hub.failing.add(LAST)
    assert server.embed("a", "failing").status_code == 503
    assert start(server, "failing").status_code == 202
    until(has(server, "failing", status="failed"))
    said = download(server, "failing")
    assert (said["downloaded"], "acme/failing" in said["detail"]) == (False, True), said

    hub.failing.clear()
    assert start(server, "failing").status_code == 202
    until(has(server, "failing", status="ok", percent=100.0))
    # The pause after a load that failed is over once there is something else to load.
    assert server.embed("a", "failing").status_code == 200


@pytest.mark.parametrize(("name", "detail"), [("empty", "is no model that can be served"), ("away", "no model")])
def test_what_is_no_model_says_so(server: Server, name: str, detail: str) -> None:
    start(server, name)
    until(has(server, name, status="failed"))
    assert detail in download(server, name)["detail"]


def test_a_mirror_without_sizes_has_no_percent(server: Server, hub: Hub, held: threading.Event) -> None:
    hub.tells_sizes = False
    try:
        start(server, "unsized")
        until(lambda: f"GET {LAST}" in hub.requests[-len(FILES) :])
        assert download(server, "unsized")["percent"] is None
        held.set()
        until(has(server, "unsized", status="ok", percent=100.0))
    finally:
        hub.tells_sizes = True


def test_a_model_elsewhere_is_not_downloaded(server: Server) -> None:
    for reply in (start(server, "far"), server.client.get("/api/v1/embeddings/models/download/far")):
        assert (reply.status_code, reply.json()["code"]) == (400, "invalid_value")
        assert reply.json()["detail"] == "the model 'far' runs at its provider 'api': there is nothing to download"
    assert start(server, "nobody/knows").status_code == 404


def test_a_server_that_downloads_ends_at_once(hub: Hub, held: threading.Event, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(json.dumps({"models": {"tiny": {"name": "acme/tiny"}}}))
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    flags = "--config", str(tmp_path / "models.yaml")
    with Server(*flags, command=("-m", "tests.scripted_models"), environment=environment) as server:
        start(server, "tiny")
        until(lambda: (download(server, "tiny")["percent"] or 0) > 50)
        assert server.stop(timeout=10) == 0
