"""The jobs' records: an SQLite file beside the collections' catalog, where every worker of these collections is anyway.

They are the truth, and the queue only says what comes next: a queue that is lost, or whose message was taken by a
worker that was killed, is filled again from here. Commits are on the disk when they return (synchronous=FULL).

A job is one worker's from `take` to `give_back` or `finish`. Each change in between is conditional on that.
"""

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_embeddings_server.errors import quoted
from mlx_embeddings_server.jobs.base import (
    UNFINISHED,
    Job,
    JobConflict,
    JobNotFound,
    JobsFull,
    JobsUnavailable,
    Order,
    Target,
    Totals,
)
from mlx_embeddings_server.sqlite_file import LaterVersion, SqliteFile, is_full

_SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, uuid TEXT NOT NULL UNIQUE, status TEXT NOT NULL, owner BLOB NOT NULL,
    targets TEXT NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL, priority INTEGER NOT NULL, collection TEXT,
    media_id INTEGER, user_id TEXT, idempotency_key TEXT UNIQUE, dedupe_key TEXT, operation_id TEXT, user_tier TEXT,
    truncate TEXT, done INTEGER NOT NULL DEFAULT 0, total INTEGER, error TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, cancelling INTEGER NOT NULL DEFAULT 0, worker TEXT,
    not_before REAL NOT NULL DEFAULT 0, created_at REAL NOT NULL, started_at REAL, finished_at REAL
);
CREATE UNIQUE INDEX one_unfinished ON jobs (dedupe_key) WHERE status IN ('queued', 'running');
CREATE INDEX in_turn ON jobs (status, priority, id);
-- Of all workers, and also of jobs that are no longer kept.
CREATE TABLE totals (status TEXT PRIMARY KEY, jobs INTEGER NOT NULL, seconds REAL NOT NULL);
INSERT INTO totals VALUES ('completed', 0, 0), ('failed', 0, 0), ('cancelled', 0, 0);
CREATE TRIGGER job_finished AFTER UPDATE OF status ON jobs WHEN new.status IN ('completed', 'failed', 'cancelled') BEGIN
    UPDATE totals SET jobs = jobs + 1,
        seconds = seconds + max(0, new.finished_at - coalesce(new.started_at, new.finished_at))
        WHERE status = new.status;
END;
CREATE TABLE documents (done INTEGER NOT NULL);
INSERT INTO documents VALUES (0);
CREATE TRIGGER documents_done AFTER UPDATE OF done ON jobs WHEN new.done > old.done BEGIN
    UPDATE documents SET done = done + new.done - old.done;
