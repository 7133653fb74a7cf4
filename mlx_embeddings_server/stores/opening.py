"""From a setting to a store: `chroma`, `qdrant:/data/pages`, `http://chroma:8000`, `qdrant+https://qdrant.example`."""

import hashlib
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from mlx_embeddings_server.settings import SettingsError
from mlx_embeddings_server.stores.base import Index, StoreError
from mlx_embeddings_server.stores.catalog import Catalog, CatalogBroken, CatalogInUse
from mlx_embeddings_server.stores.collections import Collections
from mlx_embeddings_server.stores.store import VectorStore

Engine = Literal["chroma", "qdrant"]
_SCHEMES: dict[str, tuple[Engine, str]] = {
    "http": ("chroma", "http"),
    "https": ("chroma", "https"),
    "chroma+http": ("chroma", "http"),
    "chroma+https": ("chroma", "https"),
    "qdrant+http": ("qdrant", "http"),
    "qdrant+https": ("qdrant", "https"),
}
_KNOWN = "chroma, qdrant, chroma:FOLDER, qdrant:FOLDER, http://HOST:8000 (Chroma) or qdrant+http://HOST:6333"


def open_store(target: str, folder: Path, *, api_key: str | None = None, timeout: float = 30.0) -> VectorStore:
    """`folder`: for what is kept on this machine, of a store inside the process all, of one by URL the catalog.

    `timeout`: seconds for each reply of a store by URL. It need not answer yet. Raises `SettingsError`.
    """
    engine, url, path = parse_target(target)
    if url is not None:
        catalog_id = hashlib.sha256(f"{engine} {url}".encode()).hexdigest()[:16]
        catalog = _open_catalog(folder / f"{engine}-{catalog_id}", exclusive=False)
        return _joined(catalog, engine, url, None, api_key, timeout)
    place = Path(path).expanduser() if path else folder / engine
    return _joined(_open_catalog(place, exclusive=True), engine, None, place / "index", None, timeout)


def parse_target(target: str) -> tuple[Engine, str | None, str]:
    """Engine, URL of a server, and of a store inside the process the folder, where one is named. Raises
    `SettingsError`.
    """
    scheme, separator, rest = target.partition("://")
    if separator:
        if scheme.lower() not in _SCHEMES:
            raise SettingsError(f"collections: {scheme}:// is no store; known: {_KNOWN}")
        engine, protocol = _SCHEMES[scheme.lower()]
        url = f"{protocol}://{rest}".rstrip("/")
        _check_url(url)
        return engine, url, ""
    name, separator, path = target.partition(":")
    if name not in ("chroma", "qdrant") or (separator and not path):
        raise SettingsError(f"collections: {target!r} is no store; known: {_KNOWN}")
    return "chroma" if name == "chroma" else "qdrant", None, path


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise SettingsError("collections: the URL has no valid host and port; such as http://localhost:8000")
    if parts.username or parts.password:
        raise SettingsError("collections: the URL holds a user or a password: give the key as collections_api_key")
    if parts.query or parts.fragment:
        raise SettingsError("collections: the URL must not have a query or a fragment")


def _open_catalog(place: Path, *, exclusive: bool) -> Catalog:
    path = place / "catalog.sqlite3"
    try:
        return Catalog(path, exclusive=exclusive)
    except CatalogInUse as error:
        raise SettingsError(
            f"collections: another process uses {place}. A store inside the process belongs to one: choose another "
            "folder, or run the store as a server of its own (`chroma run`, or Qdrant) and give its URL"
        ) from error
    except CatalogBroken as error:
        raise SettingsError(f"collections: the catalog cannot be opened: {error}") from error


def _joined(
    catalog: Catalog, engine: Engine, url: str | None, path: Path | None, api_key: str | None, timeout: float
) -> VectorStore:
    try:
        index = _open_index(engine, url, path, api_key, timeout)
    except ModuleNotFoundError as error:
        catalog.close()
        raise SettingsError(
            f"collections: {engine} needs the package {error.name}, which is not installed: uv sync --extra {engine}"
        ) from error
    except StoreError as error:
        catalog.close()
        raise SettingsError(f"collections: {engine} cannot open {path}: {error.__cause__ or error}") from error
    return VectorStore(Collections(index, catalog, timeout), timeout=timeout)


def _open_index(engine: Engine, url: str | None, path: Path | None, api_key: str | None, timeout: float) -> Index:
    """The packages take seconds to import, and need not be there where they are not asked for."""
    if engine == "chroma":
        from mlx_embeddings_server.stores.chroma import open_chroma

        return open_chroma(url, path, api_key, timeout)
    from mlx_embeddings_server.stores.qdrant import open_qdrant

    return open_qdrant(url, path, api_key, timeout)
