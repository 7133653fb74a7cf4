"""What the YAML file says of one model, below `models:`."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mlx_embeddings_server.setting_types import Adapters, Device, parse_duration
from mlx_embeddings_server.yaml_file import Location

# What is in a URL's path and in headers as it stands. Parts begin with a letter or a digit: `..` is a way, not a name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)?")
_MAX_NAME = 200
_NAME_RULE = (
    f"must be a name of letters, digits, '-', '_', '.' and ':', with one '/' at most, whose parts begin with a letter "
    f"or a digit, {_MAX_NAME} characters at most"
)


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def _prompt_names(value: Mapping[str, str]) -> Mapping[str, str]:
    if not all(name.strip() for name in value):
        raise ValueError("a prompt has an empty name")
    return value


Text = Annotated[str, AfterValidator(_not_empty)]


class ModelEntry(BaseModel):
    """None: as the setting of that name has it for all models."""

    # Strict: it comes from YAML alone, where `true` is no number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Text = Field(
        description="hub id or path of the model; ./ and ../ are from the file's folder; or what its provider calls it"
    )
    provider: Text | None = Field(None, description="local, which is the default, or one of `providers`")
    type: Literal["embeddings", "sparse-embeddings", "rerank"] | None = None
    backend: Literal["auto", "mlx", "torch"] | None = None
    device: Device | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    revision: Text | None = None
    pretrained: Text | None = None
    adapters: Annotated[
        Adapters, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ] = ()
    aliases: Annotated[tuple[str, ...], BeforeValidator(lambda value: aliases_of({"aliases": value}))] = ()
    prompts: Annotated[Mapping[str, str], AfterValidator(_prompt_names)] = Field(default_factory=dict)
    max_batch_tokens: int | None = Field(None, ge=1)
    max_image_tokens: int | None = Field(None, ge=4)
    truncate: Literal["none", "end", "start"] | None = None
    allow_unverified: bool | None = None
    pinned: bool = False
    # Of vectors. What gives others is not served; it is needed before the first use of a model only for fallbacks.
    dimensions: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    fallback: Annotated[tuple[Text, ...], BeforeValidator(lambda value: listed(value))] = ()
    fallback_other_dimensions: bool = False
    fallback_when_full: bool = False
    # `math.inf` is never, which is something else than None.
    keep_alive: Annotated[float | None, BeforeValidator(parse_duration)] = None


def aliases_of(entry: Mapping[str, Any]) -> Any:
    return listed(entry.get("aliases"))


def listed(value: Any) -> Any:
    """A list, or one that is written without a list around it."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def name_problems(models: Any) -> Iterator[tuple[Location, str]]:
    """Names that cannot be, and names that lead to two models or round in a circle: where, and what is wrong.

    `models` is what the file has: it may be anything at all.
    """
    if not isinstance(models, Mapping):
        return
    taken: dict[str, str] = {}  # alias -> model
    for name, entry in models.items():
        if not _is_name(name):
            yield ("models", name), f"the name that requests call the model by {_NAME_RULE}"
        aliases = aliases_of(entry) if isinstance(entry, Mapping) else None
        for place, alias in enumerate(aliases if isinstance(aliases, tuple) else ()):
            if not isinstance(alias, str):
                continue  # told by its type
            where: Location = ("models", name, "aliases")
            if isinstance(entry["aliases"], list):
                where = (*where, place)
            if problem := _alias_problem(alias, name, models, taken):
                yield where, problem
            taken.setdefault(alias, name)


def _alias_problem(alias: str, name: str, models: Mapping[str, Any], taken: Mapping[str, str]) -> str | None:
    if not _is_name(alias):
        return f"an alias {_NAME_RULE}"
    if alias == name:
        return f"{alias!r} is the model's own name: an alias is another one"
    if alias in models:
        return f"{alias!r} is the name of another model: requests for it would not know which to take"
    if alias in taken:
        return f"{alias!r} is an alias of {taken[alias]!r} already"
    return None


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None
