"""Which models are to be served, and how: what the YAML file and the flags say, checked before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr

from mlx_embeddings_backends.base import Kind, Truncate
from mlx_embeddings_server.model_entry import ModelEntry
from mlx_embeddings_server.provider_entry import KNOWN, LOCAL_NAMES, ProviderEntry, key_of
from mlx_embeddings_server.providers import LOCAL
from mlx_embeddings_server.providers.endpoint import EndpointSettings
from mlx_embeddings_server.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model as the user named it. None: what holds for all models, or what the checkpoint says."""

    name: str | None  # that requests call it by; None: the checkpoint's own
    source: str  # hub id or path; or what its provider calls it
    kind: Kind | None = None
    backend: Literal["auto", "mlx", "torch"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    pretrained: str | None = None
    adapters: tuple[str, ...] = ()  # NAME=ID_OR_PATH
    aliases: tuple[str, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)  # beside the checkpoint's own, or in their place
    max_batch_tokens: int | None = None
    max_image_tokens: int | None = None
    truncate: Truncate = "none"
    allow_unverified: bool = False
    pinned: bool = False  # loaded at the start, and never unloaded to make room
    keep_alive: float | None = None  # seconds without a request after which it is unloaded; None: never
    provider: str = LOCAL
    dimensions: int | None = None  # that its vectors must have; None: whatever they have
    max_tokens: int | None = None  # of a model elsewhere, for those who ask
    fallback: tuple[str, ...] = ()  # names, aliases or PROVIDER:MODEL
    fallback_other_dimensions: bool = False
    fallback_when_full: bool = False

    @property
    def is_remote(self) -> bool:
        return self.provider != LOCAL


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """Another server, and which of its models may be asked for by PROVIDER:MODEL beside those of `models:`."""

    endpoint: EndpointSettings
    models: tuple[str, ...] = ()
    any_model: bool = False


def provider_specs(settings: Settings, *, with_keys: bool = True) -> dict[str, ProviderSpec]:
    """Raises `SettingsError`, where a key is not to be had."""
    folder = Path(settings.config or "").absolute().parent
    return {
        name: _provider(name, entry, _key(name, entry, folder) if with_keys else None)
        for name, entry in provider_entries(settings).items()
    }


def provider_entries(settings: Settings) -> dict[str, ProviderEntry]:
    """The file's, and known ones that a model names."""
    named = [each for entry in settings.models.values() for each in (entry.provider, *_providers_of(entry.fallback))]
    return {name: ProviderEntry.model_validate({}) for name in named if name in KNOWN} | dict(settings.providers)


def _providers_of(references: tuple[str, ...]) -> list[str]:
    return [reference.partition(":")[0] for reference in references if ":" in reference]


def _key(name: str, entry: ProviderEntry, folder: Path) -> SecretStr | None:
    try:
        return key_of(name, entry, folder)
    except ValueError as error:
        raise SettingsError(f"providers.{name}: {error}") from error


def _provider(name: str, entry: ProviderEntry, key: SecretStr | None) -> ProviderSpec:
    endpoint = EndpointSettings(
        name,
        entry.url_of(name),
        key,
        timeout=entry.timeout,
        connect_timeout=entry.connect_timeout,
        batch_size=entry.batch_size,
        max_in_flight=entry.max_in_flight,
        retries=entry.retries,
        failure_threshold=entry.failure_threshold,
        recovery=entry.recovery,
    )
    return ProviderSpec(endpoint, entry.models, entry.any_model)


def model_specs(settings: Settings) -> list[ModelSpec]:
    """Those of --model, pinned, and then the file's. Raises `SettingsError`, where the flags do not fit together."""
    flagged = _flagged(settings)
    taken = {alias for entry in settings.models.values() for alias in entry.aliases} | settings.models.keys()
    for spec in flagged:
        if spec.name in taken:
            raise SettingsError(
                f"two models would be served as {spec.name!r}: a --served-model-name is also a name or an alias of "
                f"{settings.config or 'the file'}"
            )
    # The folder of the path that was typed, also where that is a link: a container's configuration often is.
    folder = Path(settings.config or "").absolute().parent
    return flagged + [_listed(name, entry, settings, folder) for name, entry in settings.models.items()]


def _flagged(settings: Settings) -> list[ModelSpec]:
    names = settings.served_model_name
    if names and len(names) != len(settings.model):
        raise SettingsError(
            f"--served-model-name was given {len(names)} times and --model {len(settings.model)} times: "
            "give one name for each model, in the same order, or none"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingsError(f"two models would be served as {twice!r}: give each another --served-model-name")
    if len(settings.model) > 1 and (settings.adapter or settings.pretrained):
        raise SettingsError("--adapter and --pretrained belong to one model: give one --model with them")
    return [
        ModelSpec(
            names[place] if names else None,
            source,
            backend=settings.backend,
            device=settings.device,
            dtype=settings.dtype,
            revision=settings.revision,
            pretrained=settings.pretrained,
            adapters=settings.adapter,
            max_batch_tokens=settings.max_batch_tokens,
            max_image_tokens=settings.max_image_tokens,
            truncate=settings.truncate,
            allow_unverified=settings.allow_unverified,
            pinned=True,
            keep_alive=settings.keep_alive,
        )
        for place, source in enumerate(settings.model)
    ]


def _listed(name: str, entry: ModelEntry, settings: Settings, folder: Path) -> ModelSpec:
    """What the entry leaves out is the settings'."""
    if entry.provider is not None and entry.provider not in LOCAL_NAMES:
        return ModelSpec(name, entry.name, aliases=entry.aliases, prompts=entry.prompts, **_common(entry))
    keep_alive = settings.keep_alive if entry.keep_alive is None else entry.keep_alive
    named_adapters = (each.partition("=") for each in entry.adapters)
    return ModelSpec(
        name,
        _place(entry.name, folder),
        entry.type,
        backend=entry.backend or settings.backend,
        device=entry.device or settings.device,
        dtype=entry.dtype or settings.dtype,
        revision=entry.revision,
        pretrained=entry.pretrained,
        adapters=tuple(f"{adapter}={_place(place, folder)}" for adapter, _, place in named_adapters),
        aliases=entry.aliases,
        prompts=entry.prompts,
        max_batch_tokens=entry.max_batch_tokens or settings.max_batch_tokens,
        max_image_tokens=entry.max_image_tokens or settings.max_image_tokens,
        truncate=entry.truncate or settings.truncate,
        allow_unverified=settings.allow_unverified if entry.allow_unverified is None else entry.allow_unverified,
        pinned=entry.pinned,
        keep_alive=None if keep_alive == math.inf else keep_alive,
        **_common(entry),
    )


def _common(entry: ModelEntry) -> dict[str, Any]:
    """Of local models and of others."""
    is_local = entry.provider is None or entry.provider in LOCAL_NAMES
    return {
        "provider": LOCAL if is_local else entry.provider,
        "dimensions": entry.dimensions,
        "max_tokens": entry.max_tokens,
        "fallback": entry.fallback,
        "fallback_other_dimensions": entry.fallback_other_dimensions,
        "fallback_when_full": entry.fallback_when_full,
    }


def _place(source: str, folder: Path) -> str:
    """Absolute, where it is a path from the file's folder: one that does not exist must not be taken for a hub id."""
    if source in (".", "..") or source.startswith(("./", "../")):
        return str(folder / source)
    return source
