"""Collections that are off, in use by another server, whose store goes away or is full: what the callers are told."""

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.scripted import scripted_server
from tests.scripted_models import load, models_file
from tests.server import Server
from tests.stores import ChromaServer
from tests.threaded import ThreadedServer

PLACES = ("/api/v1/embeddings/collections", "/v1/collections")


def refusal(reply: httpx.Response) -> tuple[int, str, str]:
    body = reply.json()
    if "detail" in body:
        return reply.status_code, body["code"], body["detail"]
    return reply.status_code, body["error"]["code"], body["error"]["message"]


def configured(folder: Path, **settings: Any) -> Path:
    """The file for --config of a server of the one model `toy`."""
    return models_file(folder, {"toy": {}}, **settings)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadedServer]:
    """Without collections."""
    with ThreadedServer(configured(tmp_path), load) as server:
        yield server


def test_where_they_are_off_it_is_told_how_to_turn_them_on(server: ThreadedServer) -> None:
    for place in PLACES:
        for method, path, body in (
            ("GET", "", None),
            ("POST", "", {"name": "notes"}),
            ("DELETE", "/notes", None),
            ("GET", "/notes/stats", None),
            ("GET", "/notes/documents", None),
            ("POST", "/notes/documents", {"documents": ["a"]}),
            ("DELETE", "/notes/documents?ids=a", None),
            ("POST", "/notes/query", {"query": "a"}),
        ):
            status, code, message = refusal(server.client.request(method, f"{place}{path}", json=body))
            assert (status, code) == (404, "collections_off") and "--collections chroma" in message
        assert place in server.client.get("/openapi.json").json()["paths"]
        assert place not in server.client.get("/").json()["endpoints"]
    assert "collections" not in server.client.get("/health").json()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"collections": "weaviate"}, "'weaviate' is no store; known: chroma, qdrant"),
        ({"collections": "http://"}, "no valid host and port"),
        ({"collections": "http://ada:secret@localhost:8000"}, "give the key as collections_api_key"),
        ({"collections": "chroma", "collections_path": "~nobody-of-that-name/x"}, "give the path of a folder"),
        ({"collections_path": "/tmp"}, "--collections-path is of use with --collections alone"),
        ({"collections_timeout": "3"}, "--collections-timeout is of use with --collections alone"),
        ({"collections": "chroma", "collections_timeout": "0"}, "--collections-timeout"),
    ],
)
def test_wrong_settings_are_told_at_the_start(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told) as raised:
        create_app(load_settings({"config": str(configured(tmp_path)), **settings}), load=load)
    assert "secret" not in str(raised.value)


def test_without_a_path_they_are_where_the_user_s_programs_keep_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with ThreadedServer(configured(tmp_path, collections="qdrant"), load):
        kept = tmp_path / "data" / "mlx-embeddings-server" / "collections" / "qdrant"
        assert (kept / "catalog.sqlite3").is_file() and kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("store", ["chroma", "qdrant"])
def test_a_second_server_is_told_that_the_store_is_in_use(tmp_path: Path, store: str) -> None:
    file = configured(tmp_path, collections=store, collections_path=str(tmp_path / "kept"))
    with ThreadedServer(file, load) as first:
        with pytest.raises(RuntimeError, match="did not start") as raised:
            Server("--config", str(file), command=("-m", "tests.scripted_models")).__enter__()
        assert f"another process uses {tmp_path / 'kept' / store}" in str(raised.value)
        assert first.client.get(PLACES[1]).json() == []
    with ThreadedServer(file, load) as second:  # once it has ended
        assert second.client.get(PLACES[1]).json() == []


def test_servers_share_a_store_by_url(tmp_path: Path) -> None:
    with ChromaServer(tmp_path / "chroma") as chroma:
        file = configured(tmp_path, collections=chroma.url, collections_path=str(tmp_path / "kept"))
        other = Server("--config", str(file), command=("-m", "tests.scripted_models"))
        with ThreadedServer(file, load) as first, other as second:
            clients = [first.client, second.client]
            body = {"name": "notes", "embedding_model": "toy"}
            with ThreadPoolExecutor(6) as pool:
                made = list(pool.map(lambda client: client.post(PLACES[1], json=body).status_code, clients * 3))
            assert sorted(made) == [201] + [409] * 5
            for number, client in enumerate(clients):
                document = {"id": str(number), "text": f"text {number}"}
                assert client.post(f"{PLACES[1]}/notes/documents", json={"documents": [document]}).is_success
            for number, client in enumerate(clients[::-1]):
                asked = {"query": f"text {number}", "n_results": 1}
                [best] = client.post(f"{PLACES[1]}/notes/query", json=asked).json()["results"]
                assert best["id"] == str(number)


