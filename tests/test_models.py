"""Models that come and go: loaded when first asked for, unloaded when idle or to make room, failing alone."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from mlx_embeddings_server.found import Found
from mlx_embeddings_server.registry import ModelSpec
from tests.conftest import DATA
from tests.scripted import vector
from tests.scripted_models import loads, models_server
from tests.server import MINILM, Server

PATIENCE = 60.0  # seconds


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=40) as pool:
        yield pool


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to this in time"
        time.sleep(0.02)


def state(server: Server, name: str) -> str:
    [found] = [each for each in server.client.get("/health").json()["models"] if each["id"] == name]
    return str(found["state"])


def is_right(reply: httpx.Response, text: str) -> bool:
    return reply.status_code == 200 and np.allclose(reply.json()["data"][0]["embedding"], vector(text), atol=1e-6)


def error_of(reply: httpx.Response) -> dict[str, Any]:
    return dict(reply.json()["error"])


@pytest.fixture(scope="module", autouse=True)
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, Future[httpx.Response]]]:
    """A server, its folder, and the request that killed a worker whose model cannot be loaded again.

    That is given up after 21 seconds, almost all of them pauses: the other tests run meanwhile.
    """
    folder = tmp_path_factory.mktemp("mortal")
    server = models_server(folder, {"mortal": {}, "other": {}}, drain_timeout=1)
    with ThreadPoolExecutor() as threads, server:
        assert is_right(server.embed("x", "mortal"), "x")
        (folder / "mortal" / "broken").touch()
        yield server, folder, threads.submit(server.embed, "die", "mortal")


def test_first_requests_wait_for_one_load(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with models_server(tmp_path, {"late": {"script": {"seconds": 0.5}}, "other": {}}) as server:
        assert (state(server, "late"), loads(tmp_path, "late")) == ("unloaded", 0)
        replies = [threads.submit(server.embed, f"text {n}", "late") for n in range(20)]
        until(lambda: state(server, "late") == "loading")
        assert is_right(server.embed("quick", "other"), "quick")  # which need not wait for it
        assert all(is_right(reply.result(), f"text {n}") for n, reply in enumerate(replies))
        assert loads(tmp_path, "late") == 1


def test_a_pinned_model_is_loaded_at_the_start(tmp_path: Path) -> None:
    with models_server(tmp_path, {"pinned": {"pinned": True}, "other": {}}) as server:
        assert (loads(tmp_path, "pinned"), loads(tmp_path, "other")) == (1, 0)
        described = {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}
        assert described["pinned"]["loaded"] and described["pinned"]["dimensions"] == 8
        assert not described["other"]["loaded"] and "dimensions" not in described["other"]


def test_a_pinned_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    server = models_server(tmp_path, {"pinned": {"pinned": True}, "other": {}})
    (tmp_path / "pinned" / "broken").touch()
    with pytest.raises(RuntimeError, match="pinned: .*the file is there"), server:
        pass


def test_a_failing_load_is_told_to_its_own_requests_and_tried_again_after_a_pause(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with models_server(tmp_path, {"broken": {"script": {"seconds": 0.2}}, "sound": {}}) as server:
        (tmp_path / "broken" / "broken").touch()
        for reply in [threads.submit(server.embed, "x", "broken") for _ in range(5)]:
            refused = reply.result()
            assert refused.status_code == 503 and error_of(refused)["code"] == "model_load_failed"
            assert 1 <= int(refused.headers["Retry-After"]) <= 5
            assert str(tmp_path) not in refused.text
        assert loads(tmp_path, "broken") == 1
        assert is_right(server.embed("x", "sound"), "x")
        health = server.client.get("/health")
        assert health.status_code == 200 and state(server, "broken") == "failed"
        server.wait_for_log("broken could not be loaded.*the file is there")
        (tmp_path / "broken" / "broken").unlink()
        until(lambda: server.embed("x", "broken").status_code == 200)
        assert loads(tmp_path, "broken") == 2


def test_whoever_runs_the_server_may_load_at_once_what_failed(tmp_path: Path) -> None:
    with models_server(tmp_path, {"broken": {}}) as server:
        (tmp_path / "broken" / "broken").touch()
        assert server.client.post("/v1/models/broken/load").status_code == 503
        (tmp_path / "broken" / "broken").unlink()
        reply = server.client.post("/v1/models/broken/load")
        assert reply.status_code == 200 and reply.json()["loaded"]


def test_without_a_name_no_reranker_is_guessed(tmp_path: Path) -> None:
    """Neither the first of several, nor one that happens to have been loaded."""
    body = {"query": "a", "documents": ["b"]}
    with models_server(tmp_path, {"first": {}, "second": {}}) as server:
        refused = server.client.post("/rerank", json=body)
        assert refused.status_code == 400 and error_of(refused)["param"] == "model"
        assert server.client.post("/rerank", json=body | {"model": "second"}).status_code == 200
        assert server.client.post("/rerank", json=body).status_code == 400


def test_an_idle_model_is_unloaded_and_loaded_again(tmp_path: Path) -> None:
    models = {"idle": {"keep_alive": 1}, "stays": {}, "pinned": {"pinned": True, "keep_alive": 0}}
    with models_server(tmp_path, models) as server:
        for name in ("stays", "idle"):
            assert is_right(server.embed("x", name), "x")
        until(lambda: state(server, "idle") == "unloaded")
        assert state(server, "stays") == state(server, "pinned") == "ready"
        described = server.client.get("/v1/models/idle").json()
        assert described["dimensions"] == 8 and not described["loaded"]
        assert is_right(server.embed("y", "idle"), "y")
        assert loads(tmp_path, "idle") == 2


def test_unloading_waits_for_what_is_in_flight_and_those_who_come_meanwhile_are_answered(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with models_server(tmp_path, {"model": {"pinned": True}}) as server:
        running = threads.submit(server.embed, "work 1", "model")
        until(lambda: server.client.get("/health").json()["requests_in_flight"] > 0)
        unloading = threads.submit(server.client.post, "/v1/models/model/unload")
        until(lambda: state(server, "model") == "unloading")
        late = threads.submit(server.embed, "late", "model")
        assert is_right(running.result(), "work 1")
        assert unloading.result().status_code == 200
        assert server.client.get("/health").status_code == 200  # or it would get no request that loads it again
        assert is_right(late.result(), "late")
        assert loads(tmp_path, "model") == 2


def of_bytes(count: int, **entry: Any) -> dict[str, Any]:
    return {"script": {"memory": count}, **entry}


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    models = {"pinned": of_bytes(100, pinned=True), "a": of_bytes(100), "b": of_bytes(100), "c": of_bytes(100)}
    with models_server(tmp_path, models, max_memory=350) as server:
        for name in ("a", "b", "a", "c"):
            assert is_right(server.embed(name, name), name)
        assert [state(server, name) for name in models] == ["ready", "ready", "unloaded", "ready"]
        assert is_right(server.embed("b", "b"), "b")
        assert [state(server, name) for name in models] == ["ready", "unloaded", "ready", "ready"]


def test_a_model_that_never_fits_is_refused_and_takes_nobodys_room(tmp_path: Path) -> None:
    models = {"pinned": of_bytes(100, pinned=True), "large": of_bytes(300), "small": of_bytes(100)}
    with models_server(tmp_path, models, max_memory=350) as server:
        assert is_right(server.embed("x", "small"), "x")
        refused = server.embed("x", "large")
        assert refused.status_code == 503 and error_of(refused)["code"] == "model_load_failed"
        server.wait_for_log("large could not be loaded.*--max-memory.*pinned models leave")
        assert state(server, "large") == "failed"
        assert server.client.post("/v1/models/large/load").status_code == 503  # now that its size is known
        assert is_right(server.embed("x", "pinned"), "x") and is_right(server.embed("x", "small"), "x")
        assert loads(tmp_path, "small") == 1


def test_a_model_that_leaves_holds_its_room_until_it_is_gone(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    models = {"leaves": of_bytes(100), "comes": of_bytes(100)}
    with models_server(tmp_path, models, max_memory=150) as server:
        for name in ("comes", "leaves"):  # so that what each takes is known
            assert is_right(server.embed("x", name), "x")
        working = threads.submit(server.embed, "work 3", "leaves")
        until(lambda: server.client.get("/health").json()["requests_in_flight"] > 0)
        threads.submit(server.client.post, "/v1/models/leaves/unload")
        until(lambda: state(server, "leaves") == "unloading")
        coming = threads.submit(server.embed, "y", "comes")
        time.sleep(0.5)  # in which it would have been loaded
        assert not working.done() and loads(tmp_path, "comes") == 1
        assert is_right(working.result(), "work 3")
        assert is_right(coming.result(), "y") and loads(tmp_path, "comes") == 2


def test_who_is_idle_makes_room_before_who_is_being_loaded(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    models = {"idle": of_bytes(100), "slow": {"script": {"seconds": 1, "memory": 100}}, "c": of_bytes(100)}
    with models_server(tmp_path, models, max_memory=250) as server:
        for name in ("slow", "c", "idle"):
            assert is_right(server.embed("x", name), "x")
        until(lambda: state(server, "slow") == "unloaded")
        server.client.post("/v1/models/c/unload")
        loading = threads.submit(server.embed, "y", "slow")
        until(lambda: state(server, "slow") == "loading")
        assert is_right(server.embed("y", "c"), "y")
        assert is_right(loading.result(), "y")
        assert [state(server, name) for name in models] == ["unloaded", "ready", "ready"]


def test_weights_that_a_folder_has_twice_are_reckoned_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "2_Dense").mkdir()
    for name, size in (("model.safetensors", 100), ("pytorch_model.bin", 110), ("2_Dense/pytorch_model.bin", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert Found.of(ModelSpec(None, str(tmp_path))).weight_bytes == 107


def test_models_that_do_not_fit_together_take_turns(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    models = {name: of_bytes(100) for name in "abc"}
    with models_server(tmp_path, models, max_memory=150) as server:
        asked = [(name, f"{name} {n}") for n in range(10) for name in models]
        replies = [threads.submit(server.embed, text, name) for name, text in asked]
        assert all(is_right(reply.result(), text) for reply, (_, text) in zip(replies, asked, strict=True))
        assert sum(state(server, name) == "ready" for name in models) == 1


def test_a_short_query_waits_for_one_batch_of_another_model_at_most(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with models_server(tmp_path, {"large": {"pinned": True}, "small": {"pinned": True}}) as server:
        # 30 words of a budget of 64 tokens each: a batch of two.
        long = [threads.submit(server.embed, f"work 0.2 {n} " + "word " * 30, "large") for n in range(16)]
        until(lambda: server.client.get("/health").json()["models"][0]["queue"]["items"] > 8)
        waits = []
        for n in range(3):
            started = time.monotonic()
            assert is_right(server.embed(f"query {n}", "small"), f"query {n}")
            waits.append(time.monotonic() - started)
        assert any(not reply.done() for reply in long), "the long queue has ended before: nothing was seen"
        assert max(waits) < 1, waits  # a batch takes 0.4 s, all of them more than 3 s
        assert all(reply.result().status_code == 200 for reply in long)


def test_a_client_that_leaves_does_not_end_the_load(tmp_path: Path) -> None:
    with models_server(tmp_path, {"late": {"script": {"seconds": 1.5}}}) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/embeddings", json={"model": "late", "input": "x"}, timeout=0.5)
        until(lambda: state(server, "late") == "ready")
        assert is_right(server.embed("x", "late"), "x") and loads(tmp_path, "late") == 1


def test_the_server_ends_while_a_model_is_being_loaded(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with models_server(tmp_path, {"slow": {"script": {"seconds": 60}}}, drain_timeout=0.5) as server:
        waiting = threads.submit(server.embed, "x", "slow")
        until(lambda: state(server, "slow") == "loading")
        assert server.stop(timeout=20) == 0
        assert waiting.result().status_code == 503 and error_of(waiting.result())["code"] == "backend_lost"


def test_the_example_of_a_file_is_served_as_it_stands() -> None:
    with Server("--config", str(Path(__file__).parents[1] / "models.example.yaml")) as server:
        reply = server.embed("some words", "text-embedding-3-small").json()
        assert reply["model"] == "all-MiniLM-L6-v2" and len(reply["data"][0]["embedding"]) == 384


# MLX computes slowly on a CPU: of a tiny model only what would add up can be seen.
@pytest.mark.parametrize(("backend", "model", "freed"), [("torch", MINILM, 50e6), ("mlx", DATA / "specter2/base", 0)])
def test_memory_returns(tmp_path: Path, backend: str, model: str | Path, freed: float) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"models: {{mini: {{name: {model}, backend: {backend}, dtype: float32}}}}")
    with Server("--config", str(file)) as server:
        process = psutil.Process(server.process.pid)
        sizes = []
        for _ in range(20):
            assert server.embed("some words to embed", "mini").status_code == 200
            loaded = process.memory_info().rss
            assert server.client.post("/v1/models/mini/unload").status_code == 200
            sizes.append(process.memory_info().rss)
        assert loaded - sizes[-1] >= freed, sizes
        assert max(sizes[5:]) - sizes[1] < 30e6, sizes


def test_a_model_whose_worker_is_dead_for_good_is_loaded_anew(
    mortal: tuple[Server, Path, Future[httpx.Response]], threads: ThreadPoolExecutor
) -> None:
    server, folder, killing = mortal
    assert killing.result().status_code == 503
    until(lambda: state(server, "mortal") == "dead")  # after four loads, with pauses between
    assert server.client.get("/livez").status_code == server.client.get("/health").status_code == 200
    assert error_of(server.embed("x", "mortal"))["code"] == "model_load_failed"
    assert is_right(server.embed("x", "other"), "x")
    (folder / "mortal" / "broken").unlink()
    before = loads(folder, "mortal")
    assert server.client.post("/v1/models/mortal/load").status_code == 200
    replies = [threads.submit(server.embed, f"text {n}", "mortal") for n in range(5)]
    assert all(is_right(reply.result(), f"text {n}") for n, reply in enumerate(replies))
    assert loads(folder, "mortal") == before + 1
