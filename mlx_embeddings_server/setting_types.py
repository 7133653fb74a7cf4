"""How settings are written, wherever they come from: names, durations, sizes, devices, adapters."""

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ByteSize
from pydantic_settings import NoDecode

# Beyond it a clock's arithmetic gives out somewhere; who means longer means never.
_LONGEST_SECONDS = 366 * 24 * 3600
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def _split_names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _join_mapping(value: Any) -> Any:
    """YAML's way to write names with values. What is no text there is none of ours: it makes a wrong `NAME=`."""
    if not isinstance(value, dict):
        return value
    return tuple(f"{name}={place if isinstance(place, str) else ''}" for name, place in value.items())


def _check_adapters(value: tuple[str, ...]) -> tuple[str, ...]:
    names = [name for name, _, place in (each.partition("=") for each in value) if name and place]
    if len(names) < len(value):
        raise ValueError("must be NAME=ID_OR_PATH, such as adhoc_query=allenai/specter2_adhoc_query")
    if len(set(names)) < len(names):
        raise ValueError("gives two adapters the same name")
    return value


def _check_device(value: str) -> str:
    kind, colon, number = value.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
    return value


def parse_duration(value: Any) -> Any:
    """Seconds, `math.inf` for never."""
    if value is None:
        return None
    if value in ("never", "-1", -1):
        return math.inf
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh]?)\s*", value)):
        seconds = float(match[1]) * _UNIT_SECONDS[match[2]]
    if not 0 <= seconds <= _LONGEST_SECONDS:
        raise ValueError("must be seconds, or such as 30s, 5m or 1h (a year at most), or never")
    return seconds


def _none_for_never(value: float | None) -> float | None:
    return None if value == math.inf else value


def _check_size(value: Any) -> Any:
    """ByteSize itself takes `true`, bits, and any words behind the unit."""
    if value is None or (type(value) is int and value > 0):
        return value
    number = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmgt]i?)?b?", str(value).strip(), re.IGNORECASE)
    if not isinstance(value, str) or number is None or float(number[1]) == 0:
        raise ValueError("must be a size such as 16GB, 800MB or 12GiB, or a number of bytes")
    return value.strip()


# From a flag a list comes as it is; from the environment or YAML it may be one string, with commas between the names.
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)]
Adapters = Annotated[Names, AfterValidator(_check_adapters), BeforeValidator(_join_mapping)]
Device = Annotated[str, AfterValidator(_check_device)]
# Seconds; None is never.
Duration = Annotated[float | None, AfterValidator(_none_for_never), BeforeValidator(parse_duration)]
Size = Annotated[ByteSize | None, BeforeValidator(_check_size)]
