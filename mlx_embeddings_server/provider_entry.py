"""What the YAML file says of one provider, below `providers:`, and what models say of providers and of each other."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from mlx_embeddings_server.model_entry import Text, aliases_of, listed
from mlx_embeddings_server.providers import LOCAL
from mlx_embeddings_server.setting_types import check_url, parse_duration
from mlx_embeddings_server.yaml_file import Location

# Whose address and variable nobody needs to write.
KNOWN: Final = {"openai": ("https://api.openai.com/v1", "OPENAI_API_KEY")}
# What else means this process: the tldw server's clients say so.
LOCAL_NAMES: Final = (LOCAL, "huggingface")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_KEY: Final = re.compile(r"[!-~]{1,4096}")
_MOST_KEY_BYTES: Final = 8192
# A model that runs elsewhere is not loaded here.
_LOCAL_KEYS: Final = (
    "type", "backend", "device", "dtype", "revision", "pretrained", "adapters", "max_batch_tokens",
    "max_image_tokens", "truncate", "allow_unverified", "pinned", "keep_alive",
)  # fmt: skip
_REMOTE_KEYS: Final = ("max_tokens",)


def _check_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or not value.isprintable() or " " in value:
        raise ValueError("must be an http or https URL such as https://api.example.com/v1")
    check_url(value)
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user and no password: name the variable with the key in `api_key_env`")
    if parts.query or parts.fragment:
        raise ValueError("must end with its path, such as /v1: without ? and #")
    return value.rstrip("/").removesuffix("/embeddings")


def _bounded(value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError("must be seconds above 0, or such as 30s or 2m")
    return value


Url = Annotated[Text, AfterValidator(_check_url)]
Seconds = Annotated[float, AfterValidator(_bounded), BeforeValidator(parse_duration)]
Models = Annotated[tuple[Text, ...], BeforeValidator(listed)]


class ProviderEntry(BaseModel):
    """An OpenAI-compatible API."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: Url | None = Field(None, description="what /embeddings is put behind, such as https://api.openai.com/v1")
    api_key_env: Text | None = None
    api_key_file: Text | None = None
    timeout: Seconds = 60.0
    connect_timeout: Seconds = 5.0
    batch_size: int = Field(100, ge=1, le=2048)
    max_in_flight: int = Field(8, ge=1, le=1000)
    retries: int = Field(2, ge=0, le=10)
    failure_threshold: int = Field(5, ge=1, le=1000)
    recovery: Seconds = 30.0
    models: Models = ()
    any_model: bool = False

    def variable(self, name: str) -> str | None:
        """The environment variable that has the key, if one has."""
        if self.api_key_env is not None or self.api_key_file is not None:
            return self.api_key_env
        return KNOWN[name][1] if name in KNOWN and self.url is None else None

    def url_of(self, name: str) -> str:
        return self.url or KNOWN[name][0]


