"""Which index holds which collection: a small SQLite database beside the store, or for a store by URL in a folder here.

Why not in the store itself. A collection is replaced by one commit here, and two creations of one name cannot both
succeed, because (owner, name) is unique. Neither store offers that: Chroma changes an index's metadata without a
condition, so of two writers the last one wins unseen, and lists indexes of all owners only; Qdrant points an alias that
exists elsewhere without a word. And what a user calls a collection never becomes a name in the store.

A version's index goes creating -> current -> dropping, or filling -> current -> dropping:
- creating: made in the store, while nobody can see it yet. After a crash it is a leftover.
- filling: made for a re-embedding, with `changes`: the documents that were written meanwhile, which it does not have.
- dropping: replaced or deleted. It is a leftover until the store has dropped it.
Commits are on the disk when they return (synchronous=FULL), and a kill at any point leaves the state before or after.
"""

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from mlx_embeddings_server.errors import quoted
from mlx_embeddings_server.sqlite_file import LaterVersion, SqliteFile, is_busy, is_full
from mlx_embeddings_server.stores.base import (
    Collection,
    CollectionExists,
    CollectionNotFound,
    EmbeddingFacts,
    Metadata,
    Mismatch,
    StoreFull,
    StoreUnavailable,
    Version,
    Waiting,
    failed,
)

State = Literal["creating", "current", "filling", "dropping"]

_SCHEMA = """
CREATE TABLE store (prefix TEXT NOT NULL);
INSERT INTO store VALUES ('mlxes-' || lower(hex(randomblob(6))) || '-');
CREATE TABLE collections (
    id INTEGER PRIMARY KEY AUTOINCREMENT, owner BLOB NOT NULL, name TEXT NOT NULL, metadata TEXT NOT NULL,
    created_at REAL NOT NULL, UNIQUE (owner, name)
);
CREATE TABLE versions (
    name TEXT PRIMARY KEY, collection INTEGER, number INTEGER NOT NULL, state TEXT NOT NULL, facts TEXT NOT NULL,
    since REAL NOT NULL, complete INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX one_of_each ON versions (collection, state) WHERE state IN ('current', 'filling');
CREATE TABLE changes (
    change INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL, document TEXT NOT NULL,
    UNIQUE (collection, document)
);
"""


class CatalogInUse(Exception):
    """Another process has this folder's store open."""


class CatalogBroken(Exception):
    """The file is no catalog, or of a later version of this program, or cannot be opened."""


