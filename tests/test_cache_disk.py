"""The cache's second layer on disk: it outlives the server, stays in its folder, and runs nothing that is there."""

import asyncio
import os
import pickle
import re
import sqlite3
import stat
from pathlib import Path
from traceback import format_exception
from typing import Any

import pytest
from diskcache import Cache
from diskcache.core import MODE_BINARY, MODE_PICKLE

from mlx_embeddings_server.cache.disk import DiskStore
from mlx_embeddings_server.cache.shared import UnusableStore, open_store
from mlx_embeddings_server.settings import SettingsError, load_settings
from tests.cached import assert_right, cache, computed, embed, until
from tests.scripted import scripted_server
from tests.server import Server

TEXTS = ["a", "b", "c"]


def database(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "mlx-embeddings-cache" / "cache.db", isolation_level=None)


def filled(folder: Path, tmp_path: Path) -> None:
    """The folder, as a server leaves it that has embedded TEXTS."""
    model = tmp_path / "filling"
    model.mkdir()
    with scripted_server(model, cache="yes", cache_url=folder.as_uri()) as server:
        embed(server, *TEXTS)
        assert server.stop() == 0


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_server_that_starts_again_finds_what_it_had_computed(tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / "of mine"
    filled(folder, tmp_path)
    assert stat.S_IMODE((folder / "mlx-embeddings-cache").stat().st_mode) == 0o700
    with scripted_server(tmp_path, cache="yes", cache_url=folder.as_uri()) as server:
        assert_right(embed(server, *TEXTS), *TEXTS)
        assert computed(server) == 0
        assert cache(server)["layers"]["disk"] == {"hits": 3, "misses": 0, "failures": 0}


def test_a_planted_pickle_is_not_run(tmp_path: Path) -> None:
    folder, proof = tmp_path / "cache", tmp_path / "proof"
    filled(folder, tmp_path)
    with database(folder) as connection:
        planted = (MODE_PICKLE, pickle.dumps(Planted(proof)))
        assert connection.execute("UPDATE Cache SET mode = ?, value = ?", planted).rowcount == 3
    connection.close()
    with scripted_server(tmp_path, cache="yes", cache_url=folder.as_uri()) as server:
        assert_right(embed(server, *TEXTS), *TEXTS)
        assert computed(server) == 3
        assert "did not write" in server.log
    assert not proof.exists()


def test_a_planted_pickle_would_be_run_by_diskcache_itself(tmp_path: Path) -> None:
    folder, proof = tmp_path / "cache", tmp_path / "proof"
    with Cache(folder) as plain:
        plain.set(b"key", Planted(proof))
        plain.get(b"key")
    assert proof.exists()


def test_files_outside_the_folder_are_neither_read_nor_removed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    outside.write_bytes(b"x")
    key = bytes(32)

    async def work() -> None:
        store = DiskStore(folder, ttl=None, max_bytes=None)
        await store.put({key: bytes(100_000)})
        assert await store.get([key]) == [bytes(100_000)]
        with database(folder) as connection:
            connection.execute("UPDATE Cache SET mode = ?, filename = '../../outside'", (MODE_BINARY,))
        connection.close()
        assert await store.get([key]) == [b""]
        assert await store.clear(frozenset()) == 1
        await store.aclose()

    asyncio.run(work())
    assert outside.read_bytes() == b"x"


def test_the_folder_does_not_grow_beyond_its_bound(tmp_path: Path) -> None:
    async def work() -> None:
        store = DiskStore(tmp_path, ttl=None, max_bytes=2_000_000)
        keys = [number.to_bytes(32, "big") for number in range(100)]
        for key in keys:
            await store.put({key: os.urandom(100_000)})
        assert (await store.get(keys[-1:]))[0] is not None and await store.get(keys[:1]) == [None]
        await store.aclose()

    asyncio.run(work())
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.val")) <= 2_100_000


def test_what_is_too_old_is_not_found(tmp_path: Path) -> None:
    async def work() -> None:
        store = DiskStore(tmp_path, ttl=0.2, max_bytes=None)
        await store.put({bytes(32): b"value"})
        assert await store.get([bytes(32)]) == [b"value"]
        await asyncio.sleep(0.25)
        assert await store.get([bytes(32)]) == [None]
        await store.aclose()

    asyncio.run(work())


def test_requests_go_on_while_the_database_is_locked_or_broken(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    filled(folder, tmp_path)
    with scripted_server(tmp_path, cache="yes", cache_url=folder.as_uri()) as server:
        connection = database(folder)
        connection.execute("BEGIN EXCLUSIVE")
        assert_right(embed(server, "new", "a"), "new", "a")
        until(lambda: "is left out" in server.log)
        connection.execute("ROLLBACK")
        connection.close()
        (folder / "mlx-embeddings-cache" / "cache.db").write_bytes(b"no database" * 1000)
        assert_right(embed(server, "newer", "b"), "newer", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "yes", "cache_url": "http://localhost"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_url": "redis://"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_url": "file:///"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_url": "redis://:se#cret@localhost:1/0"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_url": "redis://:12/34@localhost:1/0"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_url": "redis://:12?34@localhost:1/0"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_url": "file:///cache?size=1"}, "--cache-url .*must be redis://"),
        ({"cache": "yes", "cache_ttl": "0"}, "--cache-ttl .*is 0"),
        ({"cache": "yes", "cache_entries": "0"}, "--cache-entries .*greater than or equal to 1"),
        ({"cache": "yes", "cache_bytes": "lots"}, "--cache-bytes .*must be a size"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in settings.items():
        monkeypatch.setenv(f"MLX_EMBEDDINGS_{name.upper()}", setting)
    with pytest.raises(SettingsError, match=message):
        load_settings({"model": ["any"]})


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://user:s%2Fcret@localhost:6379/0?socket_keepalive=yes",
        "rediss://[::1]:6379",
        "unix:///run/redis.sock?db=1",
        "file:///var/a folder",
        "file:///var/cache/",
    ],
)
def test_urls_of_layers_are_taken_as_they_are(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_EMBEDDINGS_CACHE_URL", url)
    taken = load_settings({"model": ["any"]}).cache_url
    assert taken is not None and taken.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret:more@localhost/0?db=1&socket_timeout=secret",
        "redis://:se?cret@host:1",
        "redis://:secret@localhost/0?unknown=1",
    ],
)
def test_the_error_of_a_url_tells_nothing_of_its_password(url: str) -> None:
    with pytest.raises(UnusableStore, match="must be redis://") as refused:
        open_store(url, ttl=None, disk_bytes=None)
    assert not re.search("se(cret)?'", "".join(format_exception(refused.value)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cache", "--cache-url", "file:///dev/null/cache"), "--cache-url: the folder cannot be used"),
        (("--cache", "--cache-url", "redis://localhost:port"), "--cache-url: "),
        (("--cache-url", "redis://localhost:1"), "--cache-url is of use with --cache alone"),
    ],
)
def test_a_layer_that_cannot_be_had_ends_the_start(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RuntimeError, match=message) as refused, Server("--model", str(tmp_path), *flags):
        pass
    assert "Traceback" not in str(refused.value)


def test_a_large_request_leaves_what_it_has_written(tmp_path: Path) -> None:
    async def fill() -> list[int]:
        store = DiskStore(tmp_path, ttl=None, max_bytes=2_000_000)
        found = []
        for turn in range(4):
            values = {f"{turn}-{number}".encode(): b"x" * 2000 for number in range(400)}
            await store.put(values)
            found.append(sum(each is not None for each in await store.get(list(values))))
        await store.aclose()
        return found

    assert all(kept > 300 for kept in asyncio.run(fill()))
