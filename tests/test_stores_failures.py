"""Stores that are away, hang, are full, in use or not installed: what the caller is told, and how soon."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_embeddings_server.stores.base import CollectionExists, CollectionNotFound, StoreUnavailable
from mlx_embeddings_server.stores.opening import open_store
from mlx_embeddings_server.stores.store import VectorStore
from tests.stores import MINI, NO_QDRANT, OTHER, QDRANT_SERVER, ChromaServer, run, run_script, text, vector

CREATING = """
import asyncio, sys
from pathlib import Path
from mlx_embeddings_server.stores.base import CollectionExists
from mlx_embeddings_server.stores.opening import open_store
from tests.stores import MINI

async def create_all():
    store = open_store(sys.argv[1], Path(sys.argv[2]))
    await store.check()
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(15):
        try:
            await store.create("ada", f"wanted-{number}", MINI)
            print(number)
        except CollectionExists:
            pass
    store.close()

asyncio.run(create_all())
"""
FILLING = """
import asyncio, sys
from pathlib import Path
from mlx_embeddings_server.stores.base import StoreError
from mlx_embeddings_server.stores.opening import open_store
from tests.stores import MINI, text, vector

async def write(store, first):
    await store.upsert("ada", "notes", MINI, [text(n, words="many words " * 3000) for n in range(first, first + 10)])

async def fill():
    folder = Path(sys.argv[2])
    ballast = folder / "ballast"
    ballast.write_bytes(b"0" * 2_000_000)
    store = open_store(sys.argv[1], folder)
    await store.create("ada", "notes", MINI)
    acknowledged = 0
    try:
        while True:
            await write(store, acknowledged)
            acknowledged += 10
    except StoreError as error:
        print(type(error).__name__, error.status, error.message)
    writing = asyncio.gather(*(write(store, acknowledged) for _ in range(6)), return_exceptions=True)
    hits = [await store.query("ada", "notes", MINI, vector(n), n_results=1) for n in range(6)]
    print([each.document.id for [each] in hits] == [f"id-{n}" for n in range(6)])
    print({getattr(each, "status", 0) for each in await writing} <= {0, 507})
    ballast.unlink()
    ids = [f"id-{n}" for n in range(acknowledged)]
    for _ in range(2):
        print(len(await store.documents("ada", "notes", ids=ids)) == acknowledged > 0)
        await store.upsert("ada", "notes", MINI, [text(0, words="there is room again")])
        store.close()
        store = open_store(sys.argv[1], folder)
    store.close()

asyncio.run(fill())
"""


@contextmanager
def web_server(body: bytes, status: int, kind: str) -> Iterator[str]:
    """The URL of a server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def refused(store: VectorStore, within: float) -> list[str]:
    """The messages of all that needs the store, each of which comes in so many seconds."""
    messages = []
    for work in (
        store.upsert("ada", "notes", MINI, [text(2)]),
        store.query("ada", "notes", MINI, vector(1)),
        store.documents("ada", "notes"),
        store.stats("ada", "notes"),
        store.create("ada", "more", MINI),
        store.check(),
    ):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable) as raised:
            run(work)
        assert time.monotonic() - started < within
        assert raised.value.status == 503
        messages.append(raised.value.message)
    return messages


def test_a_chroma_server_that_goes_away_is_told_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    with ChromaServer(tmp_path / "server") as server, closing(open_store(server.url, tmp_path, timeout=2)) as store:
        run(store.create("ada", "notes", MINI))
        run(store.upsert("ada", "notes", MINI, [text(1)]))
        server.stop()
        assert all("Chroma does not answer" in message for message in refused(store, within=3))
        assert [each.name for each in run(store.all_of("ada"))] == ["notes"]  # which the catalog knows
        with server:
            assert run(store.documents("ada", "notes"))[0].id == "id-1"
            assert run(store.query("ada", "notes", MINI, vector(1)))[0].document.id == "id-1"
            with pytest.raises(CollectionNotFound):
                run(store.get("ada", "more"))