class Catalog:
    """Blocks for the disk. May be called from several threads."""

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        """`exclusive`: for a store inside the process, which a second process would damage.

        Raises `CatalogInUse` and `CatalogBroken`.
        """
        self.folder = path.parent
        self.is_exclusive = exclusive
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = SqliteFile(path, [_SCHEMA], exclusive=exclusive)
            with self._file.transaction() as database:
                (self.prefix,) = database.execute("SELECT prefix FROM store").fetchone()
        except sqlite3.Error as error:
            kind = CatalogInUse if is_busy(error) else CatalogBroken
            raise kind(f"{path}: {error}") from error
        except (OSError, LaterVersion) as error:
            raise CatalogBroken(f"{path}: {error}") from error

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk afterwards. Raises `StoreError`s, and `sqlite3.IntegrityError`."""
        try:
            with self._file.transaction() as database:
                yield database
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            if is_full(error):
                raise StoreFull("the disk of the collections' catalog is full: nothing was changed") from error
            raise failed("the collections' catalog", error) from error

    # Collections.

    def find(self, owner: str, name: str) -> Collection | None:
        with self._transaction() as database:
            return _find(database, owner, name)

    def get(self, owner: str, name: str) -> Collection:
        found = self.find(owner, name)
        if found is None:
            raise _no_such(name)
        return found

    def all_of(self, owner: str) -> list[Collection]:
        """By name."""
        with self._transaction() as database:
            names = database.execute(
                "SELECT name FROM collections WHERE owner = ? ORDER BY name", (_key(owner),)
            ).fetchall()
            return [found for (name,) in names if (found := _find(database, owner, name))]

    def begin_creation(self, facts: EmbeddingFacts) -> Version:
        """Its index may then be made in the store."""
        version = Version(self._new_name(), 1, facts)
        with self._transaction() as database:
            _insert(database, version, None, "creating")
        return version

    def finish_creation(self, owner: str, name: str, metadata: Metadata, version: Version) -> Collection:
        """Raises `CollectionExists`; the index is then a leftover."""
        try:
            with self._transaction() as database:
                cursor = database.execute(
                    "INSERT INTO collections (owner, name, metadata, created_at) VALUES (?, ?, ?, ?)",
                    (_key(owner), name, json.dumps(dict(metadata)), time.time()),
                )
                _move(database, version, "creating", "current", cursor.lastrowid)
                made = _find(database, owner, name)
                assert made is not None
                return made
        except sqlite3.IntegrityError as error:
            self.forsake(version)
            raise exists(name) from error

    def forsake(self, version: Version) -> None:
        """Its index is a leftover from now on."""
        with self._transaction() as database:
            database.execute(
                "UPDATE versions SET state = 'dropping', collection = NULL WHERE name = ?", (version.index,)
            )

    def remove(self, owner: str, name: str) -> list[str]:
        """The names of its indexes, which are leftovers from now on."""
        with self._transaction() as database:
            id = _id(database, owner, name)
            indexes = [index for (index,) in database.execute("SELECT name FROM versions WHERE collection = ?", (id,))]
            database.execute("UPDATE versions SET state = 'dropping', collection = NULL WHERE collection = ?", (id,))
            database.execute("DELETE FROM changes WHERE collection = ?", (id,))
            database.execute("DELETE FROM collections WHERE id = ?", (id,))
            return indexes

    # Re-embedding.

    def begin_filling(self, owner: str, name: str, facts: EmbeddingFacts) -> Version:
        """The version that is to take the current one's place; the one begun earlier, where it is of the same facts."""
        with self._transaction() as database:
            id, found = _id(database, owner, name), _find(database, owner, name)
            assert found is not None
            if found.filling:
                if difference := found.filling.facts.difference(facts):
                    raise CollectionExists(
                        f"the collection {name!r} is being re-embedded with {found.filling.facts.model} already "
                        f"({difference}): wait for it, or cancel it"
                    )
                return found.filling
            version = Version(self._new_name(), found.current.number + 1, facts)
            _insert(database, version, id, "filling")
            return version

    def record_changes(self, owner: str, name: str, version: Version, ids: Sequence[str]) -> None:
        """Documents were written to this version. Raises where it is the current one no more: then nothing was stored.

        Called after the write: so whoever reads the change afterwards reads the document as written.
        """
        with self._transaction() as database:
            found = _find(database, owner, name)
            if found is None:
                raise _no_such(name)
            if found.current.index != version.index:
                raise Mismatch(f"the collection {name!r} was re-embedded meanwhile: send the request again")
            if found.filling:
                id = _id(database, owner, name)
                database.executemany(
                    "INSERT OR REPLACE INTO changes (collection, document) VALUES (?, ?)", ((id, each) for each in ids)
                )

    def changes(self, version: Version) -> list[Waiting]:
        """Documents that were written while the version is filled, and not taken over since."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT document, change FROM changes WHERE collection = ? ORDER BY change",
                (_filling_of(database, version),),
            ).fetchall()
            return [Waiting(document, change) for document, change in rows]

    def is_complete(self, version: Version) -> bool:
        """All documents but the changed ones were seen in it."""
        with self._transaction() as database:
            _filling_of(database, version)
            (complete,) = database.execute("SELECT complete FROM versions WHERE name = ?", (version.index,)).fetchone()
            return bool(complete)

    def set_complete(self, version: Version) -> None:
        with self._transaction() as database:
            database.execute("UPDATE versions SET complete = 1 WHERE name = ?", (version.index,))

    def is_filling(self, version: Version) -> bool:
        with self._transaction() as database:
            found = database.execute(
                "SELECT 1 FROM versions WHERE name = ? AND state = 'filling'", (version.index,)
            ).fetchone()
            return found is not None

    def taken_over(self, version: Version, taken: Sequence[Waiting]) -> None:
        """Later changes of the same documents stay."""
        with self._transaction() as database:
            id = _filling_of(database, version)
            database.executemany(
                "DELETE FROM changes WHERE collection = ? AND document = ? AND change <= ?",
                ((id, each.id, each.change) for each in taken),
            )

    def switch(self, version: Version) -> str | None:
        """Make it the current one; the name of the replaced index. None, and nothing done: there are new changes."""
        with self._transaction() as database:
            id = _filling_of(database, version)
            if database.execute("SELECT 1 FROM changes WHERE collection = ? LIMIT 1", (id,)).fetchone():
                return None
            (old,) = database.execute(
                "SELECT name FROM versions WHERE collection = ? AND state = 'current'", (id,)
            ).fetchone()
            database.execute("UPDATE versions SET state = 'dropping', collection = NULL WHERE name = ?", (old,))
            _move(database, version, "filling", "current", id)
            return str(old)

    def abandon(self, version: Version) -> None:
        """Stop filling it. Its index is a leftover from now on."""
        with self._transaction() as database:
            id = _filling_of(database, version)
            database.execute("DELETE FROM changes WHERE collection = ?", (id,))
            database.execute(
                "UPDATE versions SET state = 'dropping', collection = NULL WHERE name = ?", (version.index,)
            )

    # Leftovers.

    def leftovers(self, creating_for: float) -> list[str]:
        """Indexes to drop: replaced and deleted ones, and those that are being created for so many seconds."""
        with self._transaction() as database:
            database.execute(
                "UPDATE versions SET state = 'dropping' WHERE state = 'creating' AND since <= ?",
                (time.time() - creating_for,),
            )
            return [name for (name,) in database.execute("SELECT name FROM versions WHERE state = 'dropping'")]

    def known(self) -> set[str]:
        with self._transaction() as database:
            return {name for (name,) in database.execute("SELECT name FROM versions")}

    def dropped(self, index: str) -> None:
        with self._transaction() as database:
            database.execute("DELETE FROM versions WHERE name = ? AND state = 'dropping'", (index,))

    def _new_name(self) -> str:
        return f"{self.prefix}{uuid.uuid4().hex}"


def exists(name: str) -> CollectionExists:
    return CollectionExists(f"there is a collection {name!r} already: choose another name", param="name")


def _no_such(name: str) -> CollectionNotFound:
    return CollectionNotFound(f"there is no collection {quoted(name)}", param="name")


def _key(owner: str) -> bytes:
    """Compared byte by byte: neither case nor Unicode's forms make two owners one."""
    return owner.encode("utf-8", "surrogatepass")


