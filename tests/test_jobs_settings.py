"""Who may ask for jobs, whose collections they are about, and settings that cannot be."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from mlx_embeddings_server.app import create_app
from mlx_embeddings_server.jobs.queue import UnusableQueue, open_queue
from mlx_embeddings_server.jobs.records import Records, RecordsBroken
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.jobs import COLLECTIONS, JOBS, configured, document, jobs_server, load, schedule, until, upsert

MODELS: dict[str, dict[str, Any]] = {"old": {}, "new": {}}
SECRET = "a secret of 32 bytes or some more"
ROUTES = [("POST", "/schedule"), ("GET", "/jobs"), ("GET", "/jobs/1"), ("POST", "/jobs/1/cancel")]


def of_user(client: httpx.Client, name: str, *, admin: bool = False) -> httpx.Client:
    token = jwt.encode({"sub": name, "admin": admin, "exp": int(time.time()) + 600}, SECRET)
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=client.base_url, headers=headers, timeout=60, trust_env=False)


def test_jobs_are_an_admins_and_about_the_named_users_collections(tmp_path: Path) -> None:
    with (
        jobs_server(configured(tmp_path, MODELS, jwt_secret=SECRET)) as server,
        of_user(server.client, "ada") as ada,
        of_user(server.client, "bob") as bob,
        of_user(server.client, "root", admin=True) as root,
    ):
        for client, model in ((ada, "old"), (bob, "old")):
            client.post(COLLECTIONS, json={"name": "notes", "embedding_model": model}).raise_for_status()
            upsert(client, "notes", [document(1, media_id=5)])
        for method, path in ROUTES:
            body = {"collection": "notes", "embedder_version": "new"}
            assert server.client.request(method, JOBS + path, json=body).status_code == 401
            refused = ada.request(method, JOBS + path, json=body)
            assert refused.status_code == 403 and refused.json()["code"] == "admin_required"
        for fields in ({}, {"user_id": "eve"}):  # neither has any
            reply = root.post(f"{JOBS}/schedule", json={"media_id": 5, "embedder_version": "new", **fields})
            assert reply.status_code == 404
        job = schedule(root, media_id=5, embedder_version="new", user_id="bob")
        assert until(root, job, "completed")["user_id"] == "bob"
        told = [client.get(f"{COLLECTIONS}/notes/stats").json()["metadata"] for client in (ada, bob)]
        assert [each["embedding_model"] for each in told] == ["old", "new"]


def test_the_worker_is_off_unless_it_was_asked_for_and_nothing_is_queued_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = configured(tmp_path, MODELS, reembed_worker=False)
    with jobs_server(file) as server:
        assert "worker has started" not in server.log
        reply = server.client.post(f"{JOBS}/schedule", json={"media_id": 1, "embedder_version": "new"})
        assert reply.status_code == 409 and "--reembed-worker" in reply.json()["detail"]
        ended = launched("worker", "--config", str(file))  # one of its own has no way to the server's collections
        assert ended.returncode == 2 and "a worker needs a store by URL" in ended.stderr
    assert not load_settings({"config": str(file)}).reembed_worker
    monkeypatch.setenv("EMBEDDINGS_REEMBED_WORKER_ENABLED", "true")
    assert load_settings({"config": str(file)}).reembed_worker


def test_without_collections_there_are_no_jobs(tmp_path: Path) -> None:
    file = configured(tmp_path, MODELS, collections=None, collections_path=None, reembed_worker=None)
    with jobs_server(file) as server:
        for method, path in ROUTES:
            reply = server.client.request(method, JOBS + path, json={"media_id": 1, "embedder_version": "old"})
            assert reply.status_code == 404 and "--collections" in reply.json()["detail"]
    ended = launched("worker", "--config", str(file))
    assert ended.returncode == 2 and "a worker needs --collections" in ended.stderr
    for setting, told in (
        ({"reembed_worker": True}, "--reembed-worker is of use with --collections"),
        ({"jobs_url": "redis://localhost:6379"}, "--jobs-url is of use with --collections"),
        ({"jobs_url": "amqp://localhost"}, "jobs-url"),
    ):
        with pytest.raises(SettingsError, match=told):
            create_app(load_settings({"config": str(file), **setting}), load=load)


@pytest.mark.parametrize("broken", ["jobs.sqlite3", "queue.sqlite3"])
def test_files_that_are_not_ours_are_told(tmp_path: Path, broken: str) -> None:
    (tmp_path / broken).write_bytes(b"no database " * 100)
    with pytest.raises((RecordsBroken, UnusableQueue), match=f"{broken}: .*not a database"):
        if broken == "jobs.sqlite3":
            Records(tmp_path / broken)
        else:
            open_queue(None, tmp_path, "reembed", None)


def test_jobs_that_cannot_be_opened_are_told_at_the_start(tmp_path: Path) -> None:
    file = configured(tmp_path, MODELS)
    folder = tmp_path / "collections" / "chroma" / "jobs"
    folder.mkdir(parents=True)
    (folder / "jobs.sqlite3").write_bytes(b"no database " * 100)
    ended = launched("--config", str(file))
    assert ended.returncode == 2 and "jobs.sqlite3: " in ended.stderr


def launched(*arguments: str) -> "subprocess.CompletedProcess[str]":
    run = [sys.executable, "-m", "mlx_embeddings_server.main", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=60)
