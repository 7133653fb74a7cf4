"""How settings are written, wherever they come from: names, durations, sizes, devices, adapters."""

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ByteSize, SecretStr
from pydantic_settings import NoDecode

# Beyond it a clock's arithmetic gives out somewhere; who means longer means never.
_LONGEST_SECONDS = 366 * 24 * 3600
_SHORTEST_JWT_SECRET = 32  # bytes
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
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
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    number = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmgt]i?)?b?", str(value).strip(), re.IGNORECASE)
    if not isinstance(value, str) or number is None or float(number[1]) == 0:
        raise ValueError("must be a size such as 16GB, 800MB or 12GiB, or a number of bytes")
    return value.strip()


def check_key(value: str) -> str:
    """Of a key or URL that is kept secret, so no message may repeat it."""
    if not value:
        raise ValueError("is empty: leave it out, or give a key")
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ValueError("must be of letters, digits and signs of ASCII without spaces: it goes into a header")
    return value


def check_jwt_secret(value: str) -> str:
    if (size := len(value.encode())) < _SHORTEST_JWT_SECRET:
        raise ValueError(
            f"has {size} bytes, and HS256 wants {_SHORTEST_JWT_SECRET} or more (RFC 7518, 3.2): `openssl rand -hex 32` "
            "makes one"
        )
    return value


def _check_key_set(value: str) -> str:
    """A path, or a URL whose answer nobody on the way can change."""
    if "://" not in value:
        return value
    check_url(value)
    url = urlsplit(value)
    if url.username is not None or url.password is not None:
        raise ValueError("must be a URL without user and password")
    if url.hostname and (url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.hostname))):
        return value
    raise ValueError(
        "must be a file or an https:// URL; http:// is for this machine alone, such as http://127.0.0.1:8080/keys"
    )


def check_url(value: str) -> None:
    """Else each request there would fail in a way of its own, or the start. Raises `ValueError`."""
    import httpx  # takes 50 ms, and few settings are URLs

    try:
        url = httpx.URL(value)
        url.host.encode("idna")  # as looking it up does
        is_one = url.port is None or 0 < url.port < 1 << 16
    except (httpx.InvalidURL, ValueError):
        is_one = False
    if not is_one:
        raise ValueError("must be a URL of a host and a port that can be, such as https://example.com:8443/path")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if each != "*" and not _ORIGIN.fullmatch(each):
            raise ValueError(
                "must be *, or such as https://app.example.com: in lower case, no path and no / at the end"
            )
    return value


def _check_redis_url(value: str) -> str:
    if not re.match(r"rediss?://([^/@]*@)?[^/@:]+:[0-9]+(/|$)|redis\+unix:///", value):
        raise ValueError("must be redis://HOST:PORT, rediss://HOST:PORT or redis+unix:///PATH")
    return value


# A password with a / or ? in it, as it is, would end before its @.
_CACHE_URL = r"rediss?://[^/?#]+(/[0-9]*)?(\?[^#@]*)?|unix://[^/?#]*/[^?#]+(\?[^#]*)?|file:/*[^/?#][^?#]*"


def _check_cache_url(value: str) -> str:
    if not re.fullmatch(_CACHE_URL, value):
        raise ValueError(
            "must be redis://HOST:PORT/DB, rediss://HOST:PORT/DB, unix:///PATH of a socket, or file:///PATH of a folder"
        )
    return value


def _check_lifetime(value: float | None) -> float | None:
    if value == 0:
        raise ValueError("is 0: leave the cache off for that")
    return value


def _secret(check: Callable[[str], str]) -> AfterValidator:
    def checked(value: SecretStr) -> SecretStr:
        check(value.get_secret_value())
        return value

    return AfterValidator(checked)


# From a flag a list comes as it is; from the environment or YAML it may be one string, with commas between the names.
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)]
Adapters = Annotated[Names, AfterValidator(_check_adapters), BeforeValidator(_join_mapping)]
Device = Annotated[str, AfterValidator(_check_device)]
# Seconds; None is never.
Duration = Annotated[float | None, AfterValidator(_none_for_never), BeforeValidator(parse_duration)]
Size = Annotated[ByteSize | None, BeforeValidator(_check_size)]
Key = Annotated[SecretStr, _secret(check_key)]
JwtSecret = Annotated[SecretStr, _secret(check_jwt_secret)]
KeySetPlace = Annotated[str, AfterValidator(_check_key_set)]
Origins = Annotated[Names, AfterValidator(_check_origins)]
# Seconds; None is for ever.
Lifetime = Annotated[Duration, AfterValidator(_check_lifetime)]
CacheUrl = Annotated[SecretStr, _secret(_check_cache_url)]
RedisUrl = Annotated[SecretStr, _secret(_check_redis_url)]  # it may have a password in it
