"""A server under load, left by its clients, told to end, and one whose model or worker fails: all over HTTP."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from tests.scripted import scripted_server, vector
from tests.server import ALL_THREADS, MINILM, Server

PATIENCE = 60.0  # seconds: far more than anything here takes on a machine that has other things to do


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=80) as pool:
        yield pool


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to this in time"
        time.sleep(0.02)


def health(server: Server) -> dict[str, Any]:
    return dict(server.client.get("/health").json())


def waiting(server: Server) -> int:
    return int(health(server)["models"][0]["queue"]["items"])


def metric(server: Server, name: str, labels: str) -> float:
    text = server.client.get("/metrics").text
    found = re.search(rf"^mlx_embeddings_{name}{{{re.escape(labels)}}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def answered(server: Server, status: int) -> float:
    return metric(server, "requests_total", f'method="POST",route="/v1/embeddings",status="{status}"')


def rows(reply: httpx.Response) -> np.ndarray[Any, np.dtype[np.float64]]:
    assert reply.status_code == 200, reply.text
    return np.array([each["embedding"] for each in reply.json()["data"]])


def error(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def hold(server: Server, threads: ThreadPoolExecutor, seconds: float = 1.5) -> Future[httpx.Response]:
    """Keep the worker busy: what comes next has to wait."""
    before = metric(server, "batch_items_count", 'model="toy"')
    busy = threads.submit(server.embed, f"work {seconds}", "toy")
    until(lambda: health(server)["requests_in_flight"] == 1 and waiting(server) == 0)
    assert metric(server, "batch_items_count", 'model="toy"') == before, "the machine was too slow for this test"
    return busy


def post(server: Server, body: dict[str, Any], *, announced: int = 0) -> socket.socket:
    """A request whose client can leave. `announced`: bytes of the body that are promised and not sent."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port or 0))
    content = json.dumps(body).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content) + announced}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.fixture(scope="module", autouse=True)
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[Future[httpx.Response]]]]:
    """A server that tries in vain to load its model again, and the requests that wait for that.

    It gives up after 21 seconds, almost all of them pauses: the other tests run meanwhile.
    """
    server = scripted_server(tmp_path_factory.mktemp("dying"), reload="fails", drain_timeout=1)
    with ThreadPoolExecutor() as threads, server:
        hold(server, threads)
        yield server, [threads.submit(server.embed, text, "toy") for text in ("innocent", "die now")]


# Queue full


def test_beyond_the_queues_bound_requests_are_refused_and_the_others_are_right(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    texts = [f"work 0.01 text {number}" for number in range(60)]
    with scripted_server(tmp_path, max_queue_tokens=40, max_batch_tokens=8) as server:
        hold(server, threads)
        replies = list(threads.map(lambda text: server.embed(text, "toy"), texts))

        refused = [reply for reply in replies if reply.status_code == 429]
        assert 40 <= len(refused) < 60  # four tokens each: ten wait, and what is taken meanwhile
        for reply in refused:
            assert re.fullmatch(r"[1-9]\d*", reply.headers["retry-after"])
            body = reply.json()["error"]
            assert set(body) == {"message", "type", "param", "code"}
            assert (body["type"], body["code"]) == ("rate_limit_error", "queue_full")
        for text, reply in zip(texts, replies, strict=True):
            if reply.status_code != 429:
                assert_allclose(rows(reply)[0], vector(text), rtol=1e-6)
        assert answered(server, 429) == len(refused)

        # The official client comes back by itself.
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20) as client:
            hold(server, threads)
            served = threads.map(lambda text: client.embeddings.create(model="toy", input=text), texts[:24])
            for text, each in zip(texts, served, strict=False):
                assert_allclose(each.data[0].embedding, vector(text), rtol=1e-6)
        assert answered(server, 429) > len(refused)


