"""float32 rows to what a client asked for: other number types, base64, bytes, JSON. No Python floats on the way."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from mlx_embeddings_backends.base import SparseVector

OutputDType = Literal["float", "int8", "uint8", "binary", "ubinary"]
EncodingFormat = Literal["float", "base64"]


def quantize(rows: NDArray[np.float32], dtype: OutputDType) -> NDArray[Any]:
    """Rows [n, dim] as `dtype`, each row by itself, so that a vector does not depend on its neighbours.

    - int8: round(x / max|x| * 127); uint8: that plus 128. The scale is the row's own: cosine survives, lengths do not.
    - ubinary: one bit a dimension, 1 where x > 0, packed with the first dimension highest, [n, ceil(dim / 8)];
      binary: the same bytes less 128, as int8 (sentence-transformers' and Cohere's convention).
    """
    if dtype == "float":
        return np.ascontiguousarray(rows, dtype="<f4")
    if dtype in ("binary", "ubinary"):
        packed = np.packbits(rows > 0, axis=1)
        return packed if dtype == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = np.rint(rows / np.where(largest > 0, largest, np.float32(1)) * 127)
    return scaled.astype(np.int8) if dtype == "int8" else (scaled + 128).astype(np.uint8)


def encode_inputs(
    rows: NDArray[Any], lengths: Sequence[int] | None, encoding_format: EncodingFormat, name: str = "embedding"
) -> Iterator[dict[str, Any]]:
    """For each input, under `name`: an array, or base64 of its little-endian bytes.

    With `lengths` an input has several rows: that is a list of lists, and beside base64 stands its `shape`.
    """
    shape = "shape" if name == "embedding" else f"{name}_shape"
    ends = range(1, len(rows) + 1) if lengths is None else accumulate(lengths)
    start = 0
    for end in ends:
        array = rows[start] if lengths is None else rows[start:end]
        start = end
        if encoding_format == "float":
            yield {name: array}
            continue
        value: dict[str, Any] = {name: base64.b64encode(array.tobytes()).decode("ascii")}
        yield value if lengths is None else value | {shape: array.shape}


def sparse_value(vector: SparseVector) -> dict[str, Any]:
    """Indices ascending, and the values there."""
    return {"indices": vector.indices, "values": vector.values}


def embedding_list(values: Iterable[Mapping[str, Any]], *, model: str, usage: Mapping[str, Any]) -> Iterator[bytes]:
    """OpenAI's list of embeddings as JSON, in parts of one input each: they may be hundreds of kilobytes."""
    before = b'{"object":"list","data":['
    for index, value in enumerate(values):
        yield before + orjson.dumps({"object": "embedding", "index": index, **value}, option=orjson.OPT_SERIALIZE_NUMPY)
        before = b","
    yield b'],"model":' + orjson.dumps(model) + b',"usage":' + orjson.dumps(usage) + b"}"


def vector_list(values: Iterable[Mapping[str, Any]], before: bytes, after: bytes) -> Iterator[bytes]:
    """The embeddings alone as JSON between `before` and `after`, in parts of one input each."""
    for value in values:
        yield before + orjson.dumps(value["embedding"], option=orjson.OPT_SERIALIZE_NUMPY)
        before = b","
    yield after
