"""float32 rows to what a client asked for: other number types, base64, bytes, JSON. No Python floats on the way."""

import base64
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

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


def encode_rows(rows: NDArray[Any], encoding_format: EncodingFormat) -> list[Any]:
    """One JSON value a row: an array, or base64 of its little-endian bytes."""
    if encoding_format == "base64":
        return [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
    return list(rows)


def embedding_list(
    rows: NDArray[Any], encoding_format: EncodingFormat, *, model: str, usage: Mapping[str, Any]
) -> bytes:
    """OpenAI's list of embeddings as JSON."""
    data = [
        {"object": "embedding", "index": index, "embedding": value}
        for index, value in enumerate(encode_rows(rows, encoding_format))
    ]
    return orjson.dumps(
        {"object": "list", "data": data, "model": model, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY
    )