def test_a_request_larger_than_the_bound_is_served_when_nothing_waits(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    large = [f"one of many {number}" for number in range(40)]
    with scripted_server(tmp_path, max_queue_tokens=40, max_batch_tokens=8) as server:
        assert_allclose(rows(server.embed(large, "toy")), np.stack([vector(text) for text in large]), rtol=1e-6)

        busy = hold(server, threads)
        small = threads.submit(server.embed, "small", "toy")
        until(lambda: waiting(server) == 1)
        assert error(server.embed(large, "toy")) == (429, "queue_full")
        assert [each.result().status_code for each in (busy, small)] == [200, 200]


# Clients who leave


def test_the_work_of_clients_who_left_is_not_done(tmp_path: Path) -> None:
    texts = [f"work 0.2 text {number}" for number in range(200)]
    with scripted_server(tmp_path, max_batch_tokens=8) as server:
        heavy = [post(server, {"model": "toy", "input": texts}) for _ in range(5)]  # 200 seconds of work
        until(lambda: waiting(server) > 950)
        for connection in heavy:
            connection.close()
        left_at = time.monotonic()
        assert_allclose(rows(server.embed("stays", "toy"))[0], vector("stays"), rtol=1e-6)
        until(lambda: waiting(server) == 0)
        assert time.monotonic() - left_at < 20
        until(lambda: answered(server, 499) == 5)
        assert health(server)["requests_in_flight"] == 0
        assert "rror" not in server.log


def test_a_client_who_leaves_while_it_sends_is_no_error_of_ours(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server:
        connection = post(server, {"model": "toy", "input": "a"}, announced=1000)
        until(lambda: health(server)["requests_in_flight"] == 1)
        connection.close()
        until(lambda: answered(server, 499) == 1)
        assert "rror" not in server.log


@pytest.fixture(scope="module")
def real() -> Iterator[Server]:
    """all-MiniLM-L6-v2 on all threads. The last test that uses it ends it."""
    with Server("--model", MINILM, "--dtype", "float32", environment=ALL_THREADS) as server:
        yield server


def test_a_real_models_server_answers_while_it_works_and_drops_what_nobody_waits_for(real: Server) -> None:
    texts = [f"{number} " + "word " * 200 for number in range(512)]  # half a minute of work
    with post(real, {"model": MINILM, "input": texts}):
        until(lambda: waiting(real) > 0)
        assert metric(real, "queue_items", f'model="{MINILM}"') > 0
        assert metric(real, "queue_tokens", f'model="{MINILM}"') > 200
        for _ in range(10):
            asked_at = time.monotonic()
            assert real.client.get("/health").status_code == 200
            assert time.monotonic() - asked_at < 1
            time.sleep(0.1)
        assert waiting(real) > 0, "the work was too little for this test"
    until(lambda: waiting(real) == 0, 5)
    assert metric(real, "queue_tokens", f'model="{MINILM}"') == 0


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_what_is_in_flight_is_answered_and_nothing_else(
    tmp_path: Path, threads: ThreadPoolExecutor, number: signal.Signals
) -> None:
    texts = [f"work 0.1 text {number}" for number in range(24)]
    with scripted_server(tmp_path, max_batch_tokens=4) as server, httpx.Client(base_url=server.url) as open_connection:
        replies = [threads.submit(server.embed, text, "toy") for text in texts]
        until(
            lambda: (
                open_connection.get("/health").json()["requests_in_flight"] + sum(reply.done() for reply in replies)
                == len(replies)
            )
        )
        server.process.send_signal(number)

        until(lambda: open_connection.get("/health").status_code == 503)
        assert open_connection.get("/health").json()["status"] == "draining"
        assert open_connection.get("/readyz").status_code == 503
        assert open_connection.get("/livez").status_code == 200
        late = open_connection.post("/v1/embeddings", json={"model": "toy", "input": "late"})
        assert error(late) == (503, "shutting_down")

        for text, reply in zip(texts, replies, strict=True):
            assert_allclose(rows(reply.result(PATIENCE))[0], vector(text), rtol=1e-6)
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.log


def test_a_real_models_server_ends_cleanly_under_load(real: Server, threads: ThreadPoolExecutor) -> None:
    requests = [[f"{request} {place} " + "word " * 200 for place in range(3)] for request in range(24)]
    alone = rows(real.embed(requests[-1]))
    replies = [threads.submit(real.embed, texts) for texts in requests]
    until(lambda: health(real)["requests_in_flight"] + sum(reply.done() for reply in replies) == len(replies))
    assert not all(reply.done() for reply in replies), "the work was too little for this test"
    assert real.stop() == 0
    vectors = [rows(reply.result(PATIENCE)) for reply in replies]
    assert_allclose(vectors[-1], alone, atol=1e-5)
    assert "Traceback" not in real.log and "leaked" not in real.log


@pytest.mark.parametrize("seconds", [0.2, 60], ids=["short batches", "a batch that does not end"])
def test_at_the_drain_deadline_the_rest_is_told_and_the_server_ends(
    tmp_path: Path, threads: ThreadPoolExecutor, seconds: float
) -> None:
    texts = [f"work {seconds} text {number}" for number in range(300)]
    with scripted_server(tmp_path, max_batch_tokens=4, drain_timeout=1) as server:
        replies = [threads.submit(server.embed, texts[start::4], "toy") for start in range(4)]
        until(lambda: health(server)["requests_in_flight"] == 4)
        told_at = time.monotonic()
        assert server.stop() == 0
        assert 1 <= time.monotonic() - told_at < 15
        assert {error(reply.result(PATIENCE)) for reply in replies} == {(503, "backend_lost")}
        assert "4 requests were not finished within --drain-timeout" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(
    tmp_path: Path, threads: ThreadPoolExecutor, second: signal.Signals, status: int
) -> None:
    with scripted_server(tmp_path) as server:
        unfinished = threads.submit(server.embed, "work 100", "toy")
        until(lambda: health(server)["requests_in_flight"] == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: health(server)["status"] == "draining")
        server.process.send_signal(second)
        assert server.process.wait(10) == status
        assert isinstance(unfinished.exception(PATIENCE), httpx.TransportError)


# One bad item


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny BERT to which `moon` is NaN, and `##ness` a token that its embedding table does not reach."""
    from tests.checkpoints import bare_encoder, tokenizer

    vocabulary = tokenizer("bert").get_vocab()
    assert vocabulary["##ness"] == len(vocabulary) - 1
    folder = bare_encoder(tmp_path_factory.mktemp("models") / "poisoned", vocab_size=len(vocabulary) - 1)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][vocabulary["moon"]] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Server("--model", str(folder), "--dtype", "float32") as server:
        yield server


@pytest.mark.parametrize(
    ("text", "code"), [("the moon is small", "non_finite_vector"), ("a quick sunness", "inference_failed")]
)
def test_only_the_request_with_the_bad_item_fails(
    poisoned: Server, threads: ThreadPoolExecutor, text: str, code: str
) -> None:
    good = [f"the {word} and a {number}" for number, word in enumerate(["river", "stone", "light", "house"] * 6)]
    alone = [rows(poisoned.embed(each, "poisoned"))[0] for each in good]
    # What waits behind a long request is taken together.
    long = threads.submit(poisoned.embed, [f"{number} " + "river " * 40 for number in range(1500)], "poisoned")
    until(lambda: waiting(poisoned) > 0)
    replies = list(threads.map(lambda each: poisoned.embed(each, "poisoned"), [*good[:12], text, *good[12:]]))

    bad = replies.pop(12)
    assert error(bad) == (500, code)
    assert_allclose([rows(reply)[0] for reply in replies], alone, atol=1e-5)
    assert long.result().status_code == 200
    # In one request with others it fails that request, and leaves nothing behind.
    assert error(poisoned.embed([good[0], text, good[1]], "poisoned")) == (500, code)
    assert waiting(poisoned) == 0 and health(poisoned)["status"] == "ok"


# The worker's death


@pytest.mark.parametrize("killer", ["die now", "lost now"])
def test_after_the_workers_death_the_innocent_are_answered(
    tmp_path: Path, threads: ThreadPoolExecutor, killer: str
) -> None:
    texts = [f"innocent {number}" for number in range(6)]
    with scripted_server(tmp_path, reload="slow") as server:
        hold(server, threads)
        innocents = [threads.submit(server.embed, text, "toy") for text in texts]
        killing = threads.submit(server.embed, killer, "toy")
        until(lambda: waiting(server) == 7)

        until(lambda: health(server)["status"] == "unavailable")
        reply = server.client.get("/health")
        assert reply.status_code == 503
        model = reply.json()["models"][0]
        assert model["state"] == "restarting" and model["reason"].isidentifier() and model["restarts"] == 1
        assert server.client.get("/livez").status_code == 200
        assert error(server.embed("meanwhile", "toy")) == (503, "backend_lost")

        for text, innocent in zip(texts, innocents, strict=True):
            assert_allclose(rows(innocent.result(PATIENCE))[0], vector(text), rtol=1e-6)
        assert error(killing.result(PATIENCE)) == (503, "backend_lost")
        until(lambda: health(server)["status"] == "ok")
        assert health(server)["models"][0]["restarts"] == 2  # for the batch, and for the killer alone
        assert_allclose(rows(server.embed("after", "toy"))[0], vector("after"), rtol=1e-6)


def test_a_worker_that_cannot_load_again_is_dead_and_says_so(
    dying: tuple[Server, list[Future[httpx.Response]]], threads: ThreadPoolExecutor
) -> None:
    server, caught = dying
    assert {error(each.result(PATIENCE)) for each in caught} == {(503, "backend_lost")}

    assert server.client.get("/livez").status_code == 503
    reply = server.client.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")
    assert reply.json()["models"][0]["reason"] == "RuntimeError"
    assert "the device is still gone" in server.log
    late = threads.submit(server.embed, "late", "toy")
    assert error(late.result(5)) == (503, "backend_lost")
    assert server.stop() == 0
