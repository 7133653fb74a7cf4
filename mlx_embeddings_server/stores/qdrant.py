"""Dense vectors and multi-vectors in Qdrant: inside this process with its files in a folder, or a server by URL.

Multi-vectors are searched in two stages, as examples/colqwen2.5_qdrant.py does and for the same reason: an index over
all patches of all pages would be huge. Candidates come from the means along the rows and columns of a page's patches,
which are indexed; all vectors of the candidates are compared with MaxSim.

Inside the process each document is fsynced before it is acknowledged (16 ms each were measured), and all of them are in
memory. It keeps its files with pickle: who may write to the folder may run programs as this server, so the folder is
its user's only. A server has acknowledged what is in its write-ahead log.
"""

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from mlx_embeddings_server.pooling import normalized
from mlx_embeddings_server.stores.base import (
    PARTS,
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    IndexGone,
    InvalidValue,
    Kind,
    Metadata,
    Part,
    StoreFull,
    StoreUnavailable,
    failed,
    free_bytes,
)
from mlx_embeddings_server.stores.batches import batches
from mlx_embeddings_server.stores.filters import Comparison, Value, Where, is_number
from mlx_embeddings_server.stores.means import means_of

CANDIDATES = 100  # that each of the means proposes; more where more results are wanted

_NAMESPACE = UUID("5f0a4a3e-6a53-4b0c-9a5b-3c1d2f0f7c11")
_MAX_BATCH = 128
_MAX_BATCH_INSIDE = 16  # whose fsyncs take a quarter of a second: others wait as long
_MAX_BYTES = 16_000_000  # of one request: a server refuses 32 MiB
_AT_ONCE = 1000
_NO_QDRANT = "what answers at the Qdrant URL is no Qdrant"
_EXACT_INTEGER = 2**53  # beyond, a range compares floats that stand for several integers
_PLAIN_KEY = re.compile(r"(?!x-)[a-zA-Z0-9_-]+", re.ASCII)


def open_qdrant(url: str | None, path: Path | None, api_key: str | None, timeout: float) -> "QdrantIndex":
    """`path` of an embedded one. A server need not answer yet. Raises `StoreUnavailable`."""
    if url is not None:
        port = None  # it is the URL's
        return QdrantIndex(
            QdrantClient(url=url, port=port, api_key=api_key, timeout=int(timeout) or 1, check_compatibility=False)
        )
    assert path is not None
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        client = QdrantClient(path=str(path), force_disable_check_same_thread=True)
    except (RuntimeError, OSError, sqlite3.Error, ValueError) as error:
        raise failed("Qdrant", error) from error
    return QdrantIndex(client, path)


