"""The jobs' records and the workers' locks: one job has one worker, whatever ends when."""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_embeddings_server.jobs.base import Job, JobConflict, JobNotFound, JobsFull, JobsUnavailable, Order, Target
from mlx_embeddings_server.jobs.liveness import Liveness
from mlx_embeddings_server.jobs.records import NotMine, Records, RecordsBroken

ORDER = Order("ada", "new", "local", 50, collection="notes")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    records = Records(tmp_path / "jobs.sqlite3")
    yield records
    records.close()


def queued(records: Records, collection: str = "notes", **fields: object) -> Job:
    return records.add(replace(ORDER, collection=collection, **fields), [collection])[0]  # type: ignore[arg-type]


def test_of_many_workers_in_two_processes_one_gets_a_job(records: Records, tmp_path: Path) -> None:
    other = Records(tmp_path / "jobs.sqlite3")
    for _ in range(5):
        job = queued(records)
        with ThreadPoolExecutor(8) as threads:
            taken = list(threads.map(lambda n: (records, other)[n % 2].take(job.uuid, f"w{n}"), range(8)))  # noqa: B023
        (mine,) = [each for each in taken if each]
        assert mine.status == "running" and mine.attempts == 1 and mine.worker is not None
        records.finish(mine, mine.worker, "completed")
    other.close()


def test_a_collection_is_one_running_jobs_at_a_time(records: Records) -> None:
    first, second = queued(records), queued(records)
    elsewhere, others = queued(records, "other"), queued(records, owner="bob")
    mine = records.take(first.uuid, "a")
    assert mine and records.take(second.uuid, "b") is None
    assert records.take(elsewhere.uuid, "b") and records.take(others.uuid, "c")
    records.finish(mine, "a", "completed")
    assert records.get(second.uuid).status == "queued"


def test_a_worker_that_lost_its_job_changes_nothing_any_more(records: Records) -> None:
    job = queued(records)
    mine = records.take(job.uuid, "a")
    assert mine and records.release(lambda each: False)[0].uuid == job.uuid
    assert records.take(job.uuid, "b")
    changes: list[Callable[[], None]] = [
        lambda: records.finish(mine, "a", "completed"),
        lambda: records.give_back(mine, "a"),
        lambda: records.note(mine, "a", targets=[Target("notes", 3)]),
        lambda: records.progress(mine, "a", 5, 10, moved=True),
    ]
    for change in changes:
        with pytest.raises(NotMine):
            change()
    now = records.get(job.uuid)
    assert (now.status, now.worker, now.done, now.attempts, now.failures) == ("running", "b", 0, 2, 1)


def test_failures_in_a_row_count_until_something_is_done(records: Records) -> None:
    job = queued(records)
    for failures in (1, 2):
        mine = records.take(job.uuid, "a")
        assert mine
        records.give_back(mine, "a", error="the store is away")
        assert records.get(job.uuid).failures == failures
    mine = records.take(job.uuid, "a")
    assert mine
    records.progress(mine, "a", 1, 10, moved=False)
    assert records.get(job.uuid).failures == 2
    records.progress(mine, "a", 2, 10, moved=True)
    now = records.get(job.uuid)
    assert (now.failures, now.error, now.done, now.total) == (0, None, 2, 10)


def test_a_job_waits_for_as_long_as_was_said(records: Records) -> None:
    job = queued(records)
    mine = records.take(job.uuid, "a")
    assert mine
    records.give_back(mine, "a", error="away", pause=60)
    assert records.take(job.uuid, "a") is None and records.due() == []
    assert records.cancel(str(job.id)).cancelling  # what was begun is to be dropped by a worker, at once
    assert [each.uuid for each in records.due()] == [job.uuid]


def test_a_clock_that_was_set_back_holds_no_job_up(records: Records, tmp_path: Path) -> None:
    job = queued(records)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as database, database:
        database.execute("UPDATE jobs SET not_before = ?", (time.time() + 86_400,))
    assert [each.uuid for each in records.due()] == [job.uuid] and records.take(job.uuid, "a")


def test_of_many_jobs_the_first_ones_are_due(records: Records) -> None:
    for number in range(150):
        queued(records, f"notes-{number}", priority=150 - number)
    assert [each.priority for each in records.due()] == list(range(1, 101))
    assert len(records.all_of("queued", 20, 140)[0]) == 10


