"""Re-embedding over HTTP: a job gives a collection another model's vectors, and nobody notices but by the result."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jobs import (
    COLLECTIONS,
    JOBS,
    all_of,
    best,
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
from tests.server import Server

MODELS: dict[str, dict[str, Any]] = {
    "old": {"lenient": True},
    "new": {"dimensions": 6, "max_tokens": 500},
    "slow": {"seconds": 0.01},
    "third": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with jobs_server(configured(folder, MODELS)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> httpx.Client:
    return server.client


@pytest.fixture
def notes(client: httpx.Client) -> str:
    """A collection of twenty documents with vectors of the model `old`."""
    return collection(client, [document(number) for number in range(20)])


@contextmanager
def held(folder: Path, model: str) -> Iterator[None]:
    """The model computes nothing meanwhile, and no other one does, once it has begun."""
    (folder / model / "hold").touch()
    try:
        yield
    finally:
        (folder / model / "hold").unlink(missing_ok=True)


def test_a_schedule_as_the_reference_has_it(client: httpx.Client) -> None:
    of_media = [collection(client, [document(1, media_id=123), document(2, media_id=4)]) for _ in range(2)]
    other = collection(client, [document(1, media_id=124)])
    before = {name: all_of(client, name) for name in of_media}
    body = {
        "media_id": 123,
        "priority": 50,
        "user_id": "1",
        "idempotency_key": "reembed:1:123:hf:new",
        "dedupe_key": "reembed:1:123:hf:new",
        "operation_id": "uuid-optional",
        "user_tier": "free",
        "embedder_name": "huggingface",
        "embedder_version": "new",
    }
    job = schedule(client, **body)
    wanted = {"domain": "embeddings", "queue": "reembed", "job_type": "expand_reembed", "status": "queued"}
    assert job.items() >= wanted.items() and isinstance(job["id"], int) and len(job["uuid"]) == 36
    done = until(client, job, "completed")
    assert sorted(done["collections"]) == sorted(of_media) and done["progress"] == {"done": 4, "total": 4}
    assert done["started_at"] >= done["created_at"] and done["finished_at"] >= done["started_at"]
    for name in of_media:
        assert all_of(client, name) == before[name]
        check_vectors(client, name, "new")
        assert client.get(f"{COLLECTIONS}/{name}/stats").json()["embedding_dimension"] == 6
    check_vectors(client, other, "old")


def test_a_media_id_that_was_stored_as_text_is_found(client: httpx.Client) -> None:
    name = collection(client, [document(1, media_id="77")])
    job = schedule(client, media_id=77, embedder_version="new")
    assert until(client, job, "completed")["collections"] == [name]


def test_of_a_medias_collections_one_may_be_deleted_meanwhile(client: httpx.Client, folder: Path) -> None:
    names = [collection(client, [document(1, media_id=88)]) for _ in range(2)]
    client.post("/v1/models/new/load").raise_for_status()  # which computes something
    with held(folder, "new"):
        job = schedule(client, media_id=88, embedder_version="new")
        while not job_of(client, job)["progress"]["total"]:
            time.sleep(0.02)
        time.sleep(0.3)  # the model has what it is to embed of the first one
        client.delete(f"{COLLECTIONS}/{names[0]}").raise_for_status()
    assert until(client, job, "completed")["progress"] == {"done": 1, "total": 1}
    check_vectors(client, names[1], "new")


def test_a_collection_that_is_deleted_meanwhile_ends_its_job(client: httpx.Client, folder: Path, notes: str) -> None:
    with held(folder, "new"):
        job = schedule(client, collection=notes, embedder_version="new")
        until(client, job, "running")
        client.delete(f"{COLLECTIONS}/{notes}").raise_for_status()
    assert until(client, job, "failed")["error"] == f"there is no collection '{notes}'"


def test_the_old_version_answers_until_the_new_one_is_whole(client: httpx.Client) -> None:
    name = collection(client, [document(number) for number in range(200)])
    job = schedule(client, collection=name, embedder_version="slow")
    until(client, job, "running", done=1)
    for number in range(0, 200, 50):
        assert best(client, name, f"words of {number}", "old") == (f"id-{number}", 1.0)
    assert job_of(client, job)["status"] == "running"
    until(client, job, "completed")
    check_vectors(client, name, "slow")
    refused = client.post(f"{COLLECTIONS}/{name}/query", json={"query": "words", "model": "old"})
    assert refused.status_code == 409


def test_what_is_written_and_deleted_meanwhile_is_neither_lost_nor_doubled(client: httpx.Client) -> None:
    name = collection(client, [document(number) for number in range(150)])
    job = schedule(client, collection=name, embedder_version="slow")
    until(client, job, "running", done=1)
    expected = {f"id-{number}": f"words of {number}" for number in range(150)}
    for turn in range(12):
        changed, added, gone = turn * 11, 1000 + turn, 149 - turn * 7
        upsert(client, name, [document(changed, f"changed in {turn}"), document(added)])
        expected |= {f"id-{changed}": f"changed in {turn}", f"id-{added}": f"words of {added}"}
        client.request("DELETE", f"{COLLECTIONS}/{name}/documents", json={"ids": [f"id-{gone}"]}).raise_for_status()
        expected.pop(f"id-{gone}", None)
    assert job_of(client, job)["status"] == "running"  # else nothing was written meanwhile
    until(client, job, "completed")
    assert {id: each["text"] for id, each in all_of(client, name).items()} == expected
    check_vectors(client, name, "slow")


def test_requests_are_answered_while_a_job_has_the_same_model(client: httpx.Client) -> None:
    name = collection(client, [document(number) for number in range(300)])
    job = schedule(client, collection=name, embedder_version="slow")
    until(client, job, "running", done=1)
    started = time.monotonic()
    time.sleep(0.3)  # the next ones wait in the queue
    # Of another length than the documents, so that it does not ride along with them.
    client.post("/v1/embeddings", json={"model": "slow", "input": "longer " * 40}).raise_for_status()
    waited = time.monotonic() - started
    assert job_of(client, job)["status"] == "running"
    assert waited < 1.2  # a batch is of 64 tokens, a document of three: 0.2 s each; all of them take three seconds
    client.post(f"{JOBS}/jobs/{job['id']}/cancel").raise_for_status()
    until(client, job, "cancelled")


def test_the_same_idempotency_key_is_the_same_job(client: httpx.Client, notes: str) -> None:
    body = {"collection": notes, "embedder_version": "new", "idempotency_key": f"key of {notes}"}
    job = schedule(client, **body)
    until(client, job, "completed")
    again = schedule(client, **body, priority=1)
    assert (again["id"], again["uuid"], again["status"]) == (job["id"], job["uuid"], "completed")
    other = client.post(f"{JOBS}/schedule", json=body | {"embedder_version": "old"})
    assert other.status_code == 409 and "idempotency_key" in other.json()["detail"]


def test_requests_with_one_key_at_the_same_time_make_one_job(client: httpx.Client, notes: str) -> None:
    body = {"collection": notes, "embedder_version": "new", "idempotency_key": f"race of {notes}"}
    jobs: list[int] = []
    threads = [threading.Thread(target=lambda: jobs.append(schedule(client, **body)["id"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 8 and len(set(jobs)) == 1
    until(client, {"id": jobs[0]}, "completed")


def test_the_same_dedupe_key_is_the_same_job_until_it_is_finished(
    client: httpx.Client, folder: Path, notes: str
) -> None:
    body = {"collection": notes, "embedder_version": "new", "dedupe_key": f"key of {notes}"}
    with held(folder, "new"):
        job = schedule(client, **body)
        assert schedule(client, **body)["id"] == job["id"]
        until(client, job, "running")
        assert schedule(client, **body)["id"] == job["id"]
        other = client.post(f"{JOBS}/schedule", json={**body, "embedder_version": "third"})
        assert other.status_code == 409 and "dedupe_key" in other.json()["detail"]
    until(client, job, "completed")
    later = schedule(client, **body)
    assert later["id"] != job["id"]
    until(client, later, "completed")  # of the model that it has already: done once more
    check_vectors(client, notes, "new")


def test_a_running_job_that_is_cancelled_leaves_the_collection_as_it_was(
    client: httpx.Client, server: Server, folder: Path, notes: str
) -> None:
    with held(folder, "new"):
        job = schedule(client, collection=notes, embedder_version="new")
        until(client, job, "running")
        time.sleep(0.2)
        reply = client.post(f"{JOBS}/jobs/{job['uuid']}/cancel")
        assert reply.status_code == 202 and reply.json()["cancelling"] is True
        started = time.monotonic()
        until(client, job, "cancelled")  # though the model gives nothing
        assert time.monotonic() - started < 3
    check_vectors(client, notes, "old")
    assert client.post(f"{JOBS}/jobs/{job['id']}/cancel").status_code == 200
    next_one = schedule(client, collection=notes, embedder_version="third")  # nothing is in its way
    until(client, next_one, "completed")
    check_vectors(client, notes, "third")
    assert client.post(f"{JOBS}/jobs/{next_one['id']}/cancel").status_code == 409


def test_jobs_are_done_by_priority_and_a_queued_one_is_cancelled_at_once(client: httpx.Client, folder: Path) -> None:
    names = [collection(client, [document(1)]) for _ in range(5)]
    with held(folder, "new"):
        first = schedule(client, collection=names[0], embedder_version="new")
        until(client, first, "running")
        late, middle, soon, never = (
            schedule(client, collection=name, embedder_version="new", priority=priority)
            for name, priority in zip(names[1:], (60, 50, 5, 5), strict=True)
        )
        cancelled = client.post(f"{JOBS}/jobs/{never['id']}/cancel")
        assert cancelled.status_code == 200 and cancelled.json()["status"] == "cancelled"
    done = [until(client, job, "completed") for job in (late, middle, soon)]
    begun = {job["id"]: job["started_at"] for job in done}
    assert sorted(begun, key=begun.__getitem__) == [soon["id"], middle["id"], late["id"]]
    assert job_of(client, never)["started_at"] is None
    check_vectors(client, names[4], "old")


@pytest.mark.parametrize("text", ["fail here", "nan here", "long " * 600], ids=["fail", "nan", "too-long"])
def test_a_document_that_cannot_be_embedded_is_named_and_the_old_version_stays(client: httpx.Client, text: str) -> None:
    name = collection(client, [document(number, text if number == 13 else "") for number in range(20)])
    job = schedule(client, collection=name, embedder_version="new")
    failed = until(client, job, "failed")
    assert "'id-13'" in failed["error"] and failed["attempts"] == 1
    check_vectors(client, name, "old")
    client.request("DELETE", f"{COLLECTIONS}/{name}/documents", json={"ids": ["id-13"]}).raise_for_status()
    until(client, schedule(client, collection=name, embedder_version="new"), "completed")
    check_vectors(client, name, "new")


def test_documents_that_are_too_long_are_cut_where_that_was_asked_for(client: httpx.Client) -> None:
    name = collection(client, [document(1, "long " * 600)])
    until(client, schedule(client, collection=name, embedder_version="new", truncate=True), "completed")
    assert all_of(client, name)["id-1"]["text"] == "long " * 600


NOTHING_TO_DO: dict[str, tuple[dict[str, Any], int, str]] = {
    "no such model": ({"embedder_version": "newest"}, 404, "newest"),
    "no such provider": ({"embedder_version": "new", "embedder_name": "nobody"}, 404, "nobody"),
    "no model": ({"embedder_name": "huggingface"}, 400, "embedder_version"),
    "neither model nor provider": ({}, 400, "embedder_version"),
    "no such collection": ({"embedder_version": "new", "collection": "nowhere"}, 404, "nowhere"),
    "no such media": ({"embedder_version": "new", "collection": None, "media_id": 987}, 404, "987"),
    "both": ({"embedder_version": "new", "media_id": 1}, 400, "media_id"),
    "neither": ({"embedder_version": "new", "collection": None}, 400, "media_id"),
    "media id as text": ({"embedder_version": "new", "collection": None, "media_id": "1"}, 400, "media_id"),
    "priority": ({"embedder_version": "new", "priority": -1}, 400, "priority"),
    "long key": ({"embedder_version": "new", "dedupe_key": "k" * 256}, 400, "dedupe_key"),
    "path": ({"embedder_version": "new", "collection": "../../etc"}, 400, "name"),
}


@pytest.mark.parametrize("problem", NOTHING_TO_DO)
def test_what_cannot_be_done_is_refused_and_not_queued(client: httpx.Client, notes: str, problem: str) -> None:
    fields, status, told = NOTHING_TO_DO[problem]
    before = client.get(f"{JOBS}/jobs").json()["total"]
    reply = client.post(f"{JOBS}/schedule", json={"collection": notes} | fields)
    assert reply.status_code == status and told in reply.json()["detail"], reply.text
    assert client.get(f"{JOBS}/jobs").json()["total"] == before


def test_jobs_are_listed_by_status_the_newest_first(client: httpx.Client, notes: str) -> None:
    jobs = [schedule(client, collection=notes, embedder_version=model) for model in ("new", "old")]
    for job in jobs:
        until(client, job, "completed")
    page = client.get(f"{JOBS}/jobs", params={"status": "completed", "limit": 2}).json()
    assert [each["id"] for each in page["jobs"]] == [job["id"] for job in reversed(jobs)] and page["total"] >= 2
    next_page = client.get(f"{JOBS}/jobs", params={"limit": 2, "offset": 1}).json()
    assert next_page["jobs"][0]["id"] == jobs[0]["id"]
    assert client.get(f"{JOBS}/jobs/{jobs[0]['uuid']}").json()["id"] == jobs[0]["id"]
    for wrong in ({"status": "done"}, {"limit": "0"}, {"limit": "many"}, {"offset": "-1"}):
        assert client.get(f"{JOBS}/jobs", params=wrong).status_code == 400
    for unknown in ("999999", "0" * 40, "..%2f..", "not-a-uuid"):
        assert client.get(f"{JOBS}/jobs/{unknown}").status_code == 404
        assert client.post(f"{JOBS}/jobs/{unknown}/cancel").status_code == 404
