"""Fields that other APIs call otherwise."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

EXCLUSIVE = "exclusive_fields"  # the type of the error


def respelled(values: Any, names: Mapping[str, str]) -> Any:
    """A request's fields with those of other names under ours. null is as good as left out; both are an error.

    `names` has ours by the other.
    """
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for other, name in names.items():
        if values.get(other) is None:
            continue
        if values.get(name) is not None:
            raise PydanticCustomError(
                EXCLUSIVE, "{name} and {other} mean the same: send one of them", {"name": name, "other": other}
            )
        values[name] = values[other]
    return values