def test_the_last_ten_thousand_are_kept_and_none_that_waits(records: Records, tmp_path: Path) -> None:
    waiting, done = queued(records), queued(records, "other")
    assert records.take(done.uuid, "a")
    records.finish(done, "a", "completed")
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as database, database:
        database.execute("UPDATE sqlite_sequence SET seq = 10001")
    assert queued(records, "third").id == 10_002
    assert [each.id for each in records.all_of(None, 10, 0)[0]] == [10_002, waiting.id]


def test_reading_does_not_wait_for_those_who_write(records: Records, tmp_path: Path) -> None:
    job = queued(records)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        assert records.get(job.uuid) == job and records.all_of(None, 10, 0) == ([job], 1)
        assert records.totals().unfinished == {"queued": 1, "running": 0}
        assert time.monotonic() - started < 1


def test_a_full_disk_is_told_as_what_it_is(records: Records) -> None:
    job = queued(records)
    with records._transaction() as database:
        database.execute("PRAGMA max_page_count = 1")  # no more than there are
    with pytest.raises(JobsFull) as told:
        for number in range(100):
            queued(records, operation_id="long " * 1000, idempotency_key=str(number))
    assert told.value.status == 507 and isinstance(told.value, JobsUnavailable)
    assert records.get(job.uuid) == job


def test_totals_are_of_all_that_were_ever_done(records: Records) -> None:
    mine = records.take(queued(records).uuid, "a")
    assert mine
    for done in (3, 5):
        records.progress(mine, "a", done, 8, moved=True)
    records.give_back(mine, "a")
    mine = records.take(mine.uuid, "b")
    assert mine
    records.progress(mine, "b", 8, 8, moved=True)
    records.finish(mine, "b", "completed")
    records.cancel(queued(records).uuid)
    waiting = queued(records)
    totals = records.totals()
    assert totals.documents == 8 and totals.unfinished == {"queued": 1, "running": 0}
    assert {status: jobs for status, (jobs, _) in totals.finished.items()} == {
        "completed": 1,
        "failed": 0,
        "cancelled": 1,
    }
    now = records.get(mine.uuid)
    assert now.finished_at and now.started_at
    assert totals.finished["completed"][1] == pytest.approx(now.finished_at - now.started_at)
    assert totals.oldest_seconds == pytest.approx(time.time() - waiting.created_at, abs=1)


def test_keys_are_looked_at_and_taken_in_one_step(records: Records) -> None:
    order = replace(ORDER, idempotency_key="k", dedupe_key="d")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: records.add(order, ["notes"]), range(16)))
    assert len({job.id for job, _ in made}) == 1 and [is_new for _, is_new in made].count(True) == 1
    with pytest.raises(JobConflict, match="other work"):
        records.add(replace(order, model="third"), ["notes"])
    with pytest.raises(JobConflict, match="other work"):
        records.add(replace(order, owner="bob"), ["notes"])
    with pytest.raises(JobConflict, match="dedupe_key is that of the job 1, which is other work"):
        records.add(replace(order, idempotency_key=None, collection="letters"), ["letters"])
    (job, _), *_ = made
    mine = records.take(job.uuid, "a")
    assert mine
    records.finish(mine, "a", "failed", "why")
    assert records.same(order) == records.get(job.uuid)  # the one key holds for good, the other does not
    assert records.same(replace(order, idempotency_key=None)) is None


def test_names_of_jobs_are_ids_or_uuids(records: Records) -> None:
    job = queued(records)
    assert records.get(str(job.id)) == records.get(job.uuid) == job
    for name in ("0", "-1", "2", "9" * 30, "١", "", "' OR 1 --"):
        with pytest.raises(JobNotFound):
            records.get(name)


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(RecordsBroken, match="later version"):
        Records(tmp_path / "jobs.sqlite3")


def test_a_worker_is_alive_until_its_process_ends_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from mlx_embeddings_server.jobs.liveness import Liveness\n"
        "mine = Liveness(pathlib.Path(sys.argv[1])); print(mine.name, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        mine = Liveness(tmp_path)
        assert mine.is_alive(name) and mine.is_alive(mine.name) and not mine.is_alive("nobody")
        mine.clean_up()
        assert mine.is_alive(name)
        process.kill()
        process.wait()
        mine.clean_up()
        assert [each.name for each in tmp_path.glob("*.lock")] == [f"worker-{mine.name}.lock"]
        assert not mine.is_alive(name)
    mine.close()
    assert not list(tmp_path.glob("*.lock*"))
