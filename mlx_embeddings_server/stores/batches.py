"""Documents in requests that a database takes."""

from collections.abc import Iterator, Sequence

from mlx_embeddings_server.stores.base import EmbeddedDocument

_ESCAPED = 2  # bytes of JSON for one of text: more only for control characters


def batches(
    documents: Sequence[EmbeddedDocument], most: int, most_bytes: int, *, bytes_of_number: int
) -> Iterator[list[EmbeddedDocument]]:
    """In order: `most` at once, and as many as make about `most_bytes` of JSON, but always one."""
    batch: list[EmbeddedDocument] = []
    size = 0
    for each in documents:
        added = _size(each, bytes_of_number)
        if batch and (len(batch) == most or size + added > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += added
    if batch:
        yield batch


def _size(each: EmbeddedDocument, bytes_of_number: int) -> int:
    document = each.document
    # Images are URLs or base64, which JSON leaves as they are.
    texts = [document.text or "", *(value for value in document.metadata.values() if isinstance(value, str))]
    written = _ESCAPED * sum(len(text.encode()) for text in texts) + len(document.image or "")
    return written + each.vectors.size * bytes_of_number
