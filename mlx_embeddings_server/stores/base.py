"""The contract of the stores: what a collection is, what may go wrong, and what an index has to do."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import PatchGrid
from mlx_embeddings_server.errors import ApiError, quoted
from mlx_embeddings_server.stores.filters import Where

logger = logging.getLogger(__name__)

Scalar = str | int | float | bool
Metadata = Mapping[str, Scalar]
Kind = Literal["dense", "multi_vector"]
Part = Literal["text", "image", "metadata"]  # of a document
PARTS: Final[tuple[Part, ...]] = get_args(Part)


class StoreError(ApiError):
    """Base of all that a store raises."""


class CollectionNotFound(StoreError):
    status = 404
    type = "not_found_error"
    code = "collection_not_found"


class CollectionExists(StoreError):
    status = 409
    type = "invalid_request_error"
    code = "collection_exists"


class Mismatch(StoreError):
    """The vectors are of another kind than the collection's, which they would silently damage."""

    status = 409
    type = "invalid_request_error"
    code = "collection_mismatch"


class InvalidName(StoreError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_collection_name"


class InvalidFilter(StoreError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_filter"


class InvalidValue(StoreError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class StoreUnavailable(StoreError):
    """The store does not answer or fails. What it did not acknowledge may be sent again as it is."""

    status = 503
    code = "store_unavailable"


class StoreFull(StoreError):
    status = 507
    code = "store_full"


def failed(what: str, error: Exception) -> StoreUnavailable:
    """For a failure that has no name here. Of what it says the system's words alone are told, and to the log alone: the
    rest may quote documents.
    """
    said = f": {error}" if isinstance(error, OSError) else ""
    logger.error("%s failed: %s%s", what, type(error).__name__, said)
    return StoreUnavailable(f"{what} failed: the server's log says how")


def free_bytes(folder: Path) -> float:
    """Of the disk; without end where it does not tell."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return float("inf")


class IndexGone(Exception):
    """The index of that name is not in the store: its version was replaced, or the collection deleted."""


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What the vectors of a collection are: only vectors of one model may be compared."""

    model: str  # the name that requests call it by
    provider: str
    source: str  # hub id, folder, or the provider's own name of the model
    revision: str | None
    output: Kind
    dimension: int
    prompt: str = ""  # before each document's text
    distance: Literal["cosine"] = "cosine"

    def difference(self, other: "EmbeddingFacts") -> str | None:
        """What makes the other's vectors unlike these. None: nothing does; the model's served name does not count."""
        differing = []
        for name in ("source", "revision", "provider", "output", "dimension", "distance", "prompt"):
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                shown = quoted if name == "prompt" else str
                differing.append(f"{name} {shown(others)} instead of {shown(own)}")
        return ", ".join(differing) or None


@dataclass(frozen=True, slots=True)
class Document:
    """What was embedded: a text, an image (by its URL or data URI), or an image with a text."""

    id: str
    text: str | None = None
    image: str | None = None
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What is read of documents."""

    parts: Sequence[Part] = PARTS
    most_bytes: int | None = None  # of all of them together; one document alone may have more


WHOLE: Final = Excerpt()


@dataclass(frozen=True, slots=True)
class EmbeddedDocument:
    document: Document
    vectors: NDArray[np.float32]  # dense: [dimension]. multi_vector: [vectors, dimension]
    patches: PatchGrid | None = None  # multi_vector: which of the vectors are an image's patches


@dataclass(frozen=True, slots=True)
class Hit:
    document: Document
    score: float  # higher is more alike. dense: the cosine. multi_vector: MaxSim, the sum of cosines over query vectors
    distance: float | None  # dense: 1 - cosine


@dataclass(frozen=True, slots=True)
class Version:
    """One index of a collection: the current one, or one being filled to take its place."""

    index: str  # its name in the store
    number: int  # 1 for the first of the collection
    facts: EmbeddingFacts


@dataclass(frozen=True, slots=True)
class Collection:
    owner: str
    name: str
    metadata: Metadata  # the user's
    created_at: float  # seconds since 1970
    current: Version
    filling: Version | None  # of a re-embedding that is not finished

    @property
    def facts(self) -> EmbeddingFacts:
        return self.current.facts


@dataclass(frozen=True, slots=True)
class Stats:
    collection: Collection
    count: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A document that the version being filled does not have as it is now. `change` tells later changes apart."""

    id: str
    change: int


class Index(Protocol):
    """A vector database. Blocks; may be called from several threads. Names of indexes are ours: [a-z0-9-], unique.

    All methods raise `StoreUnavailable` and `StoreFull`, and those that need the index `IndexGone`.
    """

    name: str
    kinds: tuple[Kind, ...]  # of vectors that it can search

    def create(self, index: str, facts: EmbeddingFacts, label: Mapping[str, str]) -> None:
        """Make it if it is not there yet. `label` is for people who look into the database."""

    def drop(self, index: str) -> None:
        """What is not there is no error."""

    def indexes(self, prefix: str) -> list[str]:
        """Names of all indexes that begin so."""
        ...

    def count(self, index: str) -> int: ...

    def upsert(self, index: str, facts: EmbeddingFacts, documents: Sequence[EmbeddedDocument]) -> None:
        """All of a document is replaced. Stored for good when it returns; in part, when it raises."""

    def ids(self, index: str, where: Where | None = None, limit: int | None = None, offset: int = 0) -> list[str]:
        """In an order of the database's own, which is the same from call to call."""
        ...

    def fetch(self, index: str, ids: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Document]:
        """Those that there are, in the order of `ids`, with nothing but the `parts`."""
        ...

    def delete(self, index: str, ids: Sequence[str]) -> None: ...

    def query(
        self, index: str, facts: EmbeddingFacts, vectors: NDArray[np.float32], limit: int, where: Where | None
    ) -> list[tuple[str, float]]:
        """Ids and scores (as `Hit` has them), the best first."""
        ...

    def check(self) -> None:
        """Raises, where the database does not answer."""

    def close(self) -> None: ...
