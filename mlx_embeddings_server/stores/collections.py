"""What can be done with collections: checks, the catalog's and the index's parts of each, in the order that is safe.

Every method runs to its end on one thread, whatever becomes of the request that asked for it. Order matters:
- A new index is made before the catalog shows it, and a catalog's entry goes before its index: a crash leaves indexes
  that nobody sees (leftovers, which `clean_up` drops), never a collection without its index.
- A write is acknowledged only after the catalog has confirmed that the version written to is still the current one, and
  noted the documents where another is being filled (`Catalog.record_changes`). So a re-embedding loses none.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_server.stores.base import (
    WHOLE,
    Collection,
    CollectionExists,
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    Excerpt,
    Hit,
    Index,
    IndexGone,
    InvalidValue,
    Metadata,
    Mismatch,
    Stats,
    StoreError,
    StoreUnavailable,
    Version,
    Waiting,
)
from mlx_embeddings_server.stores.batches import size_of
from mlx_embeddings_server.stores.catalog import Catalog, exists
from mlx_embeddings_server.stores.checks import (
    check_documents,
    check_facts,
    check_ids,
    check_metadata,
    check_name,
    check_owner,
    check_page,
    check_results,
    check_vectors,
    checked_where,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A creation takes seconds. What is not finished after this long was left by a process that ended.
CREATING_SECONDS = 600.0
_DELETE_AT_ONCE = 1000
# Documents that are read at once, which may have 25 MB each: fewer where those before were large.
_FETCH_AT_ONCE = 8
_FETCH_BYTES = 8_000_000


class Collections:
    """Blocks. May be called from several threads."""

    def __init__(self, index: Index, catalog: Catalog, timeout: float = 30.0) -> None:
        """`timeout`: seconds that a write waits for others of its collection."""
        self.index = index
        self.catalog = catalog
        # Writes of one collection follow each other: its versions on the disk, and the catalog's notes of them.
        self._timeout = timeout
        self._write_locks = [threading.RLock() for _ in range(64)]

    # Collections.

    def create(self, owner: str, name: str, facts: EmbeddingFacts, metadata: Metadata) -> Collection:
        _check(owner, name)
        check_metadata(metadata, "metadata")
        self._check_kind(facts)
        if self.catalog.find(owner, name):
            raise exists(name)
        version = self.catalog.begin_creation(facts)
        try:
            self.index.create(version.index, facts, _label(owner, name, version))
            return self.catalog.finish_creation(owner, name, metadata, version)
        except CollectionExists:  # another was faster
            self._drop([version.index])
            raise
        except StoreError:
            self.catalog.forsake(version)
            raise

    def get(self, owner: str, name: str) -> Collection:
        _check(owner, name)
        return self.catalog.get(owner, name)

    def all_of(self, owner: str) -> list[Collection]:
        check_owner(owner)
        return self.catalog.all_of(owner)

    def stats(self, owner: str, name: str) -> Stats:
        return self._read(owner, name, lambda found: Stats(found, self.index.count(found.current.index)))

    def delete(self, owner: str, name: str) -> None:
        _check(owner, name)
        self._drop(self.catalog.remove(owner, name))

    # Documents.

    def upsert(self, owner: str, name: str, facts: EmbeddingFacts, documents: Sequence[EmbeddedDocument]) -> None:
        found = self.get(owner, name)
        check_facts(found.facts, facts, name)
        check_documents(documents, found.facts)
        if documents:
            ids = [each.document.id for each in documents]
            self._write(found, ids, lambda index: self.index.upsert(index, found.facts, documents))

    def documents(
        self,
        owner: str,
        name: str,
        ids: Sequence[str] | None,
        where: object,
        limit: int,
        offset: int,
        excerpt: Excerpt = WHOLE,
    ) -> list[Document]:
        parsed = checked_where(where)
        if ids is not None:
            check_ids(ids)
            if parsed is not None:
                raise InvalidValue("ids and where exclude each other: send one of them", param="where")
        check_page(limit, offset)

        def page(found: Collection) -> list[Document]:
            index = found.current.index
            wanted = self.index.ids(index, parsed, limit, offset) if ids is None else ids
            return self._fetch(index, wanted, excerpt)

        return self._read(owner, name, page)

    def delete_documents(self, owner: str, name: str, ids: Sequence[str] | None, where: object) -> int:
        parsed = checked_where(where)
        if (ids is None) == (parsed is None):
            raise InvalidValue("say which documents to delete: by ids, or by where (not empty)", param="ids")
        if ids is not None:
            check_ids(ids)
        found = self.get(owner, name)
        index = found.current.index
        with self._writing(index):  # from the look on: what is written after it is not among them
            try:
                if ids is None:
                    there = self.index.ids(index, parsed)
                else:
                    there = [each.id for each in self.index.fetch(index, ids, ())]
            except IndexGone as error:
                raise _changed(name) from error
            for chunk in _chunks(there, _DELETE_AT_ONCE):
                self._write(found, chunk, partial(self.index.delete, ids=chunk))
        return len(there)

    def query(
        self,
        owner: str,
        name: str,
        facts: EmbeddingFacts,
        vectors: NDArray[np.float32],
        n_results: int,
        where: object,
        excerpt: Excerpt = WHOLE,
    ) -> list[Hit]:
        parsed = checked_where(where)
        check_results(n_results)

        def hits(found: Collection) -> list[Hit]:
            check_facts(found.facts, facts, name)
            check_vectors(vectors, found.facts, "the query's vectors")
            index = found.current.index
            scores = dict(self.index.query(index, found.facts, vectors, n_results, parsed))
            # What was deleted since is not among them.
            return [_hit(each, scores[each.id], found.facts) for each in self._fetch(index, list(scores), excerpt)]

        return self._read(owner, name, hits)

    # Re-embedding.

    def begin_version(self, owner: str, name: str, facts: EmbeddingFacts) -> Version:
        _check(owner, name)
        self._check_kind(facts)
        version = self.catalog.begin_filling(owner, name, facts)
        self.index.create(version.index, facts, _label(owner, name, version))
        return version

    def waiting(self, owner: str, name: str, version: Version) -> list[Waiting]:
        _check(owner, name)
        # Read first: a document that changes after this is noted with a later number.
        changed = {each.id: each for each in self.catalog.changes(version)}
        if self.catalog.is_complete(version):
            return list(changed.values())
        index = self.catalog.get(owner, name).current.index
        try:
            old, new = self.index.ids(index), set(self.index.ids(version.index))
        except IndexGone as error:
            raise _changed(name) from error
        missing = [Waiting(id, 0) for id in old if id not in new and id not in changed]
        gone = [Waiting(id, 0) for id in new.difference(old) if id not in changed]
        if not missing and not gone:
            self.catalog.set_complete(version)
        return [*missing, *gone, *changed.values()]

    def fill(self, version: Version, taken: Sequence[Waiting], documents: Sequence[EmbeddedDocument]) -> None:
        check_documents(documents, version.facts)
        present = {each.document.id for each in documents}
        if foreign := present.difference(each.id for each in taken):
            raise InvalidValue(f"these documents were not waiting: {', '.join(sorted(foreign)[:3])}")
        gone = [each.id for each in taken if each.id not in present]
        with self._writing(version.index):
            if not self.catalog.is_filling(version):
                raise _ended()
            try:
                if documents:
                    self.index.upsert(version.index, version.facts, documents)
                for chunk in _chunks(gone, _DELETE_AT_ONCE):
                    self.index.delete(version.index, chunk)
            except IndexGone as error:
                raise _ended() from error
            self.catalog.taken_over(version, taken)

    def switch(self, owner: str, name: str, version: Version) -> bool:
        if self.waiting(owner, name, version):
            return False
        with self._writing(version.index):
            replaced = self.catalog.switch(version)
        if replaced is None:
            return False
        self._drop([replaced])
        return True

    def abandon(self, version: Version) -> None:
        self.catalog.abandon(version)
        self._drop([version.index])

    # The store itself.

    def clean_up(self, creating_for: float = CREATING_SECONDS) -> int:
        """Drop what crashes and failures left behind; how many indexes."""
        present = self.index.indexes(self.catalog.prefix)  # read first: an index is never made before its entry
        unknown = set(present) - self.catalog.known()
        return self._drop([*self.catalog.leftovers(creating_for), *unknown])

    def close(self) -> None:
        self.index.close()
        self.catalog.close()

    def _check_kind(self, facts: EmbeddingFacts) -> None:
        if facts.output not in self.index.kinds:
            raise Mismatch(
                f"{self.index.name} cannot search {facts.output} vectors, which {facts.model} makes: use Qdrant for "
                "multi-vector models, or a model of dense vectors",
                param="embedding_model",
            )

    def _read(self, owner: str, name: str, read: Callable[[Collection], T]) -> T:
        """Again, where a re-embedding switched the index meanwhile: one that is being dropped may seem empty."""
        found = self.get(owner, name)
        while True:
            gone: IndexGone | None = None
            try:
                result = read(found)
            except IndexGone as error:
                gone = error
            now = self.get(owner, name)
            if now.current.index != found.current.index:
                found = now
                continue
            if gone is not None:
                lost = f"{self.index.name} has lost the vectors of the collection {name!r}"
                raise StoreUnavailable(lost) from gone
            return result

    def _fetch(self, index: str, ids: Sequence[str], excerpt: Excerpt) -> list[Document]:
        """A few at a time, so that what is too much is not read before that is seen."""
        found: list[Document] = []
        size, start, at_once = 0, 0, _FETCH_AT_ONCE // 2
        while start < len(ids):
            some = self.index.fetch(index, ids[start : start + at_once], excerpt.parts)
            start += at_once
            found += some
            sizes = [size_of(each) for each in some]
            size += sum(sizes)
            at_once = max(1, min(_FETCH_AT_ONCE, _FETCH_BYTES // max(1, 1, *sizes)))
            if excerpt.most_bytes is not None and size > excerpt.most_bytes and len(found) > 1:
                raise InvalidValue(
                    f"these documents have more than {excerpt.most_bytes} bytes together: ask for fewer at once, or "
                    "for less of each with include",
                    param="include",
                    code="reply_too_large",
                )
        return found

    def _write(self, found: Collection, ids: Sequence[str], write: Callable[[str], None]) -> None:
        version = found.current
        with self._writing(version.index):
            try:
                write(version.index)
            except IndexGone as error:
                raise _changed(found.name) from error
            finally:  # what was stored in part counts as changed, too
                self.catalog.record_changes(found.owner, found.name, version, ids)

    @contextmanager
    def _writing(self, index: str) -> Iterator[None]:
        """Raises `StoreUnavailable`, where others take too long."""
        lock = self._write_locks[hash(index) % len(self._write_locks)]
        if not lock.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"{self.index.name} is busy with other writes of this collection: try again later")
        try:
            yield
        finally:
            lock.release()

    def _drop(self, indexes: Sequence[str]) -> int:
        """What cannot be dropped now is by a later `clean_up`."""
        dropped = 0
        for index in indexes:
            try:
                self.index.drop(index)
                self.catalog.dropped(index)
                dropped += 1
            except StoreError as error:
                logger.warning("%s is no longer used, but still in %s: %s", index, self.index.name, error)
        return dropped


def _check(owner: str, name: str) -> None:
    check_owner(owner)
    check_name(name)


def _label(owner: str, name: str, version: Version) -> Mapping[str, str]:
    """For a person who has lost the catalog."""
    facts = version.facts
    return {
        "owner": ascii(owner)[1:-1],
        "collection": name,
        "version": str(version.number),
        "model": facts.model,
        "source": facts.source,
        "revision": facts.revision or "",
        "provider": facts.provider,
    }


def _hit(document: Document, score: float, facts: EmbeddingFacts) -> Hit:
    if facts.output != "dense":
        return Hit(document, score, None)
    score = min(max(score, -1.0), 1.0)  # what rounding adds
    return Hit(document, score, 1 - score)


def _changed(name: str) -> Mismatch:
    return Mismatch(f"the collection {name!r} was re-embedded or deleted meanwhile: send the request again")


def _ended() -> Mismatch:
    return Mismatch("this re-embedding has ended: it was finished or cancelled, or its collection deleted")


def _chunks(ids: Sequence[str], size: int) -> Iterator[list[str]]:
    remaining = iter(ids)
    while chunk := list(itertools.islice(remaining, size)):
        yield chunk