def test_a_chroma_server_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with ChromaServer(tmp_path / "server") as server:
        connected, unused = (open_store(server.url, tmp_path, timeout=0.7) for _ in range(2))
        with closing(connected), closing(unused):
            run(connected.create("ada", "notes", MINI))
            server.process.send_signal(signal.SIGSTOP)
            assert all("in time" in message for message in refused(connected, within=2))
            with pytest.raises(StoreUnavailable, match="in time"):
                run(unused.stats("ada", "notes"))

            async def ask() -> list[object]:
                return list(await asyncio.gather(*(connected.check() for _ in range(30)), return_exceptions=True))

            started = time.monotonic()
            refusals = [str(each) for each in run(ask())]
            assert time.monotonic() - started < 3 and "chroma is busy: try again later" in refusals

            async def write() -> list[object]:
                writing = (connected.upsert("ada", "notes", MINI, [text(number)]) for number in range(8))
                return list(await asyncio.gather(*writing, return_exceptions=True))

            started = time.monotonic()
            refusals = [str(each) for each in run(write())]
            assert time.monotonic() - started < 3 and any(
                "other writes of this collection" in each for each in refusals
            )
        server.process.send_signal(signal.SIGCONT)


def test_a_collection_deleted_while_the_store_is_away_is_gone_and_its_vectors_are_dropped_later(
    tmp_path: Path,
) -> None:
    with ChromaServer(tmp_path / "server") as server, closing(open_store(server.url, tmp_path, timeout=2)) as store:
        run(store.create("ada", "notes", MINI))
        server.stop()
        run(store.delete("ada", "notes"))
        assert run(store.all_of("ada")) == []
        with server:
            run(store.create("ada", "notes", OTHER))
            assert run(store.clean_up()) == 1
            assert run(store.stats("ada", "notes")).count == 0


@pytest.mark.parametrize(
    ("status", "kind", "body", "told"),
    [
        (200, "text/html", b"<h1>Welcome</h1>", "answers with status 200"),
        (502, "text/html", b"<h1>Bad gateway</h1>", "answers with status 502"),
        (200, "application/json", b"{}", "is no Chroma"),
        (200, "application/json", b"[]", "is no Chroma"),
        (404, "application/json", b'{"detail": "Not Found"}', "answers with status 404"),
        (301, "text/html", b"", "sends elsewhere"),
        (401, "application/json", b'{"error": "AuthError", "message": "no"}', "check collections_api_key"),
        (
            500,
            "application/json",
            b'{"error": "InternalError", "message": "broken"}',
            "Chroma failed: the server's log",
        ),
    ],
)
def test_what_is_no_chroma_is_told(tmp_path: Path, status: int, kind: str, body: bytes, told: str) -> None:
    with web_server(body, status, kind) as url, closing(open_store(url, tmp_path, timeout=2)) as store:
        with pytest.raises(StoreUnavailable, match=told):
            run(store.check())
        with pytest.raises(StoreUnavailable, match=told):
            run(store.create("ada", "notes", MINI))


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"<h1>Welcome</h1>", "is no Qdrant"),
        (200, b"[]", "is no Qdrant"),
        (200, b"{}", "is no Qdrant"),
        (502, b"<h1>Bad gateway</h1>", "status 502"),
        (401, b"", "check collections_api_key"),
        (429, b"", "asked too often"),
    ],
)
def test_what_is_no_qdrant_is_told(tmp_path: Path, status: int, body: bytes, told: str) -> None:
    with (
        web_server(body, status, "application/json") as url,
        closing(open_store(f"qdrant+{url}", tmp_path, timeout=2)) as store,
    ):
        for work in (store.check(), store.create("ada", "notes", MINI), store.clean_up()):
            with pytest.raises(StoreUnavailable, match=told):
                run(work)


