"""Stores that cannot be opened: in use, not installed, not there, broken, or wrongly named."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mlx_embeddings_server.settings import SettingsError
from mlx_embeddings_server.stores.opening import open_store
from tests.stores import MINI, run, run_script, text

OPENING = """
import sys
from pathlib import Path
from mlx_embeddings_server.settings import SettingsError
from mlx_embeddings_server.stores.opening import open_store

try:
    open_store(sys.argv[1], Path(sys.argv[2])).close()
    print("opened")
except SettingsError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["chroma", "qdrant"])
def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path: Path, kind: str) -> None:
    with closing(open_store(kind, tmp_path)) as store:
        said, errors = run_script(OPENING, kind, str(tmp_path)).communicate(timeout=60)
        assert "another process uses" in said and "give its URL" in said, said + errors
        with pytest.raises(SettingsError, match="another process uses"):
            open_store(kind, tmp_path)
        run(store.create("ada", "notes", MINI))
        run(store.upsert("ada", "notes", MINI, [text(1)]))
    said, errors = run_script(OPENING, kind, str(tmp_path)).communicate(timeout=60)
    assert said == "opened\n", errors


@pytest.mark.parametrize("kind", ["chroma", "qdrant"])
def test_a_missing_package_is_named_with_what_to_type(tmp_path: Path, kind: str) -> None:
    package = {"chroma": "chromadb", "qdrant": "qdrant_client"}[kind]
    script = f"import sys; sys.modules[{package!r}] = None\n{OPENING}"
    for target in (kind, f"{kind}+http://127.0.0.1:9"):
        said, errors = run_script(script, target, str(tmp_path)).communicate(timeout=60)
        assert f"uv sync --extra {kind}" in said and package in said, said + errors


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("", "known: chroma, qdrant"),
        ("weaviate", "'weaviate' is no store"),
        ("chroma:", "is no store"),
        ("redis://localhost", "redis:// is no store"),
        ("http://", "no valid host"),
        ("http://localhost:port", "no valid host and port"),
        ("http://ada:secret@localhost:8000", "give the key as collections_api_key"),
        ("qdrant+https://localhost?api-key=secret", "must not have a query"),
    ],
)
def test_settings_that_are_no_store_are_refused(tmp_path: Path, target: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as raised:
        open_store(target, tmp_path)
    assert "secret" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_catalog_that_is_none_or_of_a_later_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "chroma").mkdir()
    (tmp_path / "chroma" / "catalog.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(SettingsError, match="catalog cannot be opened.*not a database"):
        open_store("chroma", tmp_path)
    (tmp_path / "qdrant").mkdir()
    with closing(sqlite3.connect(tmp_path / "qdrant" / "catalog.sqlite3")) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(SettingsError, match="later version"):
        open_store("qdrant", tmp_path)
    (tmp_path / "broken" / "index").mkdir(parents=True)
    (tmp_path / "broken" / "index" / "chroma.sqlite3").write_bytes(b"not a database" * 1000)
    with pytest.raises(SettingsError, match="chroma cannot open .*not a database"):
        open_store(f"chroma:{tmp_path / 'broken'}", tmp_path)
    (tmp_path / "torn" / "index").mkdir(parents=True)
    (tmp_path / "torn" / "index" / "meta.json").write_text('{"collections"')
    with pytest.raises(SettingsError, match="qdrant cannot open"):
        open_store(f"qdrant:{tmp_path / 'torn'}", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="catalog cannot be opened"):
        open_store(f"chroma:{tmp_path / 'file'}", tmp_path)
