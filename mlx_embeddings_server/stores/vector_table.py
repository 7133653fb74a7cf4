"""Exact search of small indexes: their vectors are kept in memory, and all of them compared with a query's."""

import threading
from collections.abc import Iterable, Sequence

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from mlx_embeddings_server.pooling import normalized

MOST_BYTES = 64 * 1024 * 1024  # of one index: to compare so many takes some 2 ms
_ALL_BYTES = 4 * MOST_BYTES


class VectorTable:
    """The ids and vectors of one index. May be called from several threads."""

    def __init__(self, dimension: int) -> None:
        self._lock = threading.Lock()
        self._ids: list[str] = []  # of each row
        self._rows: dict[str, int] = {}  # by id
        self._vectors = np.empty((0, dimension), np.float32)  # [rows and some room, dimension], each of length 1

    @property
    def nbytes(self) -> int:
        return self._vectors.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(ids, dimension)"""
        return len(self._ids), self._vectors.shape[1]

    def put(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Add, or replace. `vectors` [ids, dimension], of any length but 0."""
        with self._lock:
            for id in ids:
                if id not in self._rows:
                    self._rows[id] = len(self._ids)
                    self._ids.append(id)
            if len(self._ids) > len(self._vectors):
                room = max(len(self._ids), len(self._vectors) * 5 // 4)
                grown = np.empty((room, self._vectors.shape[1]), np.float32)
                grown[: len(self._vectors)] = self._vectors
                self._vectors = grown
            self._vectors[[self._rows[id] for id in ids]] = normalized(vectors)

    def remove(self, ids: Iterable[str]) -> None:
        """What is not there is no error."""
        with self._lock:
            for id in ids:
                row = self._rows.pop(id, None)
                if row is None:
                    continue
                last = self._ids.pop()  # takes its row
                if last != id:
                    self._ids[row], self._rows[last] = last, row
                    self._vectors[row] = self._vectors[len(self._ids)]

    def nearest(
        self, query: NDArray[np.float32], limit: int, among: Iterable[str] | None = None
    ) -> list[tuple[str, float]]:
        """Ids and cosines, the best first. `query` [dimension]. `among`: the ids that may be found, else all."""
        unit = normalized(query[np.newaxis])[0]
        with self._lock:
            if among is None:
                rows = np.arange(len(self._ids))
                cosines = self._vectors[: len(rows)] @ unit  # [rows]
            else:
                rows = np.array([self._rows[id] for id in among if id in self._rows], np.intp)
                cosines = self._vectors[rows] @ unit
            best = np.argpartition(-cosines, limit)[:limit] if limit < len(rows) else np.arange(len(rows))
            best = best[np.argsort(-cosines[best])]
            return [(self._ids[row], float(cosine)) for row, cosine in zip(rows[best], cosines[best], strict=True)]


class VectorTables:
    """Of the small indexes that were searched last, as many as the memory for them holds. May be called from several
    threads, changes of one index one after the other.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._tables: LRUCache[str, VectorTable] = LRUCache(_ALL_BYTES, lambda table: table.nbytes)
        self._too_large: set[str] = set()

    def find(self, index: str) -> VectorTable | None:
        with self._lock:
            return self._tables.get(index)

    def is_too_large(self, index: str) -> bool:
        """As far as it is known: a search asks before it counts."""
        return index in self._too_large

    def takes(self, index: str, amount: int, dimension: int) -> bool:
        """Whether an index of so many vectors is small."""
        if amount * dimension * 4 <= self._most_bytes:
            return True
        self._too_large.add(index)
        return False

    def add(self, index: str, table: VectorTable) -> None:
        with self._lock:
            self._tables[index] = table

    def put(self, index: str, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """What the index has been given."""
        table = self.find(index)
        if table is not None:
            table.put(ids, vectors)
            if self.takes(index, *table.shape):
                self.add(index, table)  # with the size that it has now
            else:
                with self._lock:
                    self._tables.pop(index, None)

    def remove(self, index: str, ids: Sequence[str]) -> None:
        """What was deleted of the index."""
        self._too_large.discard(index)
        table = self.find(index)
        if table is not None:
            table.remove(ids)

    def forget(self, index: str) -> None:
        """It is gone, or nobody knows what it has."""
        self._too_large.discard(index)
        with self._lock:
            self._tables.pop(index, None)
