"""Dense vectors in Chroma: inside this process with its files in a folder, or a Chroma server by URL.

An index is a Chroma collection in cosine space: the image's URL or data URI as `uris`, the text among the metadata. Of
`documents` Chroma would index all trigrams, which takes several times as long as all the rest, for searches that nobody
asks for. Inside the process, what an upsert has acknowledged is in SQLite and fsynced; a server gives what its own disk
gives.

Inside the process a write lets nothing else of the process run (Chroma holds Python's lock all the time): it is done in
small parts.

Chroma searches along a graph (hnswlib's), which may lead no longer to a document once others were replaced or deleted
(chroma-core/chroma#7758): of some hundred documents, most of them replaced, one in ten thousand was found by no query.
So all vectors of a small index are compared here, where nobody else can write to it: inside the process.

Four things that Chroma leaves to its callers are done here:
- It puts what one write has into its graph in parallel, where new points get lost beside others that are replaced: each
  kind is a write of its own.
- An upsert joins new metadata with the old: keys that are gone are removed by name.
- Dropped vectors stay on the disk: the folder of an index that is no longer in Chroma's tables is removed.
- After a write that failed inside the process, as on a full disk, a later one may hang: Chroma is opened anew first.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import chromadb
import chromadb.errors
import httpx
import numpy as np
from cachetools import LRUCache
from chromadb.api.client import Client
from chromadb.api.collection_configuration import CreateHNSWConfiguration
from chromadb.api.models.Collection import Collection as Records
from numpy.typing import NDArray

from mlx_embeddings_server.stores.base import (
    PARTS,
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    IndexGone,
    Kind,
    Part,
    StoreError,
    StoreFull,
    StoreUnavailable,
    failed,
    free_bytes,
)
from mlx_embeddings_server.stores.batches import batches
from mlx_embeddings_server.stores.chroma_folder import remove_dead_folders
from mlx_embeddings_server.stores.chroma_server import NO_CHROMA, ChromaServer, client_settings, sessions_of
from mlx_embeddings_server.stores.filters import OWN, Comparison, Group, Where
from mlx_embeddings_server.stores.vector_table import MOST_BYTES, VectorTable, VectorTables

# Of the ten nearest of 6,000 vectors spread like texts', 99.8% are found; 98.6% with Chroma's default of 100.
_HNSW: CreateHNSWConfiguration = {"space": "cosine", "ef_construction": 200, "ef_search": 200}
_FETCH_AT_ONCE = 1000
_KEYS_AT_ONCE = 16
_COLUMNS: Mapping[Part, str] = {"text": "metadatas", "image": "uris", "metadata": "metadatas"}
_TEXT = f"{OWN}text"
_MAX_BYTES = 30_000_000  # of one request: a Chroma server refuses 40 MB
# Of one write inside the process: these take some 50 ms.
_MAX_BYTES_INSIDE = 250_000
_DELETE_INSIDE = 100
_LITTLE_SPACE = 16 * 1024 * 1024  # where the disk is taken to be full when something fails
_ROOM = 1024 * 1024
_FULL = "the disk of the Chroma store is full: make room, then send the request again"


def open_chroma(
    url: str | None, path: Path | None, api_key: str | None, timeout: float, *, table_bytes: int = MOST_BYTES
) -> "ChromaIndex":
    """`path` of an embedded one: up to `table_bytes` of vectors are all compared. A server need not answer yet.

    Raises `StoreUnavailable`.
    """
    if url is not None:
        server = ChromaServer(url, api_key, timeout)
        return ChromaIndex(server.connect, server.ask)
    assert path is not None

    def connect() -> Client:
        return cast("Client", chromadb.PersistentClient(path=str(path), settings=client_settings()))

    index = ChromaIndex(connect, lambda: None, path, table_bytes)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_dead_folders(path)
    index.check()
    return index


# What is said of a collection while its parts are being dropped.
_HALF_DROPPED = "Missing metadata segment"


class ChromaIndex:
    name = "chroma"
    kinds: tuple[Kind, ...] = ("dense",)

    def __init__(
        self,
        connect: Callable[[], Client],
        ask: Callable[[], None],
        path: Path | None = None,
        table_bytes: int = MOST_BYTES,
    ) -> None:
        """At the first use, `connect` is called by one thread, after `ask`. `path`: the folder of an embedded one."""
        self._connect = connect
        self._ask = ask
        self._path = path
        self._tables = VectorTables(table_bytes)
        self._client: Client | None = None
        self._max_batch = 0
        self._lock = threading.Lock()
        self._known: LRUCache[str, Records] = LRUCache(1024)
        self._has_failed = False  # at writing, since it was opened
        self._gate = Gate()
        self._one_writer: AbstractContextManager[object] = threading.Lock() if path else nullcontext()

    def create(self, index: str, facts: EmbeddingFacts, label: Mapping[str, str]) -> None:
        with self._writing(index):
            self._opened().get_or_create_collection(
                index, embedding_function=None, metadata=dict(label), configuration={"hnsw": _HNSW}
            )

    def drop(self, index: str) -> None:
        with self._lock:
            self._known.pop(index, None)
        with suppress(IndexGone), self._writing(index):
            self._opened().delete_collection(index)
        self._tables.forget(index)
        if self._path is not None:
            remove_dead_folders(self._path)

    def indexes(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            client, at_once = self._opened(), 1000
            found: list[str] = []
            while page := client.list_collections(limit=at_once, offset=len(found)):
                found += [each.name for each in page]
                if len(page) < at_once:
                    break
        return [name for name in found if name.startswith(prefix)]

    def count(self, index: str) -> int:
        with self._errors(index):
            return self._records(index).count()

    def upsert(self, index: str, facts: EmbeddingFacts, documents: Sequence[EmbeddedDocument]) -> None:
        with self._writing(index):
            records = self._records(index)
            most_bytes = _MAX_BYTES if self._path is None else _MAX_BYTES_INSIDE
            for batch in batches(documents, self._max_batch, most_bytes, bytes_of_number=6):
                ids = [each.document.id for each in batch]
                before = _keys_of(records, ids)
                known = [each for each in batch if each.document.id in before]
                new = [each for each in batch if each.document.id not in before]
                for part in filter(None, (known, new)):
                    ids = [each.document.id for each in part]
                    vectors = np.stack([each.vectors for each in part])
                    metadatas = [_replacing(before.get(each.document.id, ()), each.document) for each in part]
                    records.upsert(
                        ids=ids,
                        embeddings=vectors,
                        uris=[each.document.image or "" for each in part],
                        metadatas=cast("Any", metadatas),
                    )
                    self._tables.put(index, ids, vectors)

    def ids(self, index: str, where: Where | None = None, limit: int | None = None, offset: int = 0) -> list[str]:
        with self._errors(index):
            return self._records(index).get(where=translated(where), limit=limit, offset=offset, include=[])["ids"]

    def fetch(self, index: str, ids: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Document]:
        found: dict[str, Document] = {}
        columns = cast("Any", list({_COLUMNS[each] for each in parts}))
        with self._errors(index):
            records = self._records(index)
            for start in range(0, len(ids), _FETCH_AT_ONCE):
                reply: Mapping[str, Any] = records.get(ids=list(ids[start : start + _FETCH_AT_ONCE]), include=columns)
                found |= {each.id: each for each in _documents(reply, parts)}
        return [found[id] for id in ids if id in found]

    def delete(self, index: str, ids: Sequence[str]) -> None:
        at_once = _FETCH_AT_ONCE if self._path is None else _DELETE_INSIDE
        with self._writing(index):
            for start in range(0, len(ids), at_once):
                some = list(ids[start : start + at_once])
                self._records(index).delete(ids=some)
                self._tables.remove(index, some)

    def query(
        self, index: str, facts: EmbeddingFacts, vectors: NDArray[np.float32], limit: int, where: Where | None
    ) -> list[tuple[str, float]]:
        table = self._table(index, facts.dimension)
        if table is not None:
            return table.nearest(vectors, limit, None if where is None else self.ids(index, where))
        with self._errors(index):
            reply: Mapping[str, Any] = self._records(index).query(
                query_embeddings=vectors[np.newaxis],
                n_results=limit,
                where=translated(where),
                include=["distances"],
            )
        return [(id, 1 - far) for id, far in zip(reply["ids"][0], reply["distances"][0], strict=True)]

    def _table(self, index: str, dimension: int) -> VectorTable | None:
        """With all vectors of the index. None, where it has too many, or is in a server."""
        if self._path is None or self._tables.is_too_large(index):
            return None
        if (found := self._tables.find(index)) is not None:
            return found
        with self._one_writer, self._errors(index):  # nothing is written meanwhile
            records = self._records(index)
            if (found := self._tables.find(index)) is None and self._tables.takes(index, records.count(), dimension):
                found = _table_of(records, dimension)
                self._tables.add(index, found)
            return found

    def check(self) -> None:
        with self._errors(""):
            client = self._opened()
            try:
                client.heartbeat()
            except (KeyError, TypeError) as error:
                raise StoreUnavailable(NO_CHROMA) from error

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                sessions = sessions_of(self._client)
                self._client.close()
                self._client = None
                self._known.clear()
                for session in sessions:  # which it leaves open
                    session.close()

    def _opened(self) -> Client:
        if self._client is None:
            self._ask()
        with self._lock:
            if self._client is None:
                client = self._connect()
                self._max_batch = client.get_max_batch_size()
                self._client = client
            return self._client

    def _records(self, index: str) -> Records:
        client = self._opened()
        with self._lock:
            known = self._known.get(index)
        if known is None:
            known = client.get_collection(index, embedding_function=None)
            with self._lock:
                self._known[index] = known
        return known

    @contextmanager
    def _writing(self, index: str) -> Iterator[None]:
        with self._one_writer:
            if self._path is not None and self._has_failed:
                # Not before there is room: it might not open, and until then it can be read.
                if free_bytes(self._path) < _ROOM:
                    raise StoreFull(_FULL)
                with self._gate.alone():
                    self.close()
                self._has_failed = False
            try:
                with self._errors(index):
                    yield
            except BaseException as error:
                self._tables.forget(index)  # nobody knows what was written
                self._has_failed = self._has_failed or isinstance(error, StoreError)
                raise

    @contextmanager
    def _errors(self, index: str) -> Iterator[None]:
        try:
            with self._gate.shared():
                yield
        except chromadb.errors.ChromaError as error:
            if isinstance(error, chromadb.errors.NotFoundError) or _HALF_DROPPED in str(error):
                with self._lock:
                    self._known.pop(index, None)
                raise IndexGone(index) from error
            if self._is_full(str(error)):
                raise StoreFull(_FULL) from error
            raise failed("Chroma", error) from error
        except httpx.TimeoutException as error:
            raise StoreUnavailable("Chroma does not answer in time: try again later") from error
        except httpx.HTTPError as error:
            raise StoreUnavailable("Chroma does not answer: is its server running?") from error
        except ValueError as error:
            # Its client's own word for a server that it cannot reach.
            if "Could not connect" not in str(error):
                raise
            raise StoreUnavailable("Chroma does not answer: is its server running?") from error

    def _is_full(self, message: str) -> bool:
        if "disk is full" in message:
            return True
        return self._path is not None and free_bytes(self._path) < _LITTLE_SPACE


class Gate:
    """Many are inside at once, or one alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until the others have left. Nobody comes in meanwhile."""
        with self._condition:
            self._condition.wait_for(lambda: not self._inside)
            yield


def translated(where: Where | None) -> dict[str, Any] | None:
    """In Chroma's own words, which allow one condition an object."""
    match where:
        case None:
            return None
        case Comparison(key, "$in" | "$nin" as operator, values):
            # Of one type: numbers compare by value either way.
            mixed = len({type(each) for each in values}) > 1
            return {key: {operator: [float(each) for each in values] if mixed else list(values)}}
        case Comparison(key, operator, (value,)):
            return {key: {operator: value}}
        case Group(logic, parts):
            return {logic: [translated(part) for part in parts]}
    raise AssertionError(where)


