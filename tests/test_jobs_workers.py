"""Workers: in the server or in processes of their own, with queues in SQLite or in Redis, and what may be away."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_embeddings_server.stores.opening import open_store
from tests.jobs import (
    JOBS,
    WorkerProcess,
    all_of,
    check_vectors,
    collection,
    configured,
    document,
    job_of,
    jobs_server,
    schedule,
    until,
    upsert,
)
from tests.redis_server import RedisServer, needs_redis
from tests.stores import ChromaServer, run

MODELS: dict[str, dict[str, Any]] = {"old": {"lenient": True}, "new": {"seconds": 0.004}}


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaServer]:
    with ChromaServer(tmp_path_factory.mktemp("chroma")) as server:
        yield server


def notes(client: httpx.Client, count: int = 100) -> str:
    return collection(client, [document(number) for number in range(count)])


def test_a_worker_of_its_own_does_the_servers_jobs(tmp_path: Path, chroma: ChromaServer) -> None:
    file = configured(tmp_path, MODELS, collections=chroma.url, reembed_worker=False)
    with jobs_server(file) as server:
        name = notes(server.client)
        job = schedule(server.client, collection=name, embedder_version="new")
        time.sleep(1)
        assert job_of(server.client, job)["status"] == "queued"  # nobody does it yet
        with WorkerProcess(file) as worker:
            until(server.client, job, "completed")
            assert worker.kill(signal.SIGTERM) == 0
        check_vectors(server.client, name, "new")


def test_killed_workers_and_servers_leave_nothing_undone(tmp_path: Path, chroma: ChromaServer) -> None:
    file = configured(tmp_path, MODELS, collections=chroma.url, reembed_worker=False)
    with jobs_server(file) as server, WorkerProcess(file) as worker:
        name = notes(server.client, 400)
        job = schedule(server.client, collection=name, embedder_version="new")
        done = 0
        for _ in range(3):
            done = until(server.client, job, "running", "completed", done=done + 1)["progress"]["done"]
            worker.kill()
            assert len(all_of(server.client, name)) == 400
            worker.start()
        ended = until(server.client, job, "completed")
        assert ended["progress"]["done"] == 400 and ended["attempts"] >= 3
        check_vectors(server.client, name, "new")


def test_a_worker_that_is_told_to_end_gives_its_job_to_the_other(tmp_path: Path, chroma: ChromaServer) -> None:
    file = configured(tmp_path, {"old": {}, "new": {"seconds": 0.03}}, collections=chroma.url)
    with jobs_server(file, "--no-reembed-worker") as server, WorkerProcess(file) as first:
        name = notes(server.client, 200)
        job = schedule(server.client, collection=name, embedder_version="new")
        until(server.client, job, "running", done=1)
        with WorkerProcess(file) as second:
            time.sleep(1)
            assert "attempt" not in second.log  # one has it, and the other does not
            assert first.kill(signal.SIGTERM) == 0
            ended = until(server.client, job, "completed")
            assert "attempt 2" in second.log and ended["attempts"] == 2 and ended["error"] is None
        check_vectors(server.client, name, "new")


def test_two_workers_never_have_one_job_nor_one_collection(tmp_path: Path, chroma: ChromaServer) -> None:
    file = configured(tmp_path, MODELS, collections=chroma.url)
    with jobs_server(file) as server, WorkerProcess(file) as worker:
        names = [notes(server.client, 60) for _ in range(3)]
        orders = [(name, model) for model in ("new", "old", "new") for name in names]
        with ThreadPoolExecutor(3) as threads:
            jobs = list(
                threads.map(lambda each: schedule(server.client, collection=each[0], embedder_version=each[1]), orders)
            )
        ended = [until(server.client, job, "completed") for job in jobs]
        assert all(job["attempts"] == 1 and job["error"] is None for job in ended)
        for name in names:
            of_one = sorted((job["started_at"], job["finished_at"]) for job in ended if job["collections"] == [name])
            assert all(before[1] <= after[0] for before, after in zip(of_one, of_one[1:], strict=False))
            assert len(all_of(server.client, name)) == 60
        logs = [server.log.count("attempt 1 "), worker.log.count("attempt 1 ")]
        assert sum(logs) == 9 and min(logs) > 0, logs  # both have worked


def test_a_job_that_was_killed_and_overtaken_is_done_after_the_other(tmp_path: Path, chroma: ChromaServer) -> None:
    file = configured(tmp_path, {**MODELS, "third": {}}, collections=chroma.url, reembed_worker=False)
    with jobs_server(file) as server, WorkerProcess(file) as worker:
        name = notes(server.client, 200)
        job = schedule(server.client, collection=name, embedder_version="new")
        until(server.client, job, "running", done=1)
        worker.kill()
        urgent = schedule(server.client, collection=name, embedder_version="third", priority=1)
        worker.start()
        first, last = until(server.client, urgent, "completed"), until(server.client, job, "completed")
        assert first["finished_at"] <= last["finished_at"] and first["attempts"] == 1
        check_vectors(server.client, name, "new")


@pytest.mark.parametrize("retries", [0, 1])
def test_a_model_that_does_not_load_is_tried_again_as_often_as_was_said(tmp_path: Path, retries: int) -> None:
    file = configured(tmp_path, {**MODELS, "broken": {}}, reembed_retries=retries)
    flag = tmp_path / "broken" / "broken"
    flag.touch()
    with jobs_server(file) as server:
        name = notes(server.client)
        job = schedule(server.client, collection=name, embedder_version="broken")
        if retries:
            server.wait_for_log(r"failed for the 1\. time")
            check_vectors(server.client, name, "old")
            flag.unlink()
        ended = until(server.client, job, "completed" if retries else "failed")
        assert ended["attempts"] == retries + 1
        assert ended["error"] is None if retries else "could not be loaded" in ended["error"]
        check_vectors(server.client, name, "broken" if retries else "old")


def test_a_job_waits_for_a_store_that_is_away(tmp_path: Path) -> None:
    with ChromaServer(tmp_path / "chroma") as chroma:
        file = configured(tmp_path, MODELS, collections=chroma.url)
        with jobs_server(file) as server:
            name = notes(server.client, 300)
            job = schedule(server.client, collection=name, embedder_version="new")
            until(server.client, job, "running", done=1)
            chroma.stop()
            server.wait_for_log(r"failed for the 1\. time")
            assert "Chroma" in job_of(server.client, job)["error"]
            chroma.__enter__()
            ended = until(server.client, job, "completed")
            assert ended["attempts"] > 1 and ended["error"] is None
            check_vectors(server.client, name, "new")


@needs_redis
def test_jobs_by_redis_outlive_kills_and_a_redis_that_forgets(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis:
        file = configured(tmp_path, MODELS, jobs_url=redis.url)
        with jobs_server(file) as server:
            names = [notes(server.client, 200) for _ in range(2)]
            running = schedule(server.client, collection=names[0], embedder_version="new", priority=2)
            until(server.client, running, "running", done=1)
            waiting = schedule(server.client, collection=names[1], embedder_version="new", priority=1)
            assert redis.client.zcard(redis.client.keys("huey.redis.*")[0]) == 1
            server.process.kill()
            server.process.wait()
        redis.kill()
        redis.start()  # with nothing of what it had
        with jobs_server(file) as server:
            for job, name in ((running, names[0]), (waiting, names[1])):
                until(server.client, job, "completed")
                check_vectors(server.client, name, "new")
            redis.kill()  # what is asked for meanwhile is recorded, and done when it is there again
            job = schedule(server.client, collection=names[0], embedder_version="old")
            server.wait_for_log("waits until the queue is there again")
            redis.start()
            until(server.client, job, "completed")
            check_vectors(server.client, names[0], "old")


def test_what_a_cancelled_or_failed_job_has_begun_is_dropped(tmp_path: Path) -> None:
    file = configured(tmp_path, MODELS)
    with jobs_server(file) as server:
        failing = collection(server.client, [document(number) for number in range(50)])
        upsert(server.client, failing, [document(49, "fail here")])
        assert until(server.client, schedule(server.client, collection=failing, embedder_version="new"), "failed")
        name = notes(server.client, 300)
        job = schedule(server.client, collection=name, embedder_version="new")
        until(server.client, job, "running", done=1)
        server.client.post(f"{JOBS}/jobs/{job['id']}/cancel").raise_for_status()
        until(server.client, job, "cancelled")
        server.stop()
    store = open_store("chroma", tmp_path / "collections")
    assert [each.filling for each in run(store.all_of("everybody"))] == [None, None]
    assert run(store.clean_up(0)) == 0
    store.close()


def test_a_job_waits_for_room_in_the_models_queue(tmp_path: Path) -> None:
    with jobs_server(configured(tmp_path, MODELS, max_queue_tokens=60)) as server:
        name = notes(server.client, 100)
        until(
            server.client,
            schedule(server.client, collection=notes(server.client, 1), embedder_version="new"),
            "completed",
        )
        stop = time.monotonic() + 3
        refused = []

        def ask(number: int) -> None:
            while time.monotonic() < stop:
                body = {"model": "new", "input": [f"{number} {each} {time.monotonic()}" for each in range(12)]}
                refused.append(server.client.post("/v1/embeddings", json=body).status_code == 429)

        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(ask, number) for number in range(4)]
            job = schedule(server.client, collection=name, embedder_version="new")
            for each in asking:
                each.result()
        assert any(refused)  # it was full
        ended = until(server.client, job, "completed")
        assert ended["attempts"] == 1
        check_vectors(server.client, name, "new")
