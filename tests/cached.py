"""What servers with a cache say of themselves, and what their models were asked for."""

import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from tests.scripted import vector
from tests.server import Server


def embed(server: Server, *texts: str, **fields: object) -> httpx.Response:
    return server.embed(list(texts), model="toy", **fields)


def computed(server: Server) -> int:
    """Items that the model's batches had so far, those of the warm-up aside."""
    return int(metric(server, 'batch_items_sum{model="toy"}'))


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^mlx_embeddings_{re.escape(name)} (\S+)$", server.client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def cache(server: Server) -> dict[str, Any]:
    return dict(server.client.get("/health").json()["cache"])


def assert_right(reply: httpx.Response, *texts: str) -> None:
    """The vectors that the scripted model has for the texts, bit by bit."""
    assert reply.status_code == 200, reply.text
    rows = [np.array(each["embedding"], np.float32) for each in reply.json()["data"]]
    assert [row.tobytes() for row in rows] == [vector(text).tobytes() for text in texts]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
