"""How a provider is asked that fails, hangs, or leaves things out, and who waits for it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.scripted import DIMENSIONS
from tests.server import Server
from tests.threaded import ThreadedServer
from tests.upstream import Handler, Upstream, always, good, hang, message, providers_server, reply_of, rows_of, upstream


def _without_usage(handler: Handler) -> None:
    body = reply_of(rows_of(handler.inputs))
    del body["usage"]
    handler.reply(body)


def _with_a_cookie(handler: Handler) -> None:
    handler.reply(reply_of(rows_of(handler.inputs)), Set_Cookie="session=of-another-caller; Path=/")


_PAGES: dict[str, Any] = {
    "hang": hang(20),
    "silent": _without_usage,
    "cookie": _with_a_cookie,
    "hurried": always(b"", 429, Retry_After="0"),
    "narrow": always(b"", 500),
    "refuse": always({"error": {"message": "no"}}, 400),
}


@pytest.fixture(scope="module")
def up() -> Iterator[Upstream]:
    with upstream(_PAGES) as found:
        yield found


@pytest.fixture(scope="module")
def here(up: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    providers: dict[str, Any] = {name: {"url": f"{up.url}/{name}/v1", "failure_threshold": 100} for name in _PAGES}
    providers["hang"] |= {"timeout": "1s"}
    providers["narrow"] |= {
        "timeout": "3s", "retries": 0, "max_in_flight": 1, "failure_threshold": 1, "recovery": "1s"
    }  # fmt: skip
    models: dict[str, Any] = {
        f"{name}-model": {"provider": name, "name": "m", "dimensions": DIMENSIONS} for name in _PAGES
    }
    del models["hang-model"]["dimensions"]
    with providers_server(tmp_path_factory.mktemp("here"), providers, models) as server:
        yield server


def test_who_waits_for_the_size_of_a_models_vectors_waits_for_one_answer(here: Server, up: Upstream) -> None:
    with ThreadPoolExecutor(6) as clients:
        replies = list(clients.map(here.embed, "abcdef", ["hang-model"] * 6))
    for reply in replies:
        assert "gave no answer in 1 s" in message(reply, 503, "provider_failed")
        assert reply.elapsed.total_seconds() < 2.5
    assert len(up.requests["hang"]) == 1


def test_where_no_tokens_are_told_some_are_counted(here: Server) -> None:
    usage = here.embed(["a" * 400, "b" * 1200], "silent-model").json()["usage"]
    assert usage == {"prompt_tokens": 400, "total_tokens": 400}
    assert here.embed([[1, 2, 3], [4, 5]], "silent-model").json()["usage"]["prompt_tokens"] == 5
    assert here.embed("a", "silent-model").json()["usage"]["prompt_tokens"] == 1


def test_cookies_are_not_kept(here: Server, up: Upstream) -> None:
    for text in "ab":
        assert here.embed(text, "cookie-model").status_code == 200
    assert len(up.requests["cookie"]) == 2 and "cookie" not in map(str.lower, up.headers["cookie"])


def test_who_asks_for_no_pause_is_given_one(here: Server, up: Upstream) -> None:
    reply = here.embed("a", "hurried-model")
    assert reply.status_code == 503 and len(up.requests["hurried"]) == 3
    assert reply.elapsed.total_seconds() > 0.7  # 0.25 and 0.5 s


def test_nobody_waits_for_the_one_that_tries(here: Server, up: Upstream) -> None:
    here.embed("a", "narrow-model")
    time.sleep(1.1)
    up.pages["narrow"] = hang(10)
    with ThreadPoolExecutor(5) as clients:
        trial = clients.submit(here.embed, "a", "narrow-model")
        while len(up.requests["narrow"]) < 2:
            time.sleep(0.02)
        others = list(clients.map(here.embed, "bcde", ["narrow-model"] * 4))
        assert not trial.done()
        assert "left alone" in message(others[0], 503, "provider_failed")
        assert max(reply.elapsed.total_seconds() for reply in others) < 1
        assert "gave no answer in 3 s" in message(trial.result(), 503, "provider_failed")


def test_only_what_is_the_providers_fault_counts_as_its_failure(here: Server) -> None:
    assert here.embed("a", "refuse-model").status_code == 400
    here.embed("a", "hurried-model")
    said = here.client.get("/metrics").text
    assert 'provider_request_seconds_count{provider="hurried",result="failed"}' in said
    assert 'provider_request_seconds_count{provider="refuse"' not in said


def test_at_the_drain_deadline_the_rest_is_told(up: Upstream, tmp_path: Path) -> None:
    providers = {"hang": {"url": f"{up.url}/hang/v1", "max_in_flight": 2}}
    models = {"far": {"provider": "hang", "name": "m", "dimensions": DIMENSIONS, "fallback": "toy"}}
    with providers_server(tmp_path, providers, models, drain_timeout=1) as server, ThreadPoolExecutor(4) as clients:
        replies = [clients.submit(server.embed, text, "far") for text in "abcd"]  # two have no turn
        while server.client.get("/health").json()["requests_in_flight"] < 4:
            time.sleep(0.02)
        assert server.stop() == 0
        for reply in replies:
            assert "shutting down" in message(reply.result(), 503, "shutting_down")
            assert reply.result().headers["x-request-id"]
        assert "Traceback" not in server.log


@pytest.mark.parametrize("entry", [{"models": ["m"]}, {"any_model": True}])
def test_a_server_may_have_other_servers_models_alone(up: Upstream, tmp_path: Path, entry: dict[str, Any]) -> None:
    up.pages["alone"] = good
    file = tmp_path / "models.yaml"
    file.write_text(f"providers: {{p: {{url: '{up.url}/alone/v1', {next(iter(entry))}: {[*entry.values()][0]}}}}}")
    with ThreadedServer(file) as server:
        assert server.embed("a", "p:m").status_code == 200
