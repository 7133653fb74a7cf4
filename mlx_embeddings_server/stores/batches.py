"""Documents in requests that a database takes."""

from collections.abc import Iterator, Sequence

from mlx_embeddings_server.stores.base import Document, EmbeddedDocument

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


def size_of(document: Document) -> int:
    """Bytes of its contents."""
    return _bytes_of_texts(document) + len(document.image or "")


def _size(each: EmbeddedDocument, bytes_of_number: int) -> int:
    # Images are URLs or base64, which JSON leaves as they are.
    written = size_of(each.document) + (_ESCAPED - 1) * _bytes_of_texts(each.document)
    return written + each.vectors.size * bytes_of_number


def _bytes_of_texts(document: Document) -> int:
    texts = [document.text or "", *(str(part) for pair in document.metadata.items() for part in pair)]
    return sum(len(text.encode()) for text in texts)
