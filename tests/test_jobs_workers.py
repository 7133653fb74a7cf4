"""Workers in processes of their own: who has a job, and what becomes of it when they end. One server has them all."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
    notes,
    schedule,
    until,
    upsert,
)
from tests.stores import ChromaServer, run

MODELS: dict[str, dict[str, Any]] = {
    "old": {"lenient": True},
    "new": {"seconds": 0.004},
    "slow": {"seconds": 0.02},
    "third": {},
}


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaServer]:
    with ChromaServer(tmp_path_factory.mktemp("chroma")) as server:
        yield server


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, chroma: ChromaServer) -> Path:
    return configured(tmp_path_factory.mktemp("jobs"), MODELS, collections=chroma.url, reembed_worker=False)


@pytest.fixture(scope="module")
def client(file: Path) -> Iterator[httpx.Client]:
    """Of a server that asks for jobs, and does none."""
    with jobs_server(file) as server:
        yield server.client


def test_a_worker_of_its_own_does_the_servers_jobs(client: httpx.Client, file: Path) -> None:
    name = notes(client)
    job = schedule(client, collection=name, embedder_version="new")
    time.sleep(1)
    assert job_of(client, job)["status"] == "queued"  # nobody does it yet
    with WorkerProcess(file) as worker:
        until(client, job, "completed")
        assert worker.kill(signal.SIGTERM) == 0
    check_vectors(client, name, "new")
    documents = "mlx_embeddings_reembed_documents_total 100.0"
    assert documents in client.get("/metrics").text  # as the worker has no address to ask


def test_killed_workers_leave_nothing_undone(client: httpx.Client, file: Path) -> None:
    with WorkerProcess(file) as worker:
        name = notes(client, 300)
        job = schedule(client, collection=name, embedder_version="new")
        done = 0
        for _ in range(2):
            done = until(client, job, "running", "completed", done=done + 1)["progress"]["done"]
            worker.kill()
            assert len(all_of(client, name)) == 300
            worker.start()
        ended = until(client, job, "completed")
        assert ended["progress"]["done"] == 300 and ended["attempts"] >= 2
        check_vectors(client, name, "new")


def test_a_job_that_was_killed_and_overtaken_is_done_after_the_other(client: httpx.Client, file: Path) -> None:
    with WorkerProcess(file) as worker:
        name = notes(client, 200)
        job = schedule(client, collection=name, embedder_version="new")
        until(client, job, "running", done=1)
        worker.kill()
        urgent = schedule(client, collection=name, embedder_version="third", priority=1)
        worker.start()
        first, last = until(client, urgent, "completed"), until(client, job, "completed")
        assert first["finished_at"] <= last["finished_at"] and first["attempts"] == 1
        check_vectors(client, name, "new")


def test_two_workers_never_have_one_job_nor_one_collection(client: httpx.Client, file: Path) -> None:
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as threads:  # starting takes time
            workers = list(threads.map(lambda _: stack.enter_context(WorkerProcess(file)), range(2)))
        names = [notes(client, 60) for _ in range(3)]
        orders = [(name, model) for model in ("new", "old", "new") for name in names]
        with ThreadPoolExecutor(3) as threads:
            jobs = list(
                threads.map(lambda each: schedule(client, collection=each[0], embedder_version=each[1]), orders)
            )
        ended = [until(client, job, "completed") for job in jobs]
        assert all(job["attempts"] == 1 and job["error"] is None for job in ended)
        for name in names:
            of_one = sorted((job["started_at"], job["finished_at"]) for job in ended if job["collections"] == [name])
            assert all(before[1] <= after[0] for before, after in zip(of_one, of_one[1:], strict=False))
            assert len(all_of(client, name)) == 60
        logs = [worker.log.count("attempt 1 ") for worker in workers]
        assert sum(logs) == 9 and min(logs) > 0, logs  # both have worked

        # One that is told to end gives its job to the other.
        job = schedule(client, collection=notes(client, 100), embedder_version="slow")
        until(client, job, "running", done=1)
        time.sleep(1)
        first, second = sorted(workers, key=lambda each: f"job {job['id']}: attempt" not in each.log)
        assert f"job {job['id']}: attempt" not in second.log
        assert first.kill(signal.SIGTERM) == 0
        last = until(client, job, "completed")
        assert f"job {job['id']}: attempt 2" in second.log and last["attempts"] == 2 and last["error"] is None
        check_vectors(client, last["collections"][0], "slow")


def test_what_a_cancelled_or_failed_job_has_begun_is_dropped(
    client: httpx.Client, file: Path, chroma: ChromaServer
) -> None:
    with WorkerProcess(file):
        failing = collection(client, [document(number) for number in range(50)])
        upsert(client, failing, [document(49, "fail here")])
        assert until(client, schedule(client, collection=failing, embedder_version="new"), "failed")
        name = notes(client, 300)
        job = schedule(client, collection=name, embedder_version="new")
        until(client, job, "running", done=1)
        client.post(f"{JOBS}/jobs/{job['id']}/cancel").raise_for_status()
        until(client, job, "cancelled")
    store = open_store(chroma.url, file.parent / "collections")
    assert {each.filling for each in run(store.all_of("everybody"))} == {None}
    assert run(store.clean_up(0)) == 0
    store.close()