def key_of(name: str, entry: ProviderEntry, folder: Path) -> SecretStr | None:
    """From the variable or the file. Raises `ValueError`, which tells nothing of it."""
    if entry.api_key_file is not None:
        place = folder / entry.api_key_file
        try:
            with place.open("rb") as file:
                key = file.read(_MOST_KEY_BYTES).decode("ascii").strip()
        except OSError as error:
            raise ValueError(f"{place} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            key = ""
        source = str(place)
    elif (variable := entry.variable(name)) is not None:
        key, source = os.environ.get(variable, "").strip(), f"the environment variable {variable}"
        if not key:
            raise ValueError(f"{source} has the key of the provider {name!r}, and is not set")
    else:
        return None
    if not _KEY.fullmatch(key):
        raise ValueError(f"{source} holds no key: it must be one word of ASCII characters")
    return SecretStr(key)


def provider_problems(models: Any, providers: Any, *, has_others: bool) -> Iterator[tuple[Location, str]]:
    """What does not fit together: where, and what is wrong. Both are what the file has, and may be anything at all.

    `has_others`: --model serves models, too, whose names are not known yet.
    """
    providers = providers if isinstance(providers, Mapping) else {}
    models = models if isinstance(models, Mapping) else {}
    for name, entry in providers.items():
        yield from ((("providers", name, *where), message) for where, message in _of_provider(name, entry))
    known = _known(models)
    for name, entry in models.items():
        if isinstance(entry, Mapping):
            found = (*_of_model(entry, providers), *_of_fallback(name, entry, models, providers, known, has_others))
            yield from ((("models", name, *where), message) for where, message in found)
    yield from _cycles(models, known)


def _of_provider(name: str, entry: Any) -> Iterator[tuple[Location, str]]:
    if not _NAME.fullmatch(name) or name in LOCAL_NAMES:
        taken = ", and not one of those that mean this server" if name in LOCAL_NAMES else ""
        yield (), f"a provider's name must be of letters, digits, '-' and '_', 63 at most{taken}"
    if not isinstance(entry, Mapping):
        return
    if entry.get("url") is None and name not in KNOWN:
        yield (), f"needs `url`, such as http://127.0.0.1:8080/v1; known without one: {', '.join(KNOWN)}"
    if entry.get("api_key_env") is not None and entry.get("api_key_file") is not None:
        yield ("api_key_file",), "and api_key_env exclude each other: keep one of them"
    if entry.get("any_model") is True and entry.get("models"):
        yield ("any_model",), "allows all models, and `models` some: keep one of them"


def _of_model(entry: Mapping[str, Any], providers: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    provider = entry.get("provider")
    if isinstance(provider, str) and not _is_known(provider, providers):
        yield ("provider",), f"there is no provider {provider[:100]!r}; known: {', '.join(_names(providers))}"
    is_local = provider is None or provider in LOCAL_NAMES
    for key in _REMOTE_KEYS if is_local else _LOCAL_KEYS:
        if entry.get(key) is not None:
            yield (key,), ("is of models of other providers: of one that runs here it is known" if is_local else
                           "is of models that run here, and this one runs at its provider")  # fmt: skip


def _of_fallback(
    name: str,
    entry: Mapping[str, Any],
    models: Mapping[str, Any],
    providers: Mapping[str, Any],
    known: Mapping[str, str],
    has_others: bool,
) -> Iterator[tuple[Location, str]]:
    for place, reference in _references(entry):
        where: Location = ("fallback", place) if isinstance(entry["fallback"], list) else ("fallback",)
        provider, _, model = reference.partition(":")
        if reference not in known and model and _is_known(provider, providers):
            if provider not in LOCAL_NAMES:
                reference = next((each for each, of in models.items() if _is_same(of, provider, model)), reference)
            elif model not in known and not has_others:
                yield where, _unknown(model, known)
                continue
            else:
                reference = model
        elif reference not in known:
            if not has_others:
                yield where, _unknown(reference, known)
            continue
        other = models.get(known.get(reference, reference))
        if other is entry:
            yield where, "is the model itself: a fallback is another one"
            continue
        sizes = [each.get("dimensions") for each in (entry, other) if isinstance(each, Mapping)]
        if entry.get("fallback_other_dimensions") is True or None in sizes or len(set(sizes)) < 2:
            continue
        yield (
            where,
            (
                f"has {sizes[1]} dimensions, and {name} {sizes[0]}: mixed in one index they are silent damage. "
                "`fallback_other_dimensions: true` says that you want it"
            ),
        )


def _unknown(reference: str, known: Mapping[str, str]) -> str:
    return f"there is no model {reference[:100]!r}; known: {', '.join(known)}; or a provider's, as PROVIDER:MODEL"


def _is_same(entry: Any, provider: str, model: str) -> bool:
    return isinstance(entry, Mapping) and (entry.get("provider"), entry.get("name")) == (provider, model)


def _cycles(models: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[tuple[Location, str]]:
    """Lists that lead back, each cycle once. What is named as PROVIDER:MODEL comes without its own list."""
    done: set[str] = set()
    for first in models:
        # The way from `first`, with what is left to look at of each model on it; a file may have thousands.
        path: dict[str, Iterator[tuple[int, str]]] = {} if first in done else {first: _next_of(first, models)}
        done.add(first)
        while path:
            name = next(reversed(path))
            place, reference = next(path[name], (0, None))
            if reference is None:
                del path[name]
                continue
            target = known.get(reference, "")
            if target in path and target != name:
                way = list(path)
                where: Location = (place,) if isinstance(models[name]["fallback"], list) else ()
                circle = " -> ".join([*way[way.index(target) :], target])
                yield (
                    ("models", name, "fallback", *where),
                    f"goes round in a circle: {circle[:500]}; PROVIDER:MODEL comes without its own list",
                )
            elif target in models and target not in done:
                done.add(target)
                path[target] = _next_of(target, models)


def _next_of(name: str, models: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    entry = models[name]
    return iter(_references(entry) if isinstance(entry, Mapping) else ())


def _references(entry: Mapping[str, Any]) -> list[tuple[int, str]]:
    references = listed(entry.get("fallback"))
    several = references if isinstance(references, tuple) else ()
    return [(place, each) for place, each in enumerate(several) if isinstance(each, str)]


def _known(models: Mapping[str, Any]) -> dict[str, str]:
    """Names and aliases, to names."""
    known = {name: name for name in models}
    for name, entry in models.items():
        aliases = aliases_of(entry) if isinstance(entry, Mapping) else None
        for alias in aliases if isinstance(aliases, tuple) else ():
            if isinstance(alias, str):
                known.setdefault(alias, name)
    return known


def _is_known(provider: str, providers: Mapping[str, Any]) -> bool:
    return provider in _names(providers) or provider in LOCAL_NAMES


def _names(providers: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys((LOCAL, *KNOWN, *providers)))
