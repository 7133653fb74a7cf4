"""What each caller may have in a minute, counted by one server or by several together."""

import asyncio
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.ratelimit import WindowStorage
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.redis_server import PASSWORD, RedisServer, needs_redis
from tests.scripted import scripted_server
from tests.server import Server
from tests.test_access_tokens import SECRET, claims, signed

REQUESTS, TOKENS = 3, 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("limits")
    with scripted_server(folder, rate_limit_requests=REQUESTS, rate_limit_tokens=TOKENS) as server:
        yield server


def embed(server: Server, address: str, text: str = "hello", path: str = "/v1/embeddings") -> httpx.Response:
    """From an address that a proxy on this machine tells."""
    json = {"model": "toy", "input": text} if path != "/embed" else {"texts": [text]}
    return server.client.post(path, json=json, headers={"X-Forwarded-For": address})


def test_each_caller_has_so_many_requests_a_minute(server: Server) -> None:
    replies = [embed(server, "192.0.2.1") for _ in range(REQUESTS + 2)]

    assert [reply.status_code for reply in replies] == [200] * REQUESTS + [429] * 2
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0", "0"]
    error = replies[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    seconds = int(replies[-1].headers["retry-after"])
    assert 50 <= seconds <= 60 and f"{REQUESTS} requests a minute: try again in {seconds} s" in error["message"]
    assert embed(server, "192.0.2.2").status_code == 200


def test_work_is_limited_and_looking_is_not(server: Server) -> None:
    headers = {"X-Forwarded-For": "192.0.2.3"}
    for path in ("/v1/rerank", "/embed", "/api/v1/embeddings"):
        assert embed(server, "192.0.2.3", path=path).status_code in (200, 400)

    for path in ("/v1/embeddings", "/v1/embed_sparse", "/v1/rerank", "/v2/rerank", "/embed", "/", "/api/v1/rerank"):
        assert embed(server, "192.0.2.3", path=path).status_code == 429
    for path in ("/health", "/livez", "/readyz", "/metrics", "/", "/v1/models", "/v1/models/toy", "/api/v1/models"):
        assert server.client.get(path, headers=headers).status_code == 200
    assert server.client.post("/v1/models/toy/load", headers=headers).status_code == 200


def test_tokens_are_charged_after_the_reply_and_may_be_overdrawn_once(server: Server) -> None:
    first, second = embed(server, "192.0.2.4", "a b c"), embed(server, "192.0.2.4", "word " * TOKENS)

    refusal = embed(server, "192.0.2.4", "a")

    assert (first.headers["x-ratelimit-remaining-tokens"], second.headers["x-ratelimit-remaining-tokens"]) == (
        "17",
        "0",
    )
    assert (second.status_code, refusal.status_code) == (200, 429)
    assert f"{TOKENS} tokens a minute" in refusal.json()["error"]["message"]
    assert 50 <= int(refusal.headers["retry-after"]) <= 60


def test_tokens_count_of_a_client_that_leaves(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/v1/embeddings",
            json={"model": "toy", "input": "work 1 " + "a " * TOKENS},
            headers={"X-Forwarded-For": "192.0.2.77"},
            timeout=0.2,
        )
    while server.client.get("/health").json()["requests_in_flight"]:
        time.sleep(0.02)
    reply = embed(server, "192.0.2.77")
    assert reply.status_code == 429 and f"{TOKENS} tokens a minute" in reply.text


def test_a_request_that_is_refused_for_its_body_is_a_request(server: Server) -> None:
    statuses = [embed(server, "192.0.2.5", "").status_code for _ in range(REQUESTS + 1)]

    assert statuses == [400] * REQUESTS + [429]


def test_a_network_of_ipv6_is_one_caller(server: Server) -> None:
    statuses = [embed(server, f"2001:db8::{number}").status_code for number in range(REQUESTS + 1)]

    assert statuses == [200] * REQUESTS + [429]
    assert embed(server, "2001:db8:0:1::1").status_code == 200


def test_addresses_of_ipv4_within_ipv6_are_callers_each(server: Server) -> None:
    """As a socket that takes both kinds has them."""
    statuses = [embed(server, f"::ffff:192.0.2.{100 + number}").status_code for number in range(REQUESTS + 1)]

    assert statuses == [200] * (REQUESTS + 1)


def test_addresses_that_a_stranger_tells_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")
    monkeypatch.setenv("EMBEDDINGS_RATE_LIMIT", "on")
    with scripted_server(tmp_path, rate_limit_requests=2) as server:
        replies = [embed(server, f"192.0.2.{number}") for number in range(3)]

    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[0].headers["x-ratelimit-limit-tokens"] == "1000000"  # the default of what was turned on


@pytest.mark.parametrize(
    ("flags", "variable", "limits"),
    [
        ({}, "", None), ({}, "off", None), ({}, "on", ("600", "1000000")), ({}, "TRUE", ("600", "1000000")),
        ({"rate_limit": False}, "on", None), ({"rate_limit": True, "rate_limit_tokens": 0}, "", ("600", None)),
        ({"rate_limit_requests": 5}, "", ("5", None)), ({"rate_limit_requests": 5}, "off", None),
        ({"rate_limit_requests": 0, "rate_limit_tokens": 7}, "", (None, "7")),
    ],
)  # fmt: skip
def test_limits_are_on_where_they_were_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, object],
    variable: str,
    limits: tuple[str | None, str | None] | None,
) -> None:
    monkeypatch.setenv("EMBEDDINGS_RATE_LIMIT", variable)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    app = create_app(load_settings({"model": str(tmp_path), **flags}))

    found = app.state.runtime.rate_limits
    if limits is None:
        assert found is None
    else:
        headers = asyncio.run(found.admit("somebody"))
        assert (headers.get("X-RateLimit-Limit-Requests"), headers.get("X-RateLimit-Limit-Tokens")) == limits


