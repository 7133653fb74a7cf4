"""Rows survive the wire."""

import base64
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mlx_embeddings_server.codec import EncodingFormat, embedding_list, encode_inputs, quantize

floats = st.floats(-1e6, 1e6, width=32, allow_nan=False)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=floats)


def embeddings(
    rows: NDArray[Any], encoding_format: EncodingFormat, lengths: list[int] | None = None
) -> list[dict[str, Any]]:
    """`data` of the reply, as a client reads it."""
    values = encode_inputs(rows, lengths, encoding_format)
    body = b"".join(embedding_list(values, model="m", usage={}))
    return list(orjson.loads(body)["data"])


@given(matrices)
def test_json_floats_read_back_bit_for_bit(rows: NDArray[np.float32]) -> None:
    read = [each["embedding"] for each in embeddings(quantize(rows, "float"), "float")]
    assert np.array_equal(np.array(read, dtype=np.float32), rows)


@given(matrices)
def test_base64_is_little_endian_float32(rows: NDArray[np.float32]) -> None:
    encoded = embeddings(quantize(rows, "float"), "base64")
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), dtype="<f4") for each in encoded]
    assert np.array_equal(np.stack(decoded), rows)


@given(matrices)
def test_a_slice_of_columns_is_encoded_as_if_it_stood_alone(rows: NDArray[np.float32]) -> None:
    half = rows[:, : max(1, rows.shape[1] // 2)]
    assert embeddings(quantize(half, "float"), "base64") == embeddings(half.copy(), "base64")


@given(matrices, st.data())
def test_vectors_of_several_inputs_come_apart_again(rows: NDArray[np.float32], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))) if len(rows) > 1 else [])
    parts = np.split(rows, cuts)
    lengths = [len(part) for part in parts]
    for part, each in zip(parts, embeddings(rows, "float", lengths), strict=True):
        assert np.array_equal(np.array(each["embedding"], dtype=np.float32), part)
    for part, each in zip(parts, embeddings(quantize(rows, "int8"), "base64", lengths), strict=True):
        assert each["shape"] == list(part.shape)
        assert base64.b64decode(each["embedding"]) == quantize(part, "int8").tobytes()


@given(matrices)
def test_binary_is_one_sign_bit_a_dimension(rows: NDArray[np.float32]) -> None:
    packed = quantize(rows, "ubinary")
    assert packed.dtype == np.uint8
    assert np.array_equal(np.unpackbits(packed, axis=1)[:, : rows.shape[1]], rows > 0)
    assert np.array_equal(quantize(rows, "binary").astype(np.int16), packed.astype(np.int16) - 128)


@given(matrices)
def test_int8_is_the_row_scaled_to_its_largest_value(rows: NDArray[np.float32]) -> None:
    quantized = quantize(rows, "int8")
    exact = rows.astype(np.float64)
    scale = np.abs(exact).max(axis=1, keepdims=True)
    assert quantized.dtype == np.int8
    assert np.all(np.abs(quantized * (scale / 127) - exact) <= scale * (0.5 / 127 + 1e-5))
    assert np.array_equal(quantize(rows, "uint8").astype(np.int16), quantized.astype(np.int16) + 128)


@given(matrices, matrices)
def test_a_row_does_not_depend_on_its_neighbours(rows: NDArray[np.float32], others: NDArray[np.float32]) -> None:
    others = np.resize(others, (len(others), rows.shape[1]))
    for dtype in ("int8", "uint8", "binary", "ubinary"):
        alone, together = quantize(rows, dtype), quantize(np.concatenate([rows, others]), dtype)
        assert np.array_equal(alone, together[: len(rows)])


def test_int8_keeps_the_cosine_of_a_unit_vector() -> None:
    row = np.random.default_rng(0).normal(size=(1, 384)).astype(np.float32)
    quantized = quantize(row, "int8").astype(np.float32)
    assert np.sum(row * quantized) / np.linalg.norm(row) / np.linalg.norm(quantized) > 0.9999


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_quantised_rows_travel_as_integers_and_as_bytes(dtype: str) -> None:
    rows = quantize(np.array([[0.5, -0.25, 0.0, 1.0]], dtype=np.float32), dtype)  # type: ignore[arg-type]
    [numbers] = embeddings(rows, "float")
    [text] = embeddings(rows, "base64")
    assert numbers["embedding"] == rows[0].tolist()
    assert base64.b64decode(text["embedding"]) == rows[0].tobytes()