class QdrantIndex:
    name = "qdrant"
    kinds: tuple[Kind, ...] = ("dense", "multi_vector")

    def __init__(self, client: QdrantClient, path: Path | None = None) -> None:
        self._client = client
        self._path = path
        # The embedded one is not made for several threads.
        self._turn: AbstractContextManager[Any] = threading.RLock() if path else nullcontext()

    def create(self, index: str, facts: EmbeddingFacts, label: Mapping[str, str]) -> None:
        with self._errors(index):
            if self._client.collection_exists(index):
                return
            self._client.create_collection(index, vectors_config=_vectors_of(facts), metadata=dict(label))

    def drop(self, index: str) -> None:
        with suppress(IndexGone), self._errors(index):
            self._client.delete_collection(index)

    def indexes(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            found = self._client.get_collections().collections
        return [each.name for each in found if each.name.startswith(prefix)]

    def count(self, index: str) -> int:
        with self._errors(index):
            return self._client.count(index, exact=True).count

    def upsert(self, index: str, facts: EmbeddingFacts, documents: Sequence[EmbeddedDocument]) -> None:
        copies = 1 if facts.output == "dense" else 2  # of the numbers: the means are less than all again
        most = _MAX_BATCH if self._path is None else _MAX_BATCH_INSIDE
        for batch in batches(documents, most, _MAX_BYTES, bytes_of_number=22 * copies):
            points = [_point(each, facts) for each in batch]
            with self._errors(index):
                self._client.upsert(index, points, wait=True)

    def ids(self, index: str, where: Where | None = None, limit: int | None = None, offset: int = 0) -> list[str]:
        found: list[str] = []
        next: Any = None
        wanted = None if limit is None else offset + limit
        with self._errors(index):
            while wanted is None or len(found) < wanted:
                at_once = _AT_ONCE if wanted is None else min(_AT_ONCE, wanted - len(found))
                records, next = self._client.scroll(
                    index, scroll_filter=_filter(where), limit=at_once, offset=next, with_payload=["id"]
                )
                found += [str((record.payload or {})["id"]) for record in records]
                if next is None:
                    break
        return found[offset:]

    def fetch(self, index: str, ids: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Document]:
        found: dict[str, Document] = {}
        with self._errors(index):
            for start in range(0, len(ids), _AT_ONCE):
                points = [_point_id(id) for id in ids[start : start + _AT_ONCE]]
                records = self._client.retrieve(index, points, with_payload=["id", *parts])
                found |= {each.id: each for each in (_document(record.payload) for record in records)}
        return [found[id] for id in ids if id in found]

    def delete(self, index: str, ids: Sequence[str]) -> None:
        with self._errors(index):
            self._client.delete(index, models.PointIdsList(points=[_point_id(id) for id in ids]), wait=True)

    def query(
        self, index: str, facts: EmbeddingFacts, vectors: NDArray[np.float32], limit: int, where: Where | None
    ) -> list[tuple[str, float]]:
        passing = _filter(where)
        if facts.output == "dense":
            search: dict[str, Any] = {"query": vectors.tolist(), "using": "dense", "query_filter": passing}
        else:
            wanted, candidates = normalized(vectors).tolist(), max(CANDIDATES, limit)
            by_means = [
                models.Prefetch(query=wanted, using=name, limit=candidates, filter=passing)
                for name in ("rows", "columns")
            ]
            search = {"query": wanted, "using": "original", "prefetch": by_means}
        with self._errors(index):
            found = self._client.query_points(index, limit=limit, with_payload=["id"], **search).points
        return [((each.payload or {})["id"], each.score) for each in found]

    def check(self) -> None:
        with self._errors(""):
            self._client.get_collections()

    def close(self) -> None:
        with self._turn:
            self._client.close()

    @contextmanager
    def _errors(self, index: str) -> Iterator[None]:
        with self._turn:
            try:
                yield
            except UnexpectedResponse as error:
                raise _refusal(error, index) from error
            except ResponseHandlingException as error:
                raise _no_answer(error) from error
            except ResourceExhaustedResponse as error:
                raise StoreUnavailable("Qdrant, or what stands before it, is asked too often: try later") from error
            except (ApiException, QdrantException) as error:
                raise failed("Qdrant", error) from error
            except (AssertionError, json.JSONDecodeError, ValidationError) as error:
                raise StoreUnavailable(_NO_QDRANT) from error
            except ValueError as error:
                if f"Collection {index} not found" in str(error):
                    raise IndexGone(index) from error
                raise
            except (OSError, sqlite3.Error, RuntimeError) as error:  # of the embedded one
                if self._is_full(error):
                    raise StoreFull(
                        "the disk of the Qdrant store is full: make room, then send the request again"
                    ) from error
                raise failed("Qdrant", error) from error

    def _is_full(self, error: Exception) -> bool:
        return self._path is not None and (
            "full" in str(error) or "No space left" in str(error) or not free_bytes(self._path)
        )


def _no_answer(error: ResponseHandlingException) -> StoreUnavailable:
    match error.source:
        case ValidationError():
            return StoreUnavailable(_NO_QDRANT)
        case httpx.TimeoutException():
            return StoreUnavailable("Qdrant does not answer in time: try again later")
    return StoreUnavailable("Qdrant does not answer: is its server running?")


def _refusal(error: UnexpectedResponse, index: str) -> Exception:
    content = error.content.decode(errors="replace")[:300]
    match error.status_code:
        case 404 if index and index in content:
            return IndexGone(index)
        case 401 | 403:
            return StoreUnavailable("Qdrant refuses this server's key: check collections_api_key")
        case 413:
            return InvalidValue("the documents are too large for the Qdrant server: send fewer, or smaller ones")
        case 507:
            return StoreFull("the disk of the Qdrant server is full: make room, then send the request again")
    if "No space left" in content or "OutOfDisk" in content:
        return StoreFull("the disk of the Qdrant server is full: make room, then send the request again")
    return StoreUnavailable(f"Qdrant, or what stands before it, answers with status {error.status_code}")


def _vectors_of(facts: EmbeddingFacts) -> dict[str, models.VectorParams]:
    if facts.output == "dense":
        return {"dense": models.VectorParams(size=facts.dimension, distance=models.Distance.COSINE)}

    def multi_vector(**options: Any) -> models.VectorParams:
        comparator = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        # Of vectors of length 1 the dot product is the cosine.
        return models.VectorParams(
            size=facts.dimension, distance=models.Distance.DOT, multivector_config=comparator, **options
        )

    # No graph (m=0) over all vectors: they are compared for the candidates only.
    original = multi_vector(on_disk=True, hnsw_config=models.HnswConfigDiff(m=0))
    return {"original": original, "rows": multi_vector(), "columns": multi_vector()}


def _point(each: EmbeddedDocument, facts: EmbeddingFacts) -> models.PointStruct:
    document = each.document
    payload = {
        "id": document.id,
        "text": document.text,
        "image": document.image,
        "metadata": {_key(key): value for key, value in document.metadata.items()},
    }
    vector: Any = {"dense": each.vectors.tolist()}
    if facts.output == "multi_vector":
        vectors = normalized(each.vectors)
        vector = {"original": vectors.tolist()}
        vector |= {name: rows.tolist() for name, rows in means_of(vectors, each.patches).items()}
    return models.PointStruct(id=_point_id(document.id), vector=vector, payload=payload)


def _point_id(id: str) -> str:
    """Qdrant's ids are UUIDs or integers."""
    return str(uuid5(_NAMESPACE, id))


def _document(payload: Any) -> Document:
    metadata: Metadata = {_key_back(key): value for key, value in payload.get("metadata", {}).items()}
    return Document(payload["id"], payload.get("text"), payload.get("image"), metadata)


def _key(key: str) -> str:
    """A key in which nothing is part of a path: others than letters, digits, _ and - are kept in hexadecimal."""
    return key if _PLAIN_KEY.fullmatch(key) else f"x-{key.encode().hex()}"


def _key_back(key: str) -> str:
    return bytes.fromhex(key[2:]).decode() if key.startswith("x-") else key


def _filter(where: Where | None) -> models.Filter | None:
    if where is None:
        return None
    condition = translated(where)
    return condition if isinstance(condition, models.Filter) else models.Filter(must=[condition])


def translated(where: Where) -> models.Condition:
    if not isinstance(where, Comparison):
        parts = [translated(part) for part in where.parts]
        return models.Filter(must=parts) if where.logic == "$and" else models.Filter(should=parts)
    path = f"metadata.{_key(where.key)}"
    match where.operator:
        case "$eq" | "$in":
            return models.Filter(should=[_equal(path, value) for value in where.values])
        case "$ne" | "$nin":
            return models.Filter(must_not=[_equal(path, value) for value in where.values])
        case order:
            bound: Callable[[], models.Range] = {
                "$gt": lambda: models.Range(gt=float(where.value)),
                "$gte": lambda: models.Range(gte=float(where.value)),
                "$lt": lambda: models.Range(lt=float(where.value)),
                "$lte": lambda: models.Range(lte=float(where.value)),
            }[order]
            return models.FieldCondition(key=path, range=bound())


def _equal(path: str, value: Value) -> models.Condition:
    if is_number(value) and (isinstance(value, float) or abs(int(value)) <= _EXACT_INTEGER):
        number = float(value)
        return models.FieldCondition(key=path, range=models.Range(gte=number, lte=number))  # 3 is 3.0
    assert not isinstance(value, float)
    return models.FieldCondition(key=path, match=models.MatchValue(value=value))
