"""The cache over HTTP: what was computed comes back as it was, without the model; what was not is computed once."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.cached import assert_right, cache, computed, embed, metric, until
from tests.scripted import scripted_server
from tests.server import MINILM, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted_server(tmp_path_factory.mktemp("model"), cache="yes", truncate="end") as server:
        yield server


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_what_was_computed_is_not_computed_again(server: Server) -> None:
    first, before = embed(server, "once"), computed(server)
    second = embed(server, "once")
    assert computed(server) == before
    assert second.json() == first.json()
    assert_right(second, "once")
    assert second.headers["Server-Timing"] == "tokenize;dur=0.00, queue;dur=0.00, inference;dur=0.00"


def test_only_what_is_lacking_is_computed_and_the_order_is_that_of_the_inputs(server: Server) -> None:
    embed(server, "order b", "order d")
    before = computed(server)
    texts = ["order a", "order b", "order a", "order c", "order d", "order b"]
    assert_right(embed(server, *texts), *texts)
    assert computed(server) == before + 2


def test_one_entry_serves_all_forms_of_a_vector(server: Server) -> None:
    embed(server, "forms")
    before = computed(server)
    for fields in ({"dimensions": 4}, {"normalize": True}, {"encoding_format": "base64"}, {"output_dtype": "int8"}):
        assert embed(server, "forms", **fields).status_code == 200
    assert_right(embed(server, "forms"), "forms")
    assert computed(server) == before


@pytest.mark.parametrize("fields", [{"prompt": "query: "}, {"input_type": "query"}, {"truncate": "start"}])
def test_what_changes_the_vector_is_computed_by_itself(server: Server, fields: dict[str, str]) -> None:
    embed(server, "other")
    before = computed(server)
    embed(server, "other", **fields)
    assert computed(server) == before + 1


def test_reranking_finds_what_was_embedded_as_the_same(server: Server) -> None:
    embed(server, "passage one", "passage two", input_type="document")
    before = computed(server)
    body = {"model": "toy", "query": "question", "documents": ["passage two", "passage one", "passage two"]}
    first = server.client.post("/v1/rerank", json=body)
    assert first.status_code == 200 and computed(server) == before + 1
    second = server.client.post("/v1/rerank", json=body)
    assert second.json() == first.json() and computed(server) == before + 1


def test_concurrent_requests_for_one_input_compute_it_once(server: Server, threads: ThreadPoolExecutor) -> None:
    before, joined = computed(server), cache(server)["joined"]
    text = "work 0.5 together"
    replies = list(threads.map(lambda number: embed(server, text, f"alone {number}"), range(8)))
    for number, reply in enumerate(replies):
        assert_right(reply, text, f"alone {number}")
    assert computed(server) == before + 1 + 8
    assert cache(server)["joined"] == joined + 7


def test_a_failing_computation_fails_nobody_who_waits_for_another_part_of_it(
    server: Server, threads: ThreadPoolExecutor
) -> None:
    leading = threads.submit(embed, server, "work 0.5 shared", "fail at the end")
    time.sleep(0.1)
    waiting = [threads.submit(embed, server, "work 0.5 shared") for _ in range(3)]
    assert leading.result().json()["error"]["code"] == "inference_failed"
    for each in waiting:
        assert_right(each.result(), "work 0.5 shared")


def test_an_error_is_not_kept_and_everybody_gets_their_own(server: Server, threads: ThreadPoolExecutor) -> None:
    for _ in range(2):
        replies = threads.map(lambda _: embed(server, "fail by itself"), range(3))
        assert {reply.json()["error"]["code"] for reply in replies} == {"inference_failed"}
    assert embed(server, "nan").json()["error"]["code"] == "non_finite_vector"
    assert embed(server, "nan").json()["error"]["code"] == "non_finite_vector"


def test_when_the_first_client_leaves_the_others_compute_the_input_once(
    server: Server, threads: ThreadPoolExecutor
) -> None:
    busy = threads.submit(embed, server, "work 1.5 busy")  # so that the first client's input has not begun when it goes
    time.sleep(0.1)
    before = computed(server)

    def leave() -> None:
        body = {"model": "toy", "input": "work 0.2 left"}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=0.4, trust_env=False)

    leaving = threads.submit(leave)
    time.sleep(0.2)
    waiting = [threads.submit(embed, server, "work 0.2 left") for _ in range(3)]
    leaving.result()
    for each in waiting:
        assert_right(each.result(), "work 0.2 left")
    assert_right(busy.result(), "work 1.5 busy")
    assert computed(server) == before + 2


def test_a_client_that_leaves_while_it_waits_takes_nothing_from_the_one_that_it_waited_for(
    server: Server, threads: ThreadPoolExecutor
) -> None:
    first = threads.submit(embed, server, "work 1.2 stays")
    time.sleep(0.2)
    with pytest.raises(httpx.TimeoutException):
        body = {"model": "toy", "input": "work 1.2 stays"}
        httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=0.2, trust_env=False)
    assert_right(first.result(), "work 1.2 stays")


def test_health_and_metrics_count_the_same(server: Server) -> None:
    embed(server, "counted")
    before, kept = cache(server), metric(server, "cache_entries")
    embed(server, "counted", "counted too")
    after = cache(server)
    assert (after["hits"], after["misses"], after["size"]) == (before["hits"] + 1, before["misses"] + 1, kept + 1)
    assert (after["max_size"], after["ttl_seconds"], after["max_bytes"]) == (5000, 3600, 512_000_000)
    assert metric(server, "cache_entries") == after["size"]
    assert metric(server, "cache_bytes") == after["bytes"] > 32 * after["size"]
    assert metric(server, 'cache_hits_total{layer="memory"}') == after["layers"]["memory"]["hits"]
    assert metric(server, 'cache_misses_total{layer="memory"}') == after["layers"]["memory"]["misses"]


def test_hits_are_answered_while_the_queue_is_full(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with scripted_server(tmp_path, cache="yes", max_queue_tokens=4) as server:
        embed(server, "known", "known too")
        running = threads.submit(embed, server, "work 2 runs")
        until(lambda: computed(server) >= 2 and cache(server)["misses"] == 3)
        time.sleep(0.2)
        waiting = threads.submit(embed, server, "a b c d")
        until(lambda: metric(server, 'queue_tokens{model="toy"}') == 4)
        assert embed(server, "unknown").status_code == 429
        assert embed(server, "known", "unknown").status_code == 429
        assert_right(embed(server, "known too", "known"), "known too", "known")
        assert running.result().status_code == waiting.result().status_code == 200


def test_entries_are_bounded_in_number_and_the_least_recently_used_go(tmp_path: Path) -> None:
    with scripted_server(tmp_path, cache="yes", cache_entries=2, cache_ttl="2s") as server:
        embed(server, "a", "b")
        embed(server, "a")
        embed(server, "c")
        assert cache(server)["size"] == 2
        before = computed(server)
        embed(server, "a", "c")
        assert computed(server) == before
        embed(server, "b")
        assert computed(server) == before + 1
        time.sleep(2.1)
        assert cache(server)["size"] == 0
        assert_right(embed(server, "b"), "b")
        assert computed(server) == before + 2


def test_entries_are_bounded_in_bytes(tmp_path: Path) -> None:
    with scripted_server(tmp_path, cache="yes", cache_bytes=2000) as server:
        texts = [str(number) for number in range(50)]
        for text in texts:
            assert_right(embed(server, text), text)
            assert cache(server)["bytes"] <= 2000
        assert cache(server)["size"] == 3
        before = computed(server)
        embed(server, *texts[-3:])
        assert computed(server) == before


def test_a_value_larger_than_the_bound_is_answered_and_not_kept(tmp_path: Path) -> None:
    with scripted_server(tmp_path, cache="yes", cache_bytes=600) as server:
        for count in (1, 2):
            assert_right(embed(server, "large"), "large")
            assert (computed(server), cache(server)["size"]) == (count, 0)


def test_without_the_setting_nothing_is_kept(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server:
        embed(server, "twice")
        embed(server, "twice")
        assert computed(server) == 2
        assert "cache" not in server.client.get("/health").json()
        assert "cache" not in server.client.get("/metrics").text


def test_of_a_real_model_hits_are_the_bits_of_misses() -> None:
    texts = ["The weather is lovely today.", "word " * 400, "wörd", "A stadium."]
    fields = {"truncate": "end", "encoding_format": "base64"}
    with Server("--model", MINILM, "--cache") as server:
        first = server.embed(texts, **fields)
        assert first.json()["usage"]["truncated_inputs"] == [1]
        assert server.embed(texts, **fields).json() == first.json()
        mixed = server.embed([texts[3], "another text", texts[1]], **fields).json()
        data = first.json()["data"]
        assert [mixed["data"][place]["embedding"] for place in (0, 2)] == [data[3]["embedding"], data[1]["embedding"]]
        assert mixed["usage"]["truncated_inputs"] == [2]
        assert_errors_name_the_inputs_as_the_request_has_them(server)


def assert_errors_name_the_inputs_as_the_request_has_them(server: Server) -> None:
    """Where some of them are kept, and some of them are equal."""
    too_long = ["short", "word " * 300, "A stadium.", "word " * 400, "word " * 300]
    server.embed(["A stadium."])
    server.client.post("/v1/rerank", json={"model": MINILM, "query": "q", "documents": ["A stadium."]})
    ranked = server.client.post("/v1/rerank", json={"model": MINILM, "query": "q", "documents": too_long})
    for reply, field in ((server.embed(too_long), "input"), (ranked, "documents")):
        error = reply.json()["error"]
        assert error["code"] == "input_too_long" and error["message"].startswith(f"{field}[1] ")
        assert [each["index"] for each in error["details"]] == [1, 3, 4]
