"""Files of records: made in one step, brought up to date, and left as they are where that cannot be."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mlx_embeddings_server.sqlite_file import LaterVersion, SqliteFile

FIRST = "CREATE TABLE notes (text TEXT); INSERT INTO notes VALUES ('one');"
SECOND = """
CREATE TABLE counts (notes INTEGER); INSERT INTO counts VALUES (1);
CREATE TRIGGER counted AFTER INSERT ON notes BEGIN UPDATE counts SET notes = notes + 1; SELECT 1; END;
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notes.sqlite3"


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        (found,) = database.execute("PRAGMA user_version").fetchone()
        return int(found)


def test_a_file_of_an_earlier_version_is_brought_up_to_date_and_keeps_what_it_has(path: Path) -> None:
    SqliteFile(path, [FIRST]).close()
    for _ in range(2):
        with closing(SqliteFile(path, [FIRST, SECOND])) as file, file.transaction() as database:
            assert database.execute("SELECT text FROM notes").fetchall() == [("one",)]
    with closing(SqliteFile(path, [FIRST, SECOND])) as file:
        with file.transaction() as database:
            database.execute("INSERT INTO notes VALUES ('two')")
        with file.reading() as database:
            assert database.execute("SELECT notes FROM counts").fetchall() == [(2,)]
    assert version(path) == 2


def test_what_fails_changes_nothing(path: Path) -> None:
    SqliteFile(path, [FIRST]).close()
    with pytest.raises(sqlite3.OperationalError):
        SqliteFile(path, [FIRST, "CREATE TABLE more (a); CREATE TABLE notes (b);"])
    assert version(path) == 1
    with closing(SqliteFile(path, [FIRST])) as file:
        with pytest.raises(ZeroDivisionError), file.transaction() as database:
            database.execute("DELETE FROM notes")
            raise ZeroDivisionError
        with file.reading() as database:
            assert database.execute("SELECT name FROM sqlite_schema").fetchall() == [("notes",)]
            assert database.execute("SELECT text FROM notes").fetchall() == [("one",)]


def test_a_file_of_a_later_version_is_left_alone(path: Path) -> None:
    SqliteFile(path, [FIRST, SECOND]).close()
    with pytest.raises(LaterVersion):
        SqliteFile(path, [FIRST])
    assert version(path) == 2


@pytest.mark.parametrize(("exclusive", "told"), [(True, "busy"), (False, "opened")])
def test_an_exclusive_file_is_one_processes_alone(path: Path, exclusive: bool, told: str) -> None:
    code = (
        "import sys, sqlite3; from pathlib import Path; from mlx_embeddings_server import sqlite_file as s\n"
        f"try: s.SqliteFile(Path(sys.argv[1]), [{FIRST!r}], exclusive={exclusive}); print('opened')\n"
        "except sqlite3.Error as error: print('busy' if s.is_busy(error) else error)"
    )
    with closing(SqliteFile(path, [FIRST], exclusive=exclusive)):
        ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=30)
    assert ended.stdout.strip() == told, ended.stderr
