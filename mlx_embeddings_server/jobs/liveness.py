"""Which workers are alive: each holds a lock that the system lets go when its process ends, however it ends.

So nobody waits for a lease to expire after a kill, and no clock or long pause makes a second worker take a job.
SQLite's lock of a file of its own is one that all systems have.
"""

import sqlite3
import uuid
from contextlib import suppress
from pathlib import Path


class Liveness:
    """One worker's name and lock. `folder` is the same for all workers."""

    def __init__(self, folder: Path) -> None:
        """Raises `sqlite3.Error`."""
        self._folder = folder
        self.name = uuid.uuid4().hex
        self._lock = _locked(_file(folder, self.name))

    def is_alive(self, name: str) -> bool:
        """What is left of a dead one is removed."""
        if name == self.name:
            return True
        file = _file(self._folder, name)
        if not file.exists():
            return False
        try:
            _locked(file).close()
        except sqlite3.OperationalError:
            return True
        file.unlink(missing_ok=True)
        return False

    def clean_up(self) -> None:
        """Remove what workers without a job have left behind."""
        for file in self._folder.glob(_file(self._folder, "*").name):
            self.is_alive(file.stem.removeprefix("worker-"))

    def close(self) -> None:
        self._lock.close()
        with suppress(OSError):
            _file(self._folder, self.name).unlink()


def _file(folder: Path, name: str) -> Path:
    return folder / f"worker-{name}.lock"


def _locked(file: Path) -> sqlite3.Connection:
    """The lock is the connection's, until it is closed. Raises `sqlite3.OperationalError`, where another has it."""
    lock = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:
        lock.close()
        raise
    return lock
