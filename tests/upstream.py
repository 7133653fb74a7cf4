"""An OpenAI-compatible API of a test's own, in threads of the test's process, that answers as its pages say."""

import base64
import json
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from tests.scripted import vector
from tests.server import Server

KEY = "sk-test-0123456789abcdef"


class Handler(BaseHTTPRequestHandler):
    """`/NAME/v1/embeddings` is answered by the page of that name."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the other side's word that the headers are there: 40 ms
    server: "_Server"

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path.split("/")[1]
        upstream = self.server.upstream
        with upstream.lock:
            upstream.requests[name].append(self.body)
            upstream.headers[name] = dict(self.headers)
            upstream.active += 1
            upstream.most_at_once = max(upstream.most_at_once, upstream.active)
        try:
            upstream.pages[name](self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client had enough
        finally:
            with upstream.lock:
                upstream.active -= 1

    do_GET = do_POST

    def reply(self, body: bytes | Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @property
    def inputs(self) -> list[Any]:
        return list(self.body["input"])

    def log_message(self, format: str, *args: Any) -> None:
        pass


Page = Callable[[Handler], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    upstream: "Upstream"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Upstream:
    """Its pages may be changed while it runs."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self.pages = dict(pages)
        self.requests: defaultdict[str, list[Any]] = defaultdict(list)
        self.headers: dict[str, dict[str, str]] = {}
        self.lock = threading.Lock()
        self.active = self.most_at_once = 0
        self.url = ""


@contextmanager
def upstream(pages: Mapping[str, Page], certificate: ssl.SSLContext | None = None) -> Iterator[Upstream]:
    found = Upstream(pages)
    with _Server(("127.0.0.1", 0), Handler) as server:
        server.upstream = found
        found.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
        if certificate is not None:
            server.socket = certificate.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def reply_of(rows: Sequence[NDArray[np.float32]], *, tokens: int | None = None) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()}
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": 3 * len(rows) if tokens is None else tokens}
    return {"object": "list", "data": data, "model": "m", "usage": usage}


def rows_of(inputs: Sequence[Any]) -> list[NDArray[np.float32]]:
    """tests.scripted's vectors: those of ids are of what Python writes for them."""
    return [vector(str(each)) for each in inputs]


def good(handler: Handler) -> None:
    handler.reply(reply_of(rows_of(handler.inputs)))


def always(body: bytes | Any, status: int = 200, **headers: str) -> Page:
    return lambda handler: handler.reply(body, status, **headers)


def first(*pages: Page) -> Page:
    """Each for one request, and the last for all that come then."""
    left = list(pages)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def hang(seconds: float = 30) -> Page:
    return lambda handler: time.sleep(seconds)


def vectors(reply: httpx.Response) -> NDArray[np.float32]:
    """Of a reply of /v1/embeddings. [inputs, dimensions]"""
    assert reply.status_code == 200, reply.text
    data = reply.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return np.array([each["embedding"] for each in data], dtype=np.float32)


def message(reply: httpx.Response, status: int, code: str) -> str:
    """Of an error that has to be that one."""
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text
    return str(reply.json()["error"]["message"])


def providers_server(
    folder: Path,
    providers: Mapping[str, Mapping[str, Any]],
    models: Mapping[str, Mapping[str, Any]],
    *flags: str,
    environment: Mapping[str, str] | None = None,
    **settings: Any,
) -> Server:
    """Those models, and beside them `toy`, which runs here (tests.scripted's, of 8 dimensions)."""
    toy = folder / "toy"
    toy.mkdir()
    (toy / "config.json").write_text('{"model_type": "bert"}')
    (toy / "script.json").write_text("{}")
    file = folder / "models.yaml"
    entries = {"toy": {"name": str(toy)}, **models}
    file.write_text(json.dumps({"providers": providers, "models": entries, **settings}))  # JSON is YAML
    return Server(
        "--config",
        str(file),
        *flags,
        command=("-m", "tests.scripted_models"),
        environment={"UP_KEY": KEY} | dict(environment or {}),
    )
