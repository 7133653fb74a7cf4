"""What jobs need is away for a while: a store, a Redis, a model, room in a queue. They go on where they were."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.jobs import check_vectors, configured, job_of, jobs_server, notes, schedule, until
from tests.redis_server import RedisServer, needs_redis
from tests.stores import ChromaServer

MODELS: dict[str, dict[str, Any]] = {"old": {"lenient": True}, "new": {"seconds": 0.004}}


def test_a_model_that_does_not_load_is_tried_again_as_often_as_was_said(tmp_path: Path) -> None:
    models = {name: tmp_path / name / "broken" for name in ("mended", "lost")}
    file = configured(tmp_path, {**MODELS, **{name: {} for name in models}}, reembed_retries=1)
    for flag in models.values():
        flag.touch()
    with jobs_server(file) as server:
        names = {model: notes(server.client, 10) for model in models}
        jobs = {
            model: schedule(server.client, collection=name, embedder_version=model) for model, name in names.items()
        }
        server.wait_for_log(rf"job {jobs['mended']['id']} failed for the 1\. time")
        models["mended"].unlink()
        for name in names.values():
            check_vectors(server.client, name, "old")
        ended = until(server.client, jobs["mended"], "completed")
        assert ended["attempts"] == 2 and ended["error"] is None
        check_vectors(server.client, names["mended"], "mended")
        failed = until(server.client, jobs["lost"], "failed")
        assert failed["attempts"] == 2 and "could not be loaded" in failed["error"]
        check_vectors(server.client, names["lost"], "old")


def test_a_job_waits_for_a_store_that_is_away(tmp_path: Path) -> None:
    with ChromaServer(tmp_path / "chroma") as chroma:
        file = configured(tmp_path, MODELS, collections=chroma.url)
        with jobs_server(file) as server:
            name = notes(server.client, 200)
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
            names = [notes(server.client, 120) for _ in range(2)]
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
            server.wait_for_log("jobs wait: ConnectionError")
            redis.start()
            until(server.client, job, "completed")
            server.wait_for_log("jobs go on")
            check_vectors(server.client, names[0], "old")
            assert server.log.count("jobs wait") == 1 and "Traceback" not in server.log


def test_a_job_waits_for_room_in_the_models_queue(tmp_path: Path) -> None:
    with jobs_server(configured(tmp_path, MODELS, max_queue_tokens=60)) as server:
        name = notes(server.client, 100)
        server.client.post("/v1/models/new/load").raise_for_status()
        stop = time.monotonic() + 1.5
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
