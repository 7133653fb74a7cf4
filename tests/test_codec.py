"""Rows survive the wire."""

import base64

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mlx_embeddings_server.codec import embedding_list, encode_rows, quantize

floats = st.floats(-1e6, 1e6, width=32, allow_nan=False)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=floats)


def embeddings(body: bytes) -> list[object]:
    return [item["embedding"] for item in orjson.loads(body)["data"]]


@given(matrices)
def test_json_floats_read_back_bit_for_bit(rows: NDArray[np.float32]) -> None:
    body = embedding_list(quantize(rows, "float"), "float", model="m", usage={})
    assert np.array_equal(np.array(embeddings(body), dtype=np.float32), rows)


@given(matrices)
def test_base64_is_little_endian_float32(rows: NDArray[np.float32]) -> None:
    encoded = encode_rows(quantize(rows, "float"), "base64")
    decoded = [np.frombuffer(base64.b64decode(each), dtype="<f4") for each in encoded]
    assert np.array_equal(np.stack(decoded), rows)


@given(matrices)
def test_a_slice_of_columns_is_encoded_as_if_it_stood_alone(rows: NDArray[np.float32]) -> None:
    half = rows[:, : max(1, rows.shape[1] // 2)]
    assert encode_rows(quantize(half, "float"), "base64") == encode_rows(half.copy(), "base64")


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
    [numbers] = embeddings(embedding_list(rows, "float", model="m", usage={}))
    [text] = embeddings(embedding_list(rows, "base64", model="m", usage={}))
    assert numbers == rows[0].tolist()
    assert base64.b64decode(str(text)) == rows[0].tobytes()
