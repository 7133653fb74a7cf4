"""What is kept of an input: as it was computed, in memory and as bytes."""

import hashlib
import tracemalloc
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mlx_embeddings_backends.base import PatchGrid, Row, SparseVector
from mlx_embeddings_server.cache.memory import MemoryLayer
from mlx_embeddings_server.cache.values import Value, decode, encode
from mlx_embeddings_server.providers.base import Account

KEY = bytes(range(32))
ACCOUNT = Account(7, False, None)
FLOATS = arrays.arrays(np.float32, arrays.array_shapes(max_dims=2, min_side=0, max_side=5))
SPARSE = arrays.array_shapes(max_dims=1, min_side=0, max_side=5).flatmap(
    lambda shape: st.builds(SparseVector, arrays.arrays(np.int32, shape), arrays.arrays(np.float32, shape))
)
NAMED = st.fixed_dictionaries({}, optional={"dense": FLOATS, "multi_vector": FLOATS, "sparse": SPARSE})
COUNTS = st.integers(0, 2**32 - 1)
ACCOUNTS = st.builds(Account, COUNTS, st.booleans(), st.none() | st.builds(PatchGrid, COUNTS, COUNTS, COUNTS))
VALUES = st.builds(Value.of, FLOATS | SPARSE | NAMED, ACCOUNTS)


def bits(row: Row) -> Any:
    """All of it, as it can be compared: NaN too, and the sign of zero."""
    if isinstance(row, Mapping):
        return {name: bits(vector) for name, vector in row.items()}
    if isinstance(row, SparseVector):
        return tuple(map(bits, astuple(row)))
    return row.dtype.str, row.shape, row.tobytes()


@given(VALUES)
def test_what_is_read_is_what_was_written(value: Value) -> None:
    read = decode(KEY, encode(KEY, value))
    assert read is not None
    assert (bits(read.row), read.account, read.nbytes) == (bits(value.row), value.account, value.nbytes)


@given(VALUES, st.data())
def test_damaged_bytes_are_no_value(value: Value, data: st.DataObject) -> None:
    written = bytearray(encode(KEY, value))
    written[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    assert decode(KEY, bytes(written)) is None


@given(VALUES, st.data())
def test_bytes_that_are_cut_or_have_more_behind_them_are_no_value(value: Value, data: st.DataObject) -> None:
    written = encode(KEY, value)
    assert decode(KEY, written[: data.draw(st.integers(0, len(written) - 1))]) is None
    assert decode(KEY, written + b"\0") is None


@given(VALUES)
def test_the_bytes_of_one_key_are_no_value_under_another(value: Value) -> None:
    assert decode(bytes(32), encode(KEY, value)) is None


@given(st.binary())
def test_foreign_bytes_are_no_value_and_no_error(data: bytes) -> None:
    assert decode(KEY, data) is None


def signed(written: bytes) -> bytes:
    return hashlib.blake2b(written, digest_size=16, key=KEY).digest() + written


@given(VALUES, st.data())
def test_wrong_bytes_with_a_right_checksum_are_no_error(value: Value, data: st.DataObject) -> None:
    written = bytearray(encode(KEY, value)[16:])
    assert decode(KEY, signed(bytes(written) + b"\0")) is None
    written[data.draw(st.integers(5, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    decode(KEY, signed(bytes(written)))


def test_a_row_is_kept_apart_from_its_batch_and_cannot_be_changed() -> None:
    batch = np.ones((64, 8), np.float32)
    kept = Value.of({"dense": batch[3], "sparse": SparseVector(np.arange(8, dtype=np.int32), batch[4])}, ACCOUNT)
    batch[:] = 2
    assert isinstance(kept.row, Mapping)
    dense, sparse = kept.row["dense"], kept.row["sparse"]
    assert isinstance(sparse, SparseVector) and isinstance(dense, np.ndarray)
    for array in (dense, sparse.values):
        assert array.base is None and (array == 1).all()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3
    with pytest.raises(TypeError):
        kept.row["dense"] = dense  # type: ignore[index]


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(384, np.float32),
        np.zeros((700, 128), np.float32),
        SparseVector(np.zeros(60, np.int32), np.zeros(60, np.float32)),
        {"dense": np.zeros(384, np.float32), "sparse": SparseVector(np.zeros(9, np.int32), np.zeros(9, np.float32))},
    ],
    ids=["dense", "multi_vector", "sparse", "named"],
)
def test_the_bytes_that_are_counted_are_those_that_the_process_takes(row: Row) -> None:
    memory = MemoryLayer(entries=10_000, max_bytes=10**9, ttl=60)
    tracemalloc.start()
    for number in range(500):
        memory.put(number.to_bytes(32, "big"), Value.of(row, Account(1000 + number, False, None)))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory.nbytes == pytest.approx(taken, rel=0.2)
