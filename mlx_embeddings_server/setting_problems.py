"""What is wrong with settings, in words that say what to write, and where."""

import difflib
from collections.abc import Iterable, Sequence, Set

from pydantic_core import ErrorDetails

from mlx_embeddings_server.model_entry import ModelEntry
from mlx_embeddings_server.provider_entry import ProviderEntry
from mlx_embeddings_server.yaml_file import Location, Problem, YamlFile, dotted

ENVIRONMENT_PREFIX = "MLX_EMBEDDINGS_"
# Variables of another name that stand for a setting, after its own: those that the tldw server reads.
FURTHER_VARIABLES = {
    "EMBEDDINGS_RATE_LIMIT": "rate_limit",
    "EMBEDDINGS_DIMENSION_POLICY": "dimensions_policy",
    "EMBEDDINGS_REEMBED_WORKER_ENABLED": "reembed_worker",
}
# They have neither a flag nor a variable.
FILE_ONLY = frozenset({"models", "providers"})
MAX_PROBLEMS = 100

# Of pydantic's messages, those that name Python's types.
_IN_ENTRIES = {
    "missing": "is missing: the hub id of the model, or the path of its folder",
    "model_type": "must hold the model's settings, `name: ID_OR_PATH` at least",
    "dict_type": "must be a mapping, one `name: value` a line",
    "string_type": "must be text: put it in quotes",
    "tuple_type": "must be a list",
}
_ENTRIES: dict[str, type[ModelEntry] | type[ProviderEntry]] = {"models": ModelEntry, "providers": ProviderEntry}
# What people write who put a provider's key itself into the file.
_SECRETS = frozenset(("api_key", "key", "token", "secret", "password"))


def explain(error: ErrorDetails, file: YamlFile, *, in_file: Set[str], known: Iterable[str]) -> Problem:
    """`in_file`: the settings that the file decides. `known`: all that there are."""
    location, message = error["loc"], _worded(error, known)
    name = str(location[0]) if location else "config"
    if error["type"] == "extra_forbidden" or name in FILE_ONLY:
        return at(file, location, message)
    return Problem(file.line((name,)) if name in in_file else None, f"{names(name)}: {message}")


def at(file: YamlFile, location: Location, message: str) -> Problem:
    return Problem(file.line(location), f"{dotted(location)}: {message}")


def _worded(error: ErrorDetails, known: Iterable[str]) -> str:
    """pydantic's message where it says what to do."""
    location, kind = error["loc"], error["type"]
    entry = _ENTRIES.get(str(location[0])) if location else None
    if kind == "extra_forbidden":
        if entry is ProviderEntry and str(location[-1]).replace("-", "_") in _SECRETS:
            return "a key does not belong in this file: name the variable that has it in `api_key_env`, or a file"
        known = list(known if entry is None else entry.model_fields)
        near = difflib.get_close_matches(str(location[-1]).replace("-", "_"), known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"there is no such setting{meant}; known: {', '.join(known)}"
    if entry is ProviderEntry and kind == "model_type":
        return "must hold the provider's settings, such as `url: URL`; or {} where it needs none"
    if entry is not None and (said := _IN_ENTRIES.get(kind)):
        return said
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)


def told(path: str, problems: Sequence[Problem]) -> str:
    """One a line, in the order of the file."""
    lines = [
        each.message if each.line is None else f"{path}, line {each.line}: {each.message}"
        for each in sorted(problems, key=lambda each: each.line or 0)
    ]
    return "\n".join(lines if len(lines) <= MAX_PROBLEMS else [*lines[:MAX_PROBLEMS], "and more"])


def names(field: str) -> str:
    """All that a setting is called."""
    variables = [
        f"{ENVIRONMENT_PREFIX}{field.upper()}",
        *(name for name, of in FURTHER_VARIABLES.items() if of == field),
    ]
    return f"--{field.replace('_', '-')} (variable {' or '.join(variables)}, YAML key {field})"