def _id(database: sqlite3.Connection, owner: str, name: str) -> int:
    row = database.execute("SELECT id FROM collections WHERE owner = ? AND name = ?", (_key(owner), name)).fetchone()
    if row is None:
        raise _no_such(name)
    return int(row[0])


def _find(database: sqlite3.Connection, owner: str, name: str) -> Collection | None:
    row = database.execute(
        "SELECT id, metadata, created_at FROM collections WHERE owner = ? AND name = ?", (_key(owner), name)
    ).fetchone()
    if row is None:
        return None
    id, metadata, created_at = row
    rows = database.execute("SELECT state, name, number, facts FROM versions WHERE collection = ?", (id,)).fetchall()
    versions = {
        state: Version(index, number, EmbeddingFacts(**json.loads(facts))) for state, index, number, facts in rows
    }
    return Collection(owner, name, json.loads(metadata), created_at, versions["current"], versions.get("filling"))


def _filling_of(database: sqlite3.Connection, version: Version) -> int:
    row = database.execute(
        "SELECT collection FROM versions WHERE name = ? AND state = 'filling'", (version.index,)
    ).fetchone()
    if row is None:
        raise CollectionNotFound("this re-embedding has ended: it was finished or cancelled, or its collection deleted")
    return int(row[0])


def _insert(database: sqlite3.Connection, version: Version, collection: int | None, state: State) -> None:
    database.execute(
        "INSERT INTO versions (name, collection, number, state, facts, since) VALUES (?, ?, ?, ?, ?, ?)",
        (version.index, collection, version.number, state, json.dumps(asdict(version.facts)), time.time()),
    )


def _move(database: sqlite3.Connection, version: Version, before: State, after: State, collection: Any) -> None:
    moved = database.execute(
        "UPDATE versions SET state = ?, collection = ?, since = ? WHERE name = ? AND state = ?",
        (after, collection, time.time(), version.index, before),
    )
    if moved.rowcount != 1:
        raise StoreUnavailable("what was being made was removed meanwhile: send the request again")