END;
"""
_COLUMNS = ", ".join(field.name for field in fields(Job))
_KEPT = 10_000  # finished jobs
# Seconds until a job is looked at again whose collection another job is at.
_TURN_PAUSE = 2.0
# Nobody waits longer: where it seems so, the clock was set back.
LONGEST_PAUSE = 300.0
_IS_DUE = f"status = 'queued' AND (not_before <= ?1 OR not_before > ?1 + {LONGEST_PAUSE})"  # ?1: now
_MOST_DUE = 100  # more than a worker does between two looks


class RecordsBroken(Exception):
    """The file is none of these records, or of a later version of this program, or cannot be opened."""


class NotMine(Exception):
    """Another worker has the job, or nobody: this one must not touch it any more."""


class Records:
    """Blocks for the disk. May be called from several threads, and opened by several processes."""

    def __init__(self, path: Path) -> None:
        """Raises `RecordsBroken`."""
        try:
            self._file = SqliteFile(path, [_SCHEMA])
        except (sqlite3.Error, LaterVersion) as error:
            raise RecordsBroken(f"{path}: {error}") from error

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk afterwards. Raises `JobsUnavailable`."""
        with _told(), self._file.transaction() as database:
            yield database

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Without waiting for those who write. Raises `JobsUnavailable`."""
        with _told(), self._file.reading() as database:
            yield database

    # For those who ask for jobs.

    def add(self, order: Order, collections: Sequence[str]) -> tuple[Job, bool]:
        """The job, and whether it is a new one. Raises `JobConflict` for a key that was used for other work."""
        with self._transaction() as database:
            if (same := _same(database, order)) is not None:
                return same, False
            given = {
                "uuid": str(uuid.uuid4()), "status": "queued", "owner": _key(order.owner),
                "targets": _written([Target(name) for name in collections]), "model": order.model,
                "provider": order.provider, "priority": order.priority, "collection": order.collection,
                "media_id": order.media_id, "user_id": order.user_id, "idempotency_key": order.idempotency_key,
                "dedupe_key": order.dedupe_key, "operation_id": order.operation_id, "user_tier": order.user_tier,
                "truncate": order.truncate,
                "created_at": time.time(),
            }  # fmt: skip
            names = ", ".join(given)
            places = ", ".join(f":{name}" for name in given)
            cursor = database.execute(f"INSERT INTO jobs ({names}) VALUES ({places})", given)
            database.execute(
                "DELETE FROM jobs WHERE status NOT IN ('queued', 'running') AND id <= "
                "(SELECT max(id) FROM jobs) - ?", (_KEPT,)
            )  # fmt: skip
            (added,) = _select(database, "id = ?", cursor.lastrowid)
            return added, True

    def same(self, order: Order) -> Job | None:
        """The job that was made of the order's keys before. Raises `JobConflict`."""
        with self._transaction() as database:
            return _same(database, order)

    def get(self, name: str) -> Job:
        """By id or uuid. Raises `JobNotFound`."""
        with self._reading() as database:
            return _get(database, name)

    def all_of(self, status: str | None, limit: int, offset: int) -> tuple[list[Job], int]:
        """A page of them, the newest first, and how many there are."""
        condition, values = ("status = ?", (status,)) if status else ("1", ())
        with self._reading() as database:
            (count,) = database.execute(f"SELECT count(*) FROM jobs WHERE {condition}", values).fetchone()
            page = f"{condition} ORDER BY id DESC LIMIT ? OFFSET ?"
            return _select(database, page, *values, limit, offset), count

    def cancel(self, name: str) -> Job:
        """At once, where nothing was begun; else `cancelling` from now on. Raises `JobNotFound`, `JobConflict`."""
        with self._transaction() as database:
            job = _get(database, name)
            if job.status == "cancelled":
                return job
            if job.status not in UNFINISHED:
                raise JobConflict(f"the job {job.id} is {job.status}: there is nothing to cancel")
            if job.status == "queued" and not job.attempts:
                database.execute(
                    "UPDATE jobs SET status = 'cancelled', finished_at = ? WHERE id = ?", (time.time(), job.id)
                )
            else:
                database.execute("UPDATE jobs SET cancelling = 1, not_before = 0 WHERE id = ?", (job.id,))
            return _get(database, str(job.id))

    def totals(self) -> Totals:
        """Takes a fraction of a millisecond."""
        with self._reading() as database:
            counts = dict(
                database.execute(
                    "SELECT status, count(*) FROM jobs WHERE status IN ('queued', 'running') GROUP BY status"
                )
            )
            ((oldest,),) = database.execute("SELECT min(created_at) FROM jobs WHERE status IN ('queued', 'running')")
            ((documents,),) = database.execute("SELECT done FROM documents")
            finished = {status: (jobs, seconds) for status, jobs, seconds in database.execute("SELECT * FROM totals")}
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        return Totals({status: counts.get(status, 0) for status in UNFINISHED}, finished, documents, age)

    # For workers.

    def due(self) -> list[Job]:
        """The first of those that no worker has and none has to wait with, in the order of their turns."""
        with self._reading() as database:
            return _select(database, f"{_IS_DUE} ORDER BY priority, id LIMIT {_MOST_DUE}", time.time())

    def take(self, uuid: str, worker: str) -> Job | None:
        """None: it is not to be done now. One job at a time has a collection; the others wait."""
        now = time.time()
        with self._transaction() as database:
            found = _select(database, f"{_IS_DUE} AND uuid = ?2", now, uuid)
            if not found:
                return None
            (job,) = found
            wanted = {each.collection for each in job.targets}
            for other in _select(database, "status = 'running' AND owner = ?", _key(job.owner)):
                if wanted.intersection(each.collection for each in other.targets):
                    later = (now + _TURN_PAUSE, job.id)
                    database.execute("UPDATE jobs SET not_before = ? WHERE id = ?", later)
                    return None
            database.execute(
                "UPDATE jobs SET status = 'running', worker = ?, attempts = attempts + 1, "
                "started_at = coalesce(started_at, ?) WHERE id = ?", (worker, now, job.id)
            )  # fmt: skip
            return _get(database, uuid)

    def note(self, job: Job, worker: str, *, targets: Sequence[Target]) -> None:
        """What the job is at. Raises `NotMine`."""
        self._change(job, worker, "targets = ?", _written(targets))

    def progress(self, job: Job, worker: str, done: int, total: int, *, moved: bool) -> None:
        """`moved`: documents were done since the last time, so earlier failures do not count. Raises `NotMine`."""
        forgiven = ", failures = 0, error = NULL" if moved else ""
        self._change(job, worker, f"done = ?, total = ?{forgiven}", done, total)

    def is_cancelling(self, job: Job) -> bool:
        with self._reading() as database:
            return bool(_select(database, "id = ? AND cancelling", job.id))

    def finish(self, job: Job, worker: str, status: str, error: str | None = None) -> None:
        """Raises `NotMine`."""
        changes = "status = ?, error = ?, finished_at = ?, worker = NULL, cancelling = 0"
        self._change(job, worker, changes, status, error, time.time())

    def give_back(self, job: Job, worker: str, *, error: str | None = None, pause: float = 0.0) -> None:
        """For later, and for whoever takes it then; with an `error` after a failure. Raises `NotMine`."""
        failed = ", failures = failures + 1, error = ?" if error else ""
        changes = f"status = 'queued', worker = NULL, not_before = ?{failed}"
        self._change(job, worker, changes, time.time() + pause, *([error] if error else []))

    def release(self, is_held: Callable[[Job], bool]) -> list[Job]:
        """Those whose worker was killed, or gave up without a word, are queued again. It counts as a failure until
        something is done.
        """
        with self._reading() as database:
            running = _select(database, "status = 'running'")
        released = []
        for job in running:
            if is_held(job):
                continue
            with self._transaction() as database:
                changed = database.execute(
                    "UPDATE jobs SET status = 'queued', worker = NULL, not_before = 0, failures = failures + 1, "
                    "error = coalesce(error, 'the process that ran it ended') "
                    "WHERE id = ? AND worker = ?", (job.id, job.worker)
                )  # fmt: skip
            if changed.rowcount:
                released.append(job)
        return released

    def _change(self, job: Job, worker: str, changes: str, *values: Any) -> None:
        with self._transaction() as database:
            changed = database.execute(
                f"UPDATE jobs SET {changes} WHERE id = ? AND status = 'running' AND worker = ?",
                (*values, job.id, worker),
            )
        if changed.rowcount != 1:
            raise NotMine(job.uuid)