def test_a_qdrant_server_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        closing(open_store(f"qdrant+http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, timeout=1)) as store,
        pytest.raises(StoreUnavailable, match="Qdrant does not answer in time"),
    ):
        run(store.check())


@pytest.mark.parametrize("kind", ["chroma", "qdrant"])
def test_a_collection_can_be_deleted_when_the_folder_is_gone(tmp_path: Path, kind: str) -> None:
    with closing(open_store(kind, tmp_path)) as store:
        run(store.create("ada", "notes", MINI))
        run(store.upsert("ada", "notes", MINI, [text(1)]))
        shutil.rmtree(tmp_path / kind / "index")
        run(store.delete("ada", "notes"))
        assert run(store.all_of("ada")) == []


def test_a_qdrant_server_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with closing(open_store("qdrant+http://127.0.0.1:9", tmp_path, timeout=2)) as store:
        with pytest.raises(StoreUnavailable, match="Qdrant does not answer"):
            run(store.create("ada", "notes", MINI))
        assert run(store.all_of("ada")) == []


@pytest.mark.skipif(not os.environ.get(QDRANT_SERVER), reason=NO_QDRANT)
def test_a_qdrant_server_is_among_the_stores_of_the_other_tests(tmp_path: Path) -> None:
    with closing(open_store(os.environ[QDRANT_SERVER], tmp_path)) as store:
        run(store.check())


def test_of_creations_in_two_processes_at_once_exactly_one_wins_each(tmp_path: Path) -> None:
    with ChromaServer(tmp_path / "server") as server:
        processes = [run_script(CREATING, server.url, str(tmp_path), stdin=subprocess.PIPE) for _ in range(2)]
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        said = [""] * 2

        def go_on(place: int) -> None:
            said[place], _ = processes[place].communicate("go\n", timeout=60)

        threads = [threading.Thread(target=go_on, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = [int(number) for each in said for number in each.split()]
        assert sorted(won) == list(range(15)), said
        with closing(open_store(server.url, tmp_path)) as store:
            assert len(run(store.all_of("ada"))) == 15 and run(store.clean_up(0)) == 0
            with pytest.raises(CollectionExists):
                run(store.create("ada", "wanted-3", MINI))


@pytest.mark.parametrize("kind", ["chroma", "qdrant"])
def test_a_full_disk_is_told_loses_nothing_and_is_no_more_when_there_is_room(tmp_path: Path, kind: str) -> None:
    """On a small file system of its own."""
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*mounting, f"mount -t tmpfs none {tmp_path}"]).returncode:
        pytest.skip("needs unshare, and user namespaces that may mount a tmpfs")
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(FILLING)
    command = f"mount -t tmpfs -o size=20m none {tmp_path} && {sys.executable} {script} {kind} {tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([*mounting, command], capture_output=True, text=True, timeout=60, env=environment)
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("StoreFull 507 the disk of the"), ended.stdout + ended.stderr
    assert lines[1:] == ["True"] * 4, ended.stdout + ended.stderr


def test_a_chroma_server_and_its_collections_belong_to_the_catalog_that_made_them(tmp_path: Path) -> None:
    """A second catalog on the same server sees and cleans up nothing of the first one's."""
    with ChromaServer(tmp_path / "server") as server:
        first, second = (open_store(server.url, tmp_path / name) for name in ("first", "second"))
        with closing(first), closing(second):
            run(first.create("ada", "notes", MINI))
            run(first.upsert("ada", "notes", MINI, [text(1)]))
            assert run(second.all_of("ada")) == [] and run(second.clean_up(0)) == 0
            run(second.create("ada", "notes", OTHER))
            run(second.delete("ada", "notes"))
            assert run(first.stats("ada", "notes")).count == 1


def test_dropped_vectors_of_an_embedded_chroma_leave_the_disk(tmp_path: Path) -> None:
    index = tmp_path / "chroma" / "index"
    with closing(open_store("chroma", tmp_path)) as store:
        for name in ("first", "second"):
            run(store.create("ada", name, MINI))
            run(store.upsert("ada", name, MINI, [text(number) for number in range(1500)]))
            run(store.query("ada", name, MINI, vector(1)))
        assert len([each for each in index.iterdir() if each.is_dir()]) == 2
        run(store.delete("ada", "first"))
        assert len([each for each in index.iterdir() if each.is_dir()]) == 1
        assert run(store.query("ada", "second", MINI, vector(77)))[0].document.id == "id-77"
