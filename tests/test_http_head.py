"""What comes before a body is bounded: nobody needs a key to send it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_embeddings_server.http_protocol import MAX_HEAD_BYTES
from tests.scripted import scripted_server


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=30) as connection:
        yield connection


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
