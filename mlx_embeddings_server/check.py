"""`mlx-embeddings-server check models.yaml`: what the file would serve, without loading it and without the network."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_embeddings_server import yaml_file
from mlx_embeddings_server.settings import Settings, SettingsError, load_settings
from mlx_embeddings_server.yaml_file import Location, dotted

if TYPE_CHECKING:
    from mlx_embeddings_server.provider_entry import ProviderEntry
    from mlx_embeddings_server.registry import ModelSpec


def main(arguments: Sequence[str]) -> None:
    """Print a line for each model; exit with 2 and all that is wrong, if anything is."""
    parser = argparse.ArgumentParser(
        prog="mlx-embeddings-server check",
        description="Check a file for --config: print a line for each model that it serves, or all that is wrong with "
        "it. Loads, downloads and opens nothing: what only that shows, such as dimensions or a port in use, is not "
        "checked, and keys are not wanted here. Exits with 0 where all is right, else with 2.",
    )
    parser.add_argument("file", metavar="FILE", help="YAML file with `models:`, as models.example.yaml")
    path = parser.parse_args(arguments).file
    # huggingface_hub reads it when it is imported, which is later.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        problems = _check(path, load_settings({"config": path}))
    except SettingsError as error:
        problems = [str(error)]
    if problems:
        sys.stdout.flush()  # what was found comes before what is wrong, also where both go to one place
        sys.stderr.write("".join(f"{problem}\n" for problem in problems))
        sys.exit(2)


def _check(path: str, settings: Settings) -> list[str]:
    """Prints the models that are right; what is wrong with the others. Raises `SettingsError`."""
    # Only now: numpy takes longer than all that was needed so far.
    from mlx_embeddings_backends.errors import ModelError
    from mlx_embeddings_server.registry import model_specs, provider_entries

    specs = model_specs(settings)
    if not settings.names_a_model:
        return [f"{path}: names no model: list some under `models:`, each as `NAME: {{name: ID_OR_PATH}}`"]
    for name, entry in provider_entries(settings).items():
        print(f"{name}: {_describe_provider(name, entry, Path(path).absolute().parent)}")
    file = yaml_file.read(path)
    problems, seen = [], set[str]()
    for spec in specs:
        # --model and its names may be the file's or the environment's, too.
        location: Location = ("model",)
        if spec.name is not None and spec.name in settings.models:
            location = ("models", spec.name, "name")
        try:
            name, description = _describe(spec)
            if name in seen:
                raise ModelError(f"two models would be served as {name!r}: give each another name")
        except ModelError as error:
            line = file.line(location)
            where = path if line is None else f"{path}, line {line}"
            problems.append(f"{where}: {dotted(location)}: {error}")
            continue
        seen.add(name)
        print(f"{name}: {description}" + (f"; aliases: {', '.join(spec.aliases)}" if spec.aliases else ""))
    return problems + [f"{path}: {problem}" for problem in _check_rest(settings, checks_models=not problems)]


def _check_rest(settings: Settings, *, checks_models: bool) -> Iterator[str]:
    """What is wrong with other settings than the models' own, as far as it shows without opening anything."""
    from mlx_embeddings_backends.errors import ModelError
    from mlx_embeddings_server.app import token_decoder_of
    from mlx_embeddings_server.auth.access import access_of
    from mlx_embeddings_server.metrics import Metrics
    from mlx_embeddings_server.models import Models
    from mlx_embeddings_server.setting_combinations import check_combinations
    from mlx_embeddings_server.stores.opening import parse_target

    def check_models() -> None:
        if checks_models:
            Models(settings, Metrics(), only_checks=True)

    def check_collections() -> None:
        if settings.collections is not None:
            parse_target(settings.collections)

    def check_access() -> None:
        check_combinations(settings)
        try:
            access_of(settings)
        except SettingsError as error:
            print(f"access: without its key here: {error}")  # it may be where the server will run

    for check in (check_models, check_collections, check_access, lambda: token_decoder_of(settings)):
        try:
            check()
        except (SettingsError, ModelError) as error:
            yield str(error)


def _describe_provider(name: str, entry: "ProviderEntry", folder: Path) -> str:
    """A key that is not here may be where the server will run: that is told, and no error."""
    from mlx_embeddings_server.provider_entry import key_of

    try:
        key = "with a key" if key_of(name, entry, folder) else "without a key"
    except ValueError as error:
        key = f"without its key here: {error}"
    also = "any model of it" if entry.any_model else ", ".join(f"{name}:{model}" for model in entry.models)
    return f"provider at {entry.url_of(name)}" + (f", which also serves {also}" if also else "") + f", {key}"


def _describe(spec: "ModelSpec") -> tuple[str, str]:
    """The name that it would be served by, and what it is. Raises `ModelError`."""
    from mlx_embeddings_backends import hub
    from mlx_embeddings_server.found import Found

    if spec.is_remote:
        size = "of the size that it gives" if spec.dimensions is None else f"of {spec.dimensions} dimensions"
        assert spec.name is not None
        return spec.name, f"{spec.source} at the provider {spec.provider}, vectors {size}"
    name = spec.name or hub.ALIASES.get(spec.source, spec.source)
    if spec.pretrained is not None:  # which only open_clip knows, and that takes torch
        return name, f"open_clip's {spec.source} with the weights {spec.pretrained}, looked up when it is loaded"
    try:
        found = Found.of(spec)
    except hub.HubUnreachable:
        return name, f"{spec.source}, not downloaded yet"
    snapshot, choice = found.checkpoint.snapshot, found.choice
    place = {"local": str(snapshot.path), "packaged": f"{snapshot.name} of an installed package"}.get(
        snapshot.source, f"{snapshot.name}, revision {snapshot.revision}"
    )
    reason = choice.reason if choice.verified else f"{choice.reason}, not verified"
    adapters = f", adapters {' and '.join(found.checkpoint.adapters)}" if found.checkpoint.adapters else ""
    return spec.name or snapshot.name, f"{choice.architecture} on {choice.backend} ({reason}), {place}{adapters}"
