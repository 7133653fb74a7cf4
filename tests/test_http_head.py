"""What comes before a body is bounded, and how long it takes: nobody needs a key to send it."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_embeddings_server.http_protocol import MAX_HEAD_BYTES
from tests.scripted import DIMENSIONS, ScriptedLoad, scripted_server
from tests.threaded import ThreadedServer


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=30) as connection:
        yield connection


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[ThreadedServer]:
    """It waits a second."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text('{"model_type": "bert"}')
    server = ThreadedServer(None, ScriptedLoad(""), model=[str(tmp_path / "toy")])
    server.keep_alive = 1
    with server:
        yield server


@pytest.mark.parametrize("beginning", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\n"])
def test_an_endless_head_is_cut_short(beginning: bytes, tmp_path: Path) -> None:
    part = b"Y: z\r\n" * 10_000 if beginning.endswith(b"\r\n") else b"a" * 60_000
    with scripted_server(tmp_path) as server, connected(server.url) as connection:
        before = psutil.Process(server.process.pid).memory_info().rss
        with pytest.raises(OSError):  # the server has closed it
            connection.sendall(beginning)
            for _ in range(1000):
                connection.sendall(part)
        assert psutil.Process(server.process.pid).memory_info().rss - before < 10e6
        assert server.embed("still there", "toy").status_code == 200


def test_the_answer_says_why_and_a_long_token_passes(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server:
        with connected(server.url) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (MAX_HEAD_BYTES + 1))
            assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
        headers = {"Authorization": f"Bearer {'a' * (MAX_HEAD_BYTES - 2000)}"}
        for _ in range(3):  # on one connection, whose heads are counted each by itself
            assert server.client.get("/livez", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("beginning", "part", "answer"),
    [
        (b"", b"", b""),
        (b"GET / HTTP/1.1\r\n", b"", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n", b"HTTP/1.1 408 "),
        (b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{", b"", b"HTTP/1.1 408 "),
        (b"GET /livez HTTP/1.1\r\n\r\nGET /livez HTTP/1.1\r\n", b"X: y\r\n", b"HTTP/1.1 408 "),
    ],
    ids=["nothing", "head", "slow head", "body", "second request"],
)
def test_a_client_that_does_not_go_on_is_left(
    beginning: bytes, part: bytes, answer: bytes, impatient: ThreadedServer
) -> None:
    with connected(impatient.url) as connection:
        began = time.monotonic()
        connection.sendall(beginning)
        said = b""
        connection.settimeout(0.3)
        while True:
            try:
                if not (more := connection.recv(1000)):
                    break
                said += more
            except TimeoutError:
                assert time.monotonic() - began < 10
                connection.sendall(part)
        assert time.monotonic() - began > 0.9
        assert said.rpartition(b"HTTP/1.1 ")[2].startswith(answer[9:]) and bool(said) == bool(answer)


def test_a_slow_body_and_a_long_computation_are_waited_for(impatient: ThreadedServer) -> None:
    body = b'{"model": "toy", "input": "work 2 a"}'
    head = b"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connected(impatient.url) as connection:
        connection.sendall(head)
        for start in range(0, len(body), 15):
            time.sleep(0.6)
            connection.sendall(body[start : start + 15])
        said = connection.recv(100_000)
        assert said.startswith(b"HTTP/1.1 200 ") and said.count(b",") >= DIMENSIONS
