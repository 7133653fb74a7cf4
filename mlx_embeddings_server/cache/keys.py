"""What a vector is kept under: a hash of all that decides it, and of nothing else."""

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from mlx_embeddings_backends.base import EncodedImage, Item, Pair, Truncate

# Of what is hashed and of what is kept under it: entries of other versions are never met.
FORMAT = 1

# Hashing goes on in a thread for one content of so many characters or bytes; else other requests get their turn after
# about a millisecond of it.
_LARGE = 256_000
_LONG_PROMPT = 1000  # characters
_ITEM_COST = 1000  # of a content of no length, in characters
# A call that holds the interpreter for the whole of a text of 32 MB would stop the server, thread or not.
_AT_ONCE = 1 << 16

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

_Options = tuple[Any, ...]  # all of an item but its content
_options_of = attrgetter(*(field.name for field in fields(Item) if field.name != "content"))


def canonical(value: Any) -> bytes:
    """Different values have different encodings: each part has its type and its length before it."""
    match value:
        case None:
            kind, data = b"n", b""
        case str():
            kind, data = b"s", value.encode("utf-8", "surrogatepass")
        case bytes():
            kind, data = b"b", value
        case int():
            kind, data = b"i", b"%x" % value
        case tuple():
            kind, data = b"t", b"".join(map(canonical, value))
        case _:
            raise TypeError(f"{type(value).__name__} has no canonical encoding")
    return b"%b%d:%b" % (kind, len(data), data)


class Keys:
    """The keys of one request's items. `identity` stands for the model, as `identity.identity_of` has it."""

    def __init__(self, identity: bytes, truncate: Truncate) -> None:
        self._identity = identity
        self._truncate = truncate
        self._begun: dict[_Options, Hash] = {}  # most items share their options

    def of(self, item: Item) -> bytes:
        """32 bytes."""
        options = _options_of(item)
        if (begun := self._begun.get(options)) is None:
            begin = _begin if len(item.prompt) > _LONG_PROMPT else _begin_kept
            begun = self._begun[options] = begin(self._identity, self._truncate, options)
        return _with_content(begun, item.content).digest()


def _begin(identity: bytes, truncate: Truncate, options: _Options) -> "Hash":
    return hashlib.sha256(canonical((FORMAT, identity, truncate, options)))


# Never changed: `Keys` goes on with copies.
_begin_kept = lru_cache(256)(_begin)


async def keys_of(identity: bytes, items: Sequence[Item], truncate: Truncate) -> list[bytes]:
    """One for each item, without keeping the event loop from other requests."""
    keys, found, cost = Keys(identity, truncate), [], 0
    for item in items:
        length = _length(item)
        if length > _LARGE:
            found.append(await asyncio.to_thread(keys.of, item))
            continue
        found.append(keys.of(item))
        cost += length + _ITEM_COST
        if cost > _LARGE:
            cost = 0
            await asyncio.sleep(0)
    return found


def _with_content(begun: "Hash", content: str | tuple[int, ...] | EncodedImage | Pair) -> "Hash":
    """A content ends the hash: its kind is before it, and the length of each part, in characters, bytes or ids."""
    hashed = begun.copy()
    match content:
        case str():
            hashed.update(b"text")
            _add_text(hashed, content)
        case EncodedImage(data, text):
            hashed.update(b"image%d:" % len(data))
            hashed.update(data)
            hashed.update(b"alone" if text is None else b"with")
            _add_text(hashed, text or "")
        case Pair(query, document):
            hashed.update(b"pair")
            _add_text(hashed, query)
            _add_text(hashed, document)
        case _:
            hashed.update(b"ids%d:" % len(content))
            try:
                for start in range(0, len(content), _AT_ONCE):
                    hashed.update(array("q", content[start : start + _AT_ONCE]))
            except OverflowError:  # of no vocabulary, which is not for a cache to say
                hashed = begun.copy()
                hashed.update(b"wide ids" + ",".join(map(hex, content)).encode())
    return hashed


def _add_text(hashed: "Hash", text: str) -> None:
    hashed.update(b"%d:" % len(text))
    for start in range(0, len(text), _AT_ONCE):
        hashed.update(text[start : start + _AT_ONCE].encode("utf-8", "surrogatepass"))


def _length(item: Item) -> int:
    match item.content:
        case EncodedImage(data, text):
            return len(data) + len(text or "")
        case Pair(query, document):
            return len(query) + len(document)
        case content:
            return len(item.prompt) + len(content)
