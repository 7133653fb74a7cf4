"""What is kept of one input, and how it is written where bytes are kept."""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mlx_embeddings_backends.base import Output, PatchGrid, Row, SparseVector, Vector
from mlx_embeddings_server.providers.base import Account

_MAGIC = b"MLXE\x01"
_CHECKSUM_BYTES = 16
_ACCOUNT = struct.Struct("<Q??III")  # tokens, truncated, has patches, rows, columns, offset
_DTYPES = ("<f4", "<i4", "<i8", "<f8", "<f2")
_OUTPUTS: tuple[Output, ...] = get_args(Output)
_ARRAY, _SPARSE, _NAMED = range(3)
# Beside the numbers: the key, the objects around them, and their places in the cache's tables (measured).
OVERHEAD_BYTES = 500
_ARRAY_BYTES = 128


class NotWritable(Exception):
    """A value has numbers of a type that is not written."""


@dataclass(frozen=True, slots=True)
class Value:
    """One input's raw vectors, which nobody is to change, and what is known of it beside them."""

    row: Row
    account: Account
    nbytes: int  # that it takes in memory, once it is kept
    is_lent: bool = False

    @classmethod
    def of(cls, row: Row, account: Account) -> "Value":
        """To keep: a copy that nobody can change."""
        return cls.lent(row, account).kept()

    @classmethod
    def lent(cls, row: Row, account: Account) -> "Value":
        """As it is, for as long as a request takes: it may be a part of a batch, which it keeps in memory."""
        return cls(row, account, OVERHEAD_BYTES + _size(row), True)

    def kept(self) -> "Value":
        return Value(_frozen(self.row), self.account, self.nbytes) if self.is_lent else self


def _frozen(row: Row) -> Row:
    match row:
        case SparseVector(indices, values):
            return SparseVector(_frozen_array(indices), _frozen_array(values))
        case Mapping():
            return MappingProxyType({name: cast("Vector", _frozen(vector)) for name, vector in row.items()})
    return _frozen_array(row)


def _frozen_array(array: NDArray[Any]) -> NDArray[Any]:
    kept = np.array(array, order="C")
    kept.setflags(write=False)
    return kept


def _size(row: Row) -> int:
    match row:
        case SparseVector(indices, values):
            return indices.nbytes + values.nbytes + 2 * _ARRAY_BYTES
        case Mapping():
            return sum(map(_size, row.values())) + len(row) * _ARRAY_BYTES
    return row.nbytes + _ARRAY_BYTES


def encode(key: bytes, value: Value) -> bytes:
    """Checksum, version, account, vectors. The checksum is of `key` too: the bytes are of use under no other.

    Raises `NotWritable`.
    """
    account = value.account
    grid = account.patches or PatchGrid(0, 0, 0)
    head = _ACCOUNT.pack(
        account.tokens, account.truncated, account.patches is not None, grid.rows, grid.columns, grid.offset
    )
    written = b"".join((_MAGIC, head, *_write(value.row)))
    return _checksum(key, written) + written


def decode(key: bytes, data: bytes) -> Value | None:
    """None: it is not what `encode` wrote under this key."""
    written = memoryview(data)[_CHECKSUM_BYTES:]
    if written[: len(_MAGIC)] != _MAGIC or data[:_CHECKSUM_BYTES] != _checksum(key, written):
        return None
    try:
        tokens, truncated, has_patches, *grid = _ACCOUNT.unpack_from(written, len(_MAGIC))
        row, end = _read(written, len(_MAGIC) + _ACCOUNT.size)
    except (struct.error, ValueError, IndexError):
        return None
    if end != len(written):
        return None
    return Value.of(row, Account(tokens, truncated, PatchGrid(*grid) if has_patches else None))


def _checksum(key: bytes, written: bytes | memoryview) -> bytes:
    return hashlib.blake2b(written, digest_size=_CHECKSUM_BYTES, key=key).digest()


def _write(row: Row) -> list[bytes]:
    match row:
        case SparseVector(indices, values):
            return [bytes((_SPARSE,)), *_write_array(indices), *_write_array(values)]
        case Mapping():
            parts = [bytes((_NAMED, len(row)))]
            for name, vector in row.items():
                parts += [bytes((_OUTPUTS.index(name),)), *_write(vector)]
            return parts
    return [bytes((_ARRAY,)), *_write_array(row)]


def _write_array(array: NDArray[Any]) -> tuple[bytes, bytes]:
    little = array.dtype.newbyteorder("<")
    if little.str not in _DTYPES:
        raise NotWritable(f"vectors of {array.dtype}")
    head = struct.pack(f"<BB{array.ndim}Q", _DTYPES.index(little.str), array.ndim, *array.shape)
    return head, array.astype(little, copy=False).tobytes()


def _read(data: memoryview, place: int) -> tuple[Row, int]:
    """What is at `place`, and where it ends."""
    kind, place = data[place], place + 1
    if kind == _ARRAY:
        return _read_array(data, place)
    if kind == _SPARSE:
        indices, place = _read_array(data, place)
        values, place = _read_array(data, place)
        return SparseVector(indices, values), place
    if kind != _NAMED:
        raise ValueError("no such kind")
    count, place = data[place], place + 1
    named: dict[Output, Vector] = {}
    for _ in range(count):
        name, kind = _OUTPUTS[data[place]], data[place + 1]
        if kind == _NAMED:
            raise ValueError("names within names")
        vector, place = _read(data, place + 1)
        named[name] = cast("Vector", vector)
    return named, place


def _read_array(data: memoryview, place: int) -> tuple[NDArray[Any], int]:
    dtype, dimensions = np.dtype(_DTYPES[data[place]]), data[place + 1]
    shape = struct.unpack_from(f"<{dimensions}Q", data, place + 2)
    start = place + 2 + 8 * dimensions
    end = start + math.prod(shape) * dtype.itemsize
    return np.frombuffer(data[start:end], dtype).reshape(shape), end