def test_a_wrong_word_for_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_RATE_LIMIT", "perhaps")

    with pytest.raises(SettingsError, match="--rate-limit .* or EMBEDDINGS_RATE_LIMIT, .*valid boolean"):
        load_settings({"model": "m"})


def test_without_the_redis_package_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    settings = {"rate_limit_requests": 1, "rate_limit_storage": "redis://localhost:6379"}

    with pytest.raises(SettingsError, match="uv sync --extra redis"):
        create_app(load_settings({"model": "m", **settings}))


# Counters


def test_a_window_ends_a_minute_after_it_began() -> None:
    now = 0.0

    async def run() -> None:
        nonlocal now
        storage = WindowStorage(clock=lambda: now)
        assert [await storage.incr("a", 60), await storage.incr("a", 60, 5)] == [1, 6]
        now = 59.9
        assert (await storage.incr("a", 60), await storage.get_expiry("a")) == (7, 60.0)
        now = 60.1
        assert (await storage.get("a"), await storage.incr("a", 60)) == (0, 1)

    asyncio.run(run())


def test_ten_thousand_callers_take_little_memory_and_time_and_are_forgotten() -> None:
    now = 0.0

    async def count(storage: WindowStorage, callers: int) -> None:
        for number in range(callers):
            await storage.incr(f"requests/user:{'x' * 30}{number}/60/1/minute", 60)

    async def run() -> None:
        nonlocal now
        storage = WindowStorage(clock=lambda: now, most=20_000)
        tracemalloc.start()
        await count(storage, 10_000)
        of_ten_thousand = tracemalloc.get_traced_memory()[0]
        await count(storage, 40_000)
        tracemalloc.stop()
        assert of_ten_thousand < 10_000_000
        assert await storage.reset() == 20_000

        await count(storage, 10_000)
        started = time.perf_counter()
        await count(storage, 1000)
        assert time.perf_counter() - started < 1  # a storage that looks through all of them takes two
        now = 61.0
        await count(storage, 1)
        assert await storage.reset() == 1

    asyncio.run(run())


# Servers that count together


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as redis_server:
        yield redis_server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[tuple[Server, Server]]:
    """Two that tell callers apart by tokens."""
    settings: dict[str, Any] = {
        "jwt_secret": SECRET,
        "rate_limit_requests": REQUESTS,
        "rate_limit_storage": redis_server.url,
    }
    with (
        scripted_server(tmp_path_factory.mktemp("one"), **settings) as one,
        scripted_server(tmp_path_factory.mktemp("two"), **settings) as two,
    ):
        yield one, two


def client_of(server: Server, name: str, retries: int = 0) -> openai.OpenAI:
    token = signed({name: value for name, value in claims(sub=name).items() if name not in ("aud", "iss")})
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=retries, timeout=60)


@needs_redis
def test_servers_count_a_caller_together(pair: tuple[Server, Server]) -> None:
    with client_of(pair[0], "alice") as one, client_of(pair[1], "alice") as two, client_of(pair[1], "bob") as other:
        for client in (one, two, one):
            client.embeddings.create(model="toy", input="hello")
        for client in (one, two):
            with pytest.raises(openai.RateLimitError) as refused:
                client.embeddings.create(model="toy", input="hello")
            assert 50 <= int(refused.value.response.headers["retry-after"]) <= 60
        other.embeddings.create(model="toy", input="hello")


@needs_redis
def test_after_retry_after_the_official_client_is_served(
    pair: tuple[Server, Server], redis_server: RedisServer
) -> None:
    with client_of(pair[0], "carol", retries=1) as client:
        for _ in range(REQUESTS):
            client.embeddings.create(model="toy", input="hello")
        [key] = [key for key in redis_server.client.scan_iter() if "carol" in key]
        redis_server.client.expire(key, 3)  # in the place of a minute
        started = time.monotonic()
        client.embeddings.create(model="toy", input="hello")

    assert 2.5 < time.monotonic() - started < 20


@needs_redis
def test_while_redis_does_not_answer_each_server_counts_by_itself(
    pair: tuple[Server, Server], redis_server: RedisServer
) -> None:
    with client_of(pair[0], "dave") as client:
        client.embeddings.create(model="toy", input="hello")
        redis_server.hang()
        started = time.monotonic()
        try:
            for _ in range(REQUESTS):
                client.embeddings.create(model="toy", input="hello")
            with pytest.raises(openai.RateLimitError):
                client.embeddings.create(model="toy", input="hello")
            assert time.monotonic() - started < 4  # half a second, and what a busy machine adds
        finally:
            redis_server.go_on()
        time.sleep(5)
    with client_of(pair[0], "erin") as client:
        client.embeddings.create(model="toy", input="hello")
        pair[0].wait_for_log("answers again")

        redis_server.kill()
        client.embeddings.create(model="toy", input="hello")
        redis_server.start()
    assert pair[0].log.count("does not answer") == 2
    assert PASSWORD not in pair[0].log + pair[1].log and SECRET not in pair[0].log


@needs_redis
def test_a_redis_that_refuses_the_password_does_not_stop_the_server(tmp_path: Path, redis_server: RedisServer) -> None:
    url = redis_server.url.replace(PASSWORD, "a-wrong-password")
    with scripted_server(tmp_path, rate_limit_requests=REQUESTS, rate_limit_storage=url) as server:
        assert [embed(server, "192.0.2.1").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert "does not answer" in server.log and "a-wrong-password" not in server.log