def _keys_of(records: Records, ids: Sequence[str]) -> dict[str, list[str]]:
    """Of the metadata of those that there are. Their texts are read with it, which may be large."""
    found: dict[str, list[str]] = {}
    for start in range(0, len(ids), _KEYS_AT_ONCE):
        reply = records.get(ids=list(ids[start : start + _KEYS_AT_ONCE]), include=["metadatas"])
        found |= {id: list(metadata or ()) for id, metadata in _rows(reply, "metadatas")}
    return found


def _replacing(keys: Iterable[str], document: Document) -> dict[str, Any] | None:
    """Metadata to upsert so that the document has its own and its text, and nothing of what was there before."""
    text = {_TEXT: document.text} if document.text else {}
    return {**dict.fromkeys(keys), **document.metadata, **text} or None


def _table_of(records: Records, dimension: int) -> VectorTable:
    table = VectorTable(dimension)
    offset = 0
    while (page := records.get(limit=_FETCH_AT_ONCE, offset=offset, include=["embeddings"]))["ids"]:
        table.put(page["ids"], np.asarray(page["embeddings"], np.float32))
        offset += len(page["ids"])
    return table


def _rows(reply: Mapping[str, Any], column: str) -> Iterator[tuple[str, Any]]:
    return zip(reply["ids"], reply[column], strict=True)


def _documents(reply: Mapping[str, Any], parts: Sequence[Part]) -> list[Document]:
    ids = reply["ids"]
    columns = (reply[name] or [None] * len(ids) for name in ("uris", "metadatas"))  # None: was not asked for
    found = []
    for id, image, metadata in zip(ids, *columns, strict=True):
        own = dict(metadata or {})
        text = own.pop(_TEXT, None)
        shown = own if "metadata" in parts else {}
        found.append(Document(id, text if "text" in parts else None, image or None, shown))
    return found
