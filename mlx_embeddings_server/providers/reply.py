"""What an OpenAI-compatible API answered, checked before anything is made of it."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mlx_embeddings_server.providers.base import InputRefused, ProviderFailed

_LONGEST_EXCERPT = 200  # characters
_MOST_TOKENS = 10**9  # that are believed of one request
# How OpenAI, vLLM, TEI and this server say that an input is too long.
_TOO_LONG_CODES = frozenset(("input_too_long", "context_length_exceeded"))
_TOO_LONG = re.compile(r"maximum (?:context|input) length|too (?:long|many tokens)|must have less than", re.IGNORECASE)
# Whatever looks like a key, ours or another's.
_KEY = re.compile(r"\b(?:sk|pk|key|Bearer)[-_ ][A-Za-z0-9*._-]{8,}")


@dataclass(frozen=True, slots=True)
class Reply:
    """Vectors of one request's inputs, in their order."""

    rows: NDArray[np.float32]  # [inputs, dimensions]
    tokens: int | None  # of all inputs; None where the API does not say


def parse(provider: str, body: bytes, count: int) -> Reply:
    """Raises `ProviderFailed` for whatever are not `count` vectors of one size, of finite numbers."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _unusable(provider, "what is no JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        is_error = isinstance(content, dict) and "error" in content
        raise _unusable(provider, "an error, as if it were vectors" if is_error else "something else than vectors")
    vectors = _in_order(provider, content["data"], count)
    rows = [_row(provider, each) for each in vectors]
    if len({len(row) for row in rows}) != 1 or not len(rows[0]):
        raise _unusable(provider, "vectors of different sizes, or empty ones")
    stacked = np.stack(rows)
    if not np.isfinite(stacked).all():
        raise _unusable(provider, "a vector with NaN or infinity")
    return Reply(stacked, _tokens(content.get("usage")))


def _in_order(provider: str, data: Sequence[Any], count: int) -> list[Any]:
    """By `index`, which may be left out by all."""
    if len(data) != count:
        raise _unusable(provider, f"{len(data)} vectors for {count} inputs")
    if not all(isinstance(each, dict) and "embedding" in each for each in data):
        raise _unusable(provider, "something else than vectors")
    found = {each.get("index", place): each["embedding"] for place, each in enumerate(data) if _is_place(each)}
    if found.keys() != set(range(count)):
        raise _unusable(provider, "vectors whose indexes are not those of the inputs")
    return [found[place] for place in range(count)]


def _is_place(vector: Mapping[str, Any]) -> bool:
    return type(vector.get("index", 0)) is int


def _row(provider: str, value: Any) -> NDArray[np.float32]:
    """From base64 of little-endian float32, or from a list of numbers. [dimensions]"""
    try:
        if isinstance(value, str):
            return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4").astype(np.float32)
        row = np.array(value)
    except (binascii.Error, ValueError, OverflowError):
        raise _unusable(provider, "something else than vectors") from None
    if row.ndim != 1 or row.dtype.kind not in "fiu":
        raise _unusable(provider, "something else than vectors")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        return row.astype(np.float32)


def _tokens(usage: Any) -> int | None:
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens <= _MOST_TOKENS else None


def refusal(body: bytes, key: str | None) -> InputRefused:
    """Of a reply that says that the inputs are wrong: a short excerpt, without any key."""
    error = _error(body)
    texts = [error.get(name) for name in ("message", "error", "detail")]
    message = next((text for text in texts if isinstance(text, str)), "")
    is_too_long = not _TOO_LONG_CODES.isdisjoint(
        each for each in (error.get("code"), texts[1]) if isinstance(each, str)
    )
    if key:
        message = message.replace(key, "...")
    message = " ".join(_KEY.sub("...", message).split())
    message = "".join(character for character in message if character.isprintable())
    if len(message) > _LONGEST_EXCERPT:
        message = f"{message[:_LONGEST_EXCERPT]}..."
    lengths = _lengths(error.get("details")) if is_too_long else {}
    return InputRefused(
        message,
        is_too_long=is_too_long or _TOO_LONG.search(message) is not None,
        lengths=[(place, tokens) for place, (tokens, _) in lengths.items()],
        max_tokens=next((most for _, most in lengths.values()), 0),
    )


def _error(body: bytes) -> Mapping[str, Any]:
    """In the shapes of OpenAI, vLLM, FastAPI, TEI and tldw. Of anything else nothing is told on."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(content, dict):
        return {}
    return content["error"] if isinstance(content.get("error"), dict) else content


def _lengths(details: Any) -> dict[int, tuple[int, int]]:
    """As this server tells them: tokens and the most of them, by place. All of them, or none."""
    found = {}
    for each in details if isinstance(details, list) else ():
        match each:
            case {"index": int(place), "tokens": int(tokens), "max_tokens": int(most)} if min(place, tokens, most) >= 0:
                found[place] = tokens, most
            case _:
                return {}
    return found


def _unusable(provider: str, what: str) -> ProviderFailed:
    return ProviderFailed(f"the provider {provider!r} answered {what}")
