"""A request's `input` to texts, token id lists and images, with messages that name the place of what is wrong."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlx_embeddings_server.errors import InvalidInput, quoted

# A string that is nothing but an http(s) URL, or a data URI of an image. Nothing is tried twice: texts may be large.
_IMAGE: Final = re.compile(r"\s*+(?:https?://\S++\s*+\Z|data:image/)", re.IGNORECASE)
_PAPER: Final = {"title", "abstract"}
_KINDS: Final = {"text": "a text", "image": "an image"}


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image by URL, data URI or base64, and a text that goes with it."""

    source: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class _Model:
    modalities: Sequence[str]
    separator: str | None


Content = str | tuple[int, ...] | ImageSource


def parse_input(
    value: Any, *, modalities: Sequence[str], separator: str | None = None, max_inputs: int, field: str = "input"
) -> list[Content]:
    """A string, token ids, an item, or a list of 1 to `max_inputs` of these. Raises `InvalidInput`.

    Where the model takes images, a string that is an http(s) URL or a `data:image/` URI is one, with or without white
    space around it; a URL among other words is text. A chat's parts of the types `text` and `image_url` are items too.
    A paper's `title` and `abstract` are one text with `separator` between, where the model has one.
    """
    model = _Model(modalities, separator)
    if isinstance(value, str | dict):
        return [_parse_one(value, field, model)]
    if not isinstance(value, list):
        raise InvalidInput(
            field, f"must be a string, token ids, an item or a list of them, not {_kind(value)}", code="invalid_type"
        )
    if not value:
        raise InvalidInput(field, "is an empty list: send at least one text", code="empty_input")
    if _is_integer(value[0]):
        return [_parse_one(value, field, model)]
    if len(value) > max_inputs:
        raise InvalidInput(
            field, f"has {len(value)} items, the limit is {max_inputs}: send several requests", code="too_many_inputs"
        )
    return [_parse_one(each, f"{field}[{index}]", model) for index, each in enumerate(value)]


def has_token_ids(value: Any) -> bool:
    """Whether a request's input is or has lists of them."""
    return isinstance(value, list) and any(isinstance(each, int | list) for each in value)


def _parse_one(value: Any, where: str, model: _Model) -> Content:
    if isinstance(value, str):
        if "image" in model.modalities and _IMAGE.match(value):
            return ImageSource(value)
        _check_modality("text", where, model.modalities)
        return _text(value, where)
    if isinstance(value, list):
        _check_modality("text", where, model.modalities)
        return _token_ids(value, where)
    if isinstance(value, dict):
        return _item(value, where, model)
    raise InvalidInput(
        where, f"must be a string, a list of token ids or an item, not {_kind(value)}", code="invalid_type"
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(where, f"must be a string, not {_kind(value)}", code="invalid_type")
    if not value:
        raise InvalidInput(where, "is an empty string: leave it out, or send a text", code="empty_input")
    return value


def _token_ids(value: list[Any], where: str) -> tuple[int, ...]:
    if not value:
        raise InvalidInput(where, "is an empty list of token ids", code="empty_input")
    if set(map(type, value)) != {int}:  # a request may hold millions
        place, token_id = next((place, each) for place, each in enumerate(value) if not _is_integer(each))
        raise InvalidInput(
            f"{where}[{place}]", f"must be a token id (an integer), not {_kind(token_id)}", code="invalid_type"
        )
    return tuple(value)


def _item(value: dict[str, Any], where: str, model: _Model) -> str | ImageSource:
    value = _without_type(value)
    if value.keys() & _PAPER:
        return _paper(value, where, model.separator)
    for modality in value.keys() & _KINDS.keys():
        _check_modality(modality, where, model.modalities)
    if not value or not value.keys() <= _KINDS.keys():
        known = " or ".join(f'{{"{modality}": ...}}' for modality in model.modalities)
        raise InvalidInput(where, f"must be {known}, {_keys(value)}", code="invalid_type")
    if "image" not in value:
        return _text(value["text"], f"{where}.text")
    text = _text(value["text"], f"{where}.text") if "text" in value else None
    return ImageSource(_text(value["image"], f"{where}.image"), text)


def _paper(value: dict[str, Any], where: str, separator: str | None) -> str:
    """SPECTER2's form of a paper: what it lacks leaves its side of the separator empty."""
    if separator is None:
        raise InvalidInput(
            where, 'is a paper, and this model takes none: send {"text": ...}', code="unsupported_modality"
        )
    if not value.keys() <= _PAPER:
        raise InvalidInput(where, f'must be {{"title": ..., "abstract": ...}}, {_keys(value)}', code="invalid_type")
    for key, part in value.items():
        if not isinstance(part, str | None):
            raise InvalidInput(f"{where}.{key}", f"must be a string, not {_kind(part)}", code="invalid_type")
    title, abstract = (value.get(key) or "" for key in ("title", "abstract"))
    if not title and not abstract:
        raise InvalidInput(where, "has neither a title nor an abstract: leave it out", code="empty_input")
    return f"{title}{separator}{abstract}"


def _keys(value: dict[str, Any]) -> str:
    return f"it has the keys {quoted(', '.join(value))}" if value else "it is an empty object"


def _without_type(value: dict[str, Any]) -> dict[str, Any]:
    """A part of a chat's message as an item."""
    match value:
        case {"type": "text", "text": text, **others} if not others:
            return {"text": text}
        case {"type": "image_url", "image_url": {"url": url}, **others} if not others:
            return {"image": url}
    return value


def _check_modality(modality: str, where: str, modalities: Sequence[str]) -> None:
    if modality not in modalities:
        taken = " and ".join("images" if each == "image" else each for each in modalities)
        raise InvalidInput(
            where, f"has {_KINDS[modality]}, and this model takes {taken} only", code="unsupported_modality"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        float: "a number",
        int: "an integer",
    }
    return names.get(type(value), "null")
