"""Batches of many texts, beside which other requests are answered."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.cached import metric, until
from tests.scripted import scripted_server, vector
from tests.server import Server

# 30 words each: two make a batch of the scripted model.
SLOW = [f"work 0.05 {index} " + "word " * 27 for index in range(40)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted_server(tmp_path_factory.mktemp("batches"), max_queue_tokens=300) as server:
        yield server


def batch(server: Server, texts: list[str]) -> httpx.Response:
    return httpx.post(
        f"{server.url}/api/v1/embeddings/batch", json={"model": "toy", "texts": texts}, timeout=60, trust_env=False
    )


def embed(server: Server, input: str | list[str], path: str = "/v1/embeddings") -> httpx.Response:
    body = {"model": "toy", "input": input}
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, trust_env=False)


def waiting(server: Server) -> int:
    return int(server.client.get("/health").json()["models"][0]["queue"]["tokens"])


@pytest.mark.parametrize("route", ["batch", "embeddings"])
def test_a_short_request_does_not_wait_for_a_large_one(server: Server, route: str) -> None:
    with ThreadPoolExecutor() as pool:
        started = time.monotonic()
        large = pool.submit(batch if route == "batch" else embed, server, SLOW)
        until(lambda: waiting(server) > 0)
        reply = embed(server, "short")

        assert reply.status_code == 200, reply.text
        assert not large.done()
        queued = float(reply.headers["server-timing"].split("queue;dur=")[1].split(",")[0]) / 1000
        assert large.result().status_code == 200
    # Of 20 batches it waits for that which runs and those that wait, which are two at most.
    assert queued < (time.monotonic() - started) / 3


def test_large_requests_are_bounded_together_and_small_ones_beside_them(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(batch, server, SLOW)
        until(lambda: waiting(server) > 0)
        refused = batch(server, SLOW)
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert embed(server, "small").status_code == 200
        assert first.result().status_code == 200
    assert batch(server, SLOW).status_code == 200  # what was promised has been given back


def test_vectors_come_in_the_order_of_the_texts(server: Server) -> None:
    texts = [("a b c " * (index % 9 + 1)).strip() + f" {index}" for index in range(200)]
    reply = batch(server, texts + texts[:3])

    assert reply.status_code == 200
    np.testing.assert_array_equal(
        np.array(reply.json()["embeddings"], dtype=np.float32), [vector(text) for text in texts + texts[:3]]
    )


def test_a_text_that_fails_ends_its_batch_and_nothing_else(server: Server) -> None:
    before = metric(server, 'batch_items_sum{model="toy"}')
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(batch, server, ["fail " + "word " * 40, *SLOW[:8]])  # the longest, and so the first
        other = pool.submit(batch, server, ["of another"])
        assert (failing.result().status_code, failing.result().json()["code"]) == (500, "inference_failed")
        assert other.result().status_code == 200
    assert metric(server, 'batch_items_sum{model="toy"}') - before < 8
    assert batch(server, SLOW[:20]).status_code == 200


def test_a_client_that_leaves_takes_its_batch_along(server: Server) -> None:
    until(lambda: waiting(server) == 0)
    before = metric(server, 'batch_items_sum{model="toy"}')
    leaving = threading.Thread(target=_leave, args=(server,))
    leaving.start()
    leaving.join()
    time.sleep(0.6)  # seconds: it is looked for every quarter of one
    counted = metric(server, 'batch_items_sum{model="toy"}')
    time.sleep(0.5)
    assert metric(server, 'batch_items_sum{model="toy"}') == counted < before + len(SLOW)
    assert waiting(server) == 0
    assert batch(server, SLOW[:15]).status_code == 200


def _leave(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "toy", "texts": SLOW}
        httpx.post(f"{server.url}/api/v1/embeddings/batch", json=body, timeout=0.4, trust_env=False)


def test_a_worker_that_dies_under_a_batch_answers_it(tmp_path: Path) -> None:
    with scripted_server(tmp_path, reload="slow") as server:
        with ThreadPoolExecutor() as pool:
            dying = pool.submit(batch, server, ["die " + "word " * 40, *SLOW[:20]])
            health = server.client.get("/api/v1/embeddings/health")
            while health.status_code == 200 and not dying.done():
                health = server.client.get("/api/v1/embeddings/health")
            assert (health.status_code, health.json()["status"]) == (503, "degraded")
            assert (dying.result().status_code, dying.result().json()["code"]) == (503, "backend_lost")
        until(lambda: server.client.get("/readyz").status_code == 200)
        assert batch(server, SLOW[:10]).status_code == 200


def test_a_cache_that_is_off_is_empty(server: Server) -> None:
    cleared = server.client.delete("/api/v1/embeddings/cache")

    assert (cleared.status_code, cleared.json()["entries_removed"]) == (200, 0)
    assert "--cache" in cleared.json()["message"]
    stats = server.client.get("/api/v1/embeddings/health").json()["cache_stats"]
    assert stats == {"enabled": False, "size": 0, "max_size": 0, "ttl_seconds": 0}


def test_what_a_small_request_has_filled_up_is_bounded(server: Server) -> None:
    reply = httpx.post(
        f"{server.url}/api/v1/embeddings/batch",
        json={"model": "toy", "texts": ["a"] * 2049, "dimensions": 16_384},
        headers={"X-Embeddings-Dimensions-Policy": "pad"},
        timeout=60,
        trust_env=False,
    )

    message = "dimensions is 16384, the most that 2049 vectors are filled up to is 16376"
    assert (reply.status_code, reply.json()) == (400, {"detail": message, "code": "invalid_value"})
