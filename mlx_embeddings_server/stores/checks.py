"""What names, documents and vectors may be: one place, whatever the database."""

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_server.errors import quoted
from mlx_embeddings_server.stores.base import (
    Document,
    EmbeddedDocument,
    EmbeddingFacts,
    InvalidFilter,
    InvalidName,
    InvalidValue,
    Metadata,
    Mismatch,
    Scalar,
)
from mlx_embeddings_server.stores.filters import RESERVED, FilterProblem, Where, parse_where

MAX_OWNER_BYTES = 1024
MAX_ID_BYTES = 512
MAX_KEY_BYTES = 255
MAX_KEYS = 64
MAX_RESULTS = 1000
# Of a document's text and image together: the databases' servers refuse requests of 32 MiB (Qdrant) and 40 MB (Chroma).
MAX_DOCUMENT_BYTES = 24 * 1024 * 1024
MAX_METADATA_BYTES = 1024 * 1024

_SHORTEST, _LONGEST = 1e-12, 1e15  # vectors, whose squares are summed up in float32

# Chroma's rule, so that a collection can be moved from there under its name.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]", re.ASCII)


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"a collection's name is 3 to 512 characters of a-z, A-Z, 0-9, '.', '_' and '-', a letter or digit first "
            f"and last: not {quoted(name)}",
            param="name",
        )


def check_owner(owner: str) -> None:
    if not 0 < len(owner.encode("utf-8", "surrogatepass")) <= MAX_OWNER_BYTES:
        raise InvalidName(f"the caller's name must have 1 to {MAX_OWNER_BYTES} bytes")


def checked_where(where: object) -> Where | None:
    try:
        return parse_where(where)
    except FilterProblem as problem:
        raise InvalidFilter(str(problem), param="where") from problem


def check_results(n_results: int) -> None:
    if not 1 <= n_results <= MAX_RESULTS:
        raise InvalidValue(f"n_results must be 1 to {MAX_RESULTS}, not {n_results}", param="n_results")


def check_page(limit: int, offset: int) -> None:
    if not 1 <= limit <= MAX_RESULTS:
        raise InvalidValue(f"limit must be 1 to {MAX_RESULTS}, not {limit}", param="limit")
    if not 0 <= offset < 2**31:
        raise InvalidValue(f"offset must be 0 or more, not {offset}", param="offset")


def check_facts(facts: EmbeddingFacts, given: EmbeddingFacts, name: str) -> None:
    """`facts` are the collection's."""
    if difference := facts.difference(given):
        raise Mismatch(
            f"the collection {name!r} holds vectors of {facts.model} ({facts.output}, dimension {facts.dimension}); "
            f"these have {difference}: use the collection's model, or another collection",
            param="model",
        )


def check_metadata(metadata: Metadata, where: str) -> None:
    if len(metadata) > MAX_KEYS:
        raise InvalidValue(f"{where} has {len(metadata)} keys, the most is {MAX_KEYS}", param="metadata")
    size = 0
    for key, value in metadata.items():
        length = _length(key, f"{where}: a key", "metadata")
        if not 0 < length <= MAX_KEY_BYTES or key.startswith(RESERVED):
            raise InvalidValue(
                f"{where}: keys have 1 to {MAX_KEY_BYTES} bytes and do not begin with "
                f"{', '.join(map(repr, RESERVED))}: not {quoted(key)}",
                param="metadata",
            )
        size += length + _value_size(value, f"{where}[{quoted(key)}]")
    if size > MAX_METADATA_BYTES:
        raise InvalidValue(f"{where} has {size} bytes, the most is {MAX_METADATA_BYTES}", param="metadata")


def _value_size(value: Scalar, where: str) -> int:
    match value:
        case str():
            return _length(value, where, "metadata")
        case bool():
            return 8
        case int() if -(2**63) <= value < 2**63:
            return 8
        case float() if math.isfinite(value):
            return 8
        case int():
            raise InvalidValue(f"{where} must be a number of 64 bits", param="metadata")
        case float():
            raise InvalidValue(f"{where} must be finite", param="metadata")
    raise InvalidValue(f"{where} must be a text, a number, true or false", param="metadata")


def check_ids(ids: Sequence[str], where: str = "ids[{}]") -> None:
    """`where` is what the request calls each of them."""
    seen: set[str] = set()
    for place, id in enumerate(ids):
        name = where.format(place)
        param = name.partition("[")[0]
        if not 0 < _length(id, name, param) <= MAX_ID_BYTES:
            raise InvalidValue(f"{name} must have 1 to {MAX_ID_BYTES} bytes", param=param)
        if id in seen:
            raise InvalidValue(f"{name} is {quoted(id)}, which is there twice", param=param)
        seen.add(id)


def check_contents(documents: Sequence[Document]) -> None:
    """What can be said of documents before they are embedded: ids, contents, metadata."""
    check_ids([each.id for each in documents], "documents[{}].id")
    for place, each in enumerate(documents):
        _check_content(each, f"documents[{place}]")
        check_metadata(each.metadata, f"documents[{place}].metadata")


def check_documents(documents: Sequence[EmbeddedDocument], facts: EmbeddingFacts) -> None:
    """Of documents that are to be stored: all of that, and vectors."""
    check_contents([each.document for each in documents])
    for place, each in enumerate(documents):
        check_vectors(each.vectors, facts, f"the vectors of documents[{place}]")
        grid = each.patches
        if grid and grid.offset + grid.rows * grid.columns > len(each.vectors):
            raise InvalidValue(f"documents[{place}] has {len(each.vectors)} vectors, and more patches")


def _check_content(document: Document, where: str) -> None:
    if not document.text and not document.image:
        raise InvalidValue(f"{where} has neither text nor image", param="documents")
    given = {"text": document.text or "", "image": document.image or ""}
    size = sum(_length(value, f"{where}.{name}", "documents") for name, value in given.items())
    if size > MAX_DOCUMENT_BYTES:
        raise InvalidValue(
            f"{where} has {size} bytes, the most is {MAX_DOCUMENT_BYTES}: give large images by URL", param="documents"
        )


def check_vectors(vectors: NDArray[np.float32], facts: EmbeddingFacts, where: str) -> None:
    wanted = 1 if facts.output == "dense" else 2
    if vectors.ndim != wanted or vectors.shape[-1] != facts.dimension or not vectors.size:
        shape = "[dimension]" if wanted == 1 else "[vectors, dimension]"
        raise Mismatch(f"{where}: shape {vectors.shape} is not {shape} with dimension {facts.dimension}")
    if not np.isfinite(vectors).all():
        raise InvalidValue(f"{where} are not finite")
    if not vectors.any(axis=-1).all():
        raise InvalidValue(f"{where}: one is all zeros and has no direction to compare")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1)
    if not ((lengths > _SHORTEST) & (lengths < _LONGEST)).all():
        raise InvalidValue(f"{where}: one is so long or so short that it cannot be compared in float32")


def _length(text: str, where: str, param: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidValue(f"{where} is no valid Unicode", param=param) from None