@contextmanager
def _told() -> Iterator[None]:
    """Raises `JobsUnavailable` for SQLite's errors."""
    try:
        yield
    except sqlite3.Error as error:
        if is_full(error):
            raise JobsFull("the disk of the jobs' records is full: nothing was changed") from error
        raise JobsUnavailable(f"the jobs' records cannot be used now: {error}") from error


def _same(database: sqlite3.Connection, order: Order) -> Job | None:
    """The idempotency key's job, whatever became of it; else the dedupe key's that is not finished."""
    if order.idempotency_key is not None:
        for job in _select(database, "idempotency_key = ?", order.idempotency_key):
            return _checked(job, order, "idempotency_key")
    if order.dedupe_key is not None:
        for job in _select(database, "dedupe_key = ? AND status IN ('queued', 'running')", order.dedupe_key):
            return _checked(job, order, "dedupe_key")
    return None


def _checked(job: Job, order: Order, key: str) -> Job:
    if not job.is_same_work(order):
        message = f"the {key} is that of the job {job.id}, which is other work: send another key"
        raise JobConflict(message, param=key)
    return job


def _get(database: sqlite3.Connection, name: str) -> Job:
    is_id = name.isascii() and name.isdecimal() and len(name) < 19
    found = _select(database, "id = ?", int(name)) if is_id else _select(database, "uuid = ?", name)
    if not found:
        raise JobNotFound(f"there is no job {quoted(name)}")
    return found[0]


def _select(database: sqlite3.Connection, condition: str, *values: Any) -> list[Job]:
    rows = database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {condition}", values).fetchall()
    return [_job(dict(zip((field.name for field in fields(Job)), row, strict=True))) for row in rows]


def _job(row: dict[str, Any]) -> Job:
    row["owner"] = row["owner"].decode("utf-8", "surrogatepass")
    row["targets"] = [Target(name, version) for name, version in json.loads(row["targets"])]
    row["cancelling"] = bool(row["cancelling"])
    return Job(**row)


def _written(targets: Sequence[Target]) -> str:
    return json.dumps([[each.collection, each.version] for each in targets])


def _key(owner: str) -> bytes:
    """Compared byte by byte, as the catalog does."""
    return owner.encode("utf-8", "surrogatepass")
