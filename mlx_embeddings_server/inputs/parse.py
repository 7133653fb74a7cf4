"""A request's `input` to a list of texts and token id lists, with messages that name the place of what is wrong."""

from collections.abc import Sequence
from typing import Any

from mlx_embeddings_server.errors import InvalidRequest, quoted

Content = str | tuple[int, ...]


def parse_input(value: Any, *, modalities: Sequence[str], max_inputs: int) -> list[Content]:
    """A string, token ids, an item, or a list of 1 to `max_inputs` of these. Raises `InvalidRequest`."""
    if isinstance(value, str | dict):
        return [_parse_one(value, "input", modalities)]
    if not isinstance(value, list):
        raise _invalid(
            f"input must be a string, token ids, an item or a list of them, not {_kind(value)}", "invalid_type"
        )
    if not value:
        raise _invalid("input is an empty list: send at least one text", "empty_input")
    if _is_integer(value[0]):
        return [_token_ids(value, "input")]
    if len(value) > max_inputs:
        raise _invalid(
            f"input has {len(value)} items, the limit is {max_inputs}: send several requests", "too_many_inputs"
        )
    return [_parse_one(each, f"input[{index}]", modalities) for index, each in enumerate(value)]


def _parse_one(value: Any, where: str, modalities: Sequence[str]) -> Content:
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list):
        return _token_ids(value, where)
    if isinstance(value, dict):
        return _item(value, where, modalities)
    raise _invalid(f"{where} must be a string, a list of token ids or an item, not {_kind(value)}", "invalid_type")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _invalid(f"{where} must be a string, not {_kind(value)}", "invalid_type")
    if not value:
        raise _invalid(f"{where} is an empty string: leave it out, or send a text", "empty_input")
    return value


def _token_ids(value: list[Any], where: str) -> tuple[int, ...]:
    if not value:
        raise _invalid(f"{where} is an empty list of token ids", "empty_input")
    if set(map(type, value)) != {int}:  # a request may hold millions
        place, token_id = next((place, each) for place, each in enumerate(value) if not _is_integer(each))
        raise _invalid(f"{where}[{place}] must be a token id (an integer), not {_kind(token_id)}", "invalid_type")
    return tuple(value)


def _item(value: dict[str, Any], where: str, modalities: Sequence[str]) -> str:
    if "image" in value and "image" not in modalities:
        raise _invalid(
            f"{where} has an image, and this model takes {' and '.join(modalities)} only", "unsupported_modality"
        )
    if value.keys() & {"title", "abstract"}:
        raise _invalid(
            f'{where} is a paper, and this model takes plain texts: send {{"text": ...}}', "unsupported_modality"
        )
    if set(value) != {"text"}:
        raise _invalid(f'{where} must be {{"text": ...}}, it has the keys {quoted(", ".join(value))}', "invalid_type")
    return _text(value["text"], f"{where}.text")


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


def _invalid(message: str, code: str) -> InvalidRequest:
    return InvalidRequest(message, param="input", code=code)
