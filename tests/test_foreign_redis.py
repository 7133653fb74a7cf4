"""What answers at the URL of a Redis and is none costs no request."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.scripted import ScriptedLoad
from tests.threaded import ThreadedServer


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The URL of a server that answers all that it is sent so."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while said := self.request.recv(65536):
                self.request.sendall(answer * max(1, said.count(b"*")))

    class Answering(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Answering(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "answer", [b"+OK\r\n", b":abc\r\n", b"$-5\r\n", b"*1\r\n$1\r\nx\r\n", b"HTTP/1.1 400 Bad\r\n\r\n"]
)
def test_what_is_no_redis_is_left_alone(answer: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text('{"model_type": "bert"}')
    with answering(answer) as url:
        settings = {
            "rate_limit_tokens": 100, "rate_limit_requests": 100, "rate_limit_storage": url,
            "cache": True, "cache_url": url, "cache_entries": 1,
        }  # fmt: skip
        with ThreadedServer(None, ScriptedLoad(""), model=[str(tmp_path / "toy")], **settings) as server:
            for text in ("a", "b", "a"):
                reply = server.embed(text, "toy")
                assert reply.status_code == 200, reply.text
    assert "rate limits are counted here" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rate_limit_tokens": "5", "rate_limit_storage": "redis://localhost:6379/0?foo=1"}, "--rate-limit-storage"),
        ({"cache": "true", "cache_url": "redis://localhost:6379/0?foo=1"}, "--cache-url"),
        ({"cache": "true", "cache_url": "redis://localhost:6379/0?decode_responses=true"}, "--cache-url"),
    ],
)
def test_options_that_do_not_fit_are_told_at_the_start(settings: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        create_app(load_settings({"model": "m", **settings}))