def until(holds: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_store_that_goes_away_in_the_middle_is_told_and_comes_back(tmp_path: Path) -> None:
    chroma = ChromaServer(tmp_path / "chroma")
    settings = {"collections": chroma.url, "collections_path": str(tmp_path / "kept"), "collections_timeout": 5}
    # It need not be there when the server starts.
    with ThreadedServer(configured(tmp_path, **settings), load) as server, contextlib.ExitStack() as stack:
        client = server.client
        notes = f"{PLACES[1]}/notes"
        for reply in (
            client.post(PLACES[1], json={"name": "notes", "embedding_model": "toy"}),
            client.post(PLACES[0], json={"name": "notes", "embedding_model": "toy"}),
        ):
            assert refusal(reply)[:2] == (503, "store_unavailable")
        until(lambda: client.get("/health").json()["collections"]["state"] == "unavailable")
        stack.enter_context(chroma)
        assert client.post(PLACES[1], json={"name": "notes", "embedding_model": "toy"}).status_code == 201
        kept = [{"id": str(n), "text": f"text {n}"} for n in range(5)]
        assert client.post(f"{notes}/documents", json={"documents": kept}).is_success
        until(lambda: client.get("/health").json()["collections"]["state"] == "ok")
        replies: list[httpx.Response] = []

        def write() -> None:
            documents = [{"id": "late", "text": "work 2 seconds"}]
            replies.append(client.post(f"{notes}/documents", json={"documents": documents}))

        writing = threading.Thread(target=write)
        writing.start()
        time.sleep(0.7)  # it is being embedded
        chroma.stop()
        writing.join()
        replies += [
            client.post(f"{notes}/query", json={"query": "a"}),
            client.get(f"{notes}/documents"),
            client.get(f"{notes}/stats"),
            client.delete(f"{notes}/documents", params={"ids": "1"}),
        ]
        for reply in replies:
            status, code, message = refusal(reply)
            assert (status, code) == (503, "store_unavailable") and "127.0.0.1" not in message
        assert [each["name"] for each in client.get(PLACES[1]).json()] == ["notes"]
        assert server.embed("a text", model="toy").is_success
        assert client.get("/health").status_code == 200
        stack.enter_context(chroma)
        assert client.get(f"{notes}/stats").json()["count"] == 5
        assert client.post(f"{notes}/documents", json={"documents": ["late"]}).is_success
        [best] = client.post(f"{notes}/query", json={"query": "text 3", "n_results": 1}).json()["results"]
        assert best["id"] == "3"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder, and a command that runs others where it is a file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*mounting, f"mount -t tmpfs none {folder}"]).returncode:
        pytest.skip("needs unshare, and user namespaces that may mount a tmpfs")
    yield folder, [*mounting, f'mount -t tmpfs -o size=20m none {folder} && exec "$@"', "sh"]


@pytest.mark.parametrize("store", ["chroma", "qdrant"])
def test_a_full_disk_is_told_and_what_was_acknowledged_stays(
    tmp_path: Path, small_disk: tuple[Path, list[str]], store: str
) -> None:
    folder, mounted = small_disk
    server = scripted_server(tmp_path, collections=store, collections_path=folder / "kept")
    server.command = [*mounted, *server.command]
    with server:
        client, notes = server.client, f"{PLACES[0]}/notes"
        assert client.post(PLACES[0], json={"name": "notes", "embedding_model": "toy"}).status_code == 201
        large, acknowledged = "large " * 100_000, 0
        for number in range(60):
            reply = client.post(f"{notes}/documents", json={"documents": [{"id": str(number), "text": large}]})
            if not reply.is_success:
                break
            acknowledged += 1
        status, code, message = refusal(reply)
        assert (status, code) == (507, "store_full") and "make room" in message and str(folder) not in message
        assert acknowledged > 3
        ids = [str(number) for number in range(acknowledged)]
        shown = client.get(f"{notes}/documents", params={"ids": ids, "include": "metadata"}).json()["documents"]
        assert [each["id"] for each in shown] == ids
        assert server.embed("a text", model="toy").is_success


def test_what_a_key_is_for_is_in_no_log(tmp_path: Path) -> None:
    key = "a-secret-of-the-store"
    with ChromaServer(tmp_path / "chroma") as chroma:
        settings: dict[str, Any] = {"collections": chroma.url, "collections_api_key": key}
        settings |= {"collections_path": tmp_path / "kept"}
        with scripted_server(tmp_path, access_log=True, **settings) as server:
            assert server.client.post(PLACES[1], json={"name": "notes", "embedding_model": "toy"}).status_code == 201
            assert key not in server.log and key not in server.client.get("/health").text
