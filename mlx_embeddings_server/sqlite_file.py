"""An SQLite file of what must not get lost: opened, made and changed in one way by all who keep one."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PATIENCE = 10.0  # seconds that another process may take for its transactions
_PATIENCE_EXCLUSIVE = 0.1


class LaterVersion(Exception):
    """The file was written by a later version of this program, and is left alone."""


class SqliteFile:
    """Blocks for the disk. May be called from several threads. Commits are on the disk when they return."""

    def __init__(self, path: Path, schemas: Sequence[str], *, exclusive: bool = False) -> None:
        """`schemas`: what makes the file of version 1 from an empty one, that of version 2 from it, and so on.
        `exclusive`: no other process may have it meanwhile.

        Raises `sqlite3.Error`, with SQLITE_BUSY where another process has it, and `LaterVersion`.
        """
        self._lock, self._reading_lock = threading.Lock(), threading.Lock()
        self._database = _connected(path, _PATIENCE_EXCLUSIVE if exclusive else _PATIENCE)
        self._reader = None if exclusive else _connected(path, _PATIENCE)
        try:
            if exclusive:
                self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            with self.transaction() as database:
                _bring_up_to_date(database, schemas)
        except (sqlite3.Error, LaterVersion):
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. Raises `sqlite3.Error`."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """What was committed last, without waiting for those who write. Not of an exclusive one.

        Raises `sqlite3.Error`.
        """
        assert self._reader is not None
        with self._reading_lock:
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")

    def close(self) -> None:
        with self._lock, self._reading_lock:
            self._database.close()
            if self._reader is not None:
                self._reader.close()


def _connected(path: Path, patience: float) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=patience)


def is_busy(error: sqlite3.Error) -> bool:
    """Another process has the file."""
    return _code(error) == sqlite3.SQLITE_BUSY


def is_full(error: sqlite3.Error) -> bool:
    """There is no room on the disk."""
    return _code(error) == sqlite3.SQLITE_FULL


def _code(error: sqlite3.Error) -> int:
    """0: what went wrong was not in SQLite itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _bring_up_to_date(database: sqlite3.Connection, schemas: Sequence[str]) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > len(schemas):
        raise LaterVersion("was written by a later version of mlx-embeddings-server")
    for number, schema in enumerate(schemas[version:], version + 1):
        for statement in _statements(schema):
            database.execute(statement)
        database.execute(f"PRAGMA user_version={number}")


def _statements(schema: str) -> Iterator[str]:
    """A trigger has semicolons inside."""
    statement = ""
    for part in schema.split(";")[:-1]:
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
