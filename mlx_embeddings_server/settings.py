"""One frozen Settings: flags over environment over the YAML file over defaults."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mlx_embeddings_server import yaml_file
from mlx_embeddings_server.model_entry import ModelEntry, name_problems
from mlx_embeddings_server.provider_entry import ProviderEntry, provider_problems
from mlx_embeddings_server.setting_problems import (
    ENVIRONMENT_PREFIX,
    FILE_ONLY,
    FURTHER_VARIABLES,
    MAX_PROBLEMS,
    at,
    explain,
    names,
    told,
)
from mlx_embeddings_server.setting_types import (
    Adapters,
    CacheUrl,
    Device,
    Duration,
    JwtSecret,
    Key,
    KeySetPlace,
    Lifetime,
    Names,
    Origins,
    RedisUrl,
    Size,
)
from mlx_embeddings_server.yaml_file import Problem, YamlFile

DimensionsPolicy = Literal["reduce", "pad", "ignore"]
# Keys that begin so are the file's own, for anchors to stand at.
_IGNORED = "x-"


class SettingsError(Exception):
    """A setting is wrong. The message names the flag, the variable and the YAML key."""


class Settings(BaseSettings):
    """Every field is a flag, an environment variable and a YAML key, but for those of `FILE_ONLY`."""

    # An empty variable is how container images and compose files say that it is not set.
    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    model: Names = Field((), description="Hugging Face id or local folder of a model to serve; may be repeated")
    pretrained: str | None = Field(
        None,
        description="open_clip's name of the weights, where --model is its name of an architecture "
        "(--model ViT-B-32 --pretrained laion2b_s34b_b79k)",
    )
    adapter: Adapters = Field(
        (),
        description="NAME=ID_OR_PATH of an AdapterHub adapter of the model, as SPECTER2 has them; may be repeated: a "
        "request's `adapter` chooses one, the first is the default, and queries take that named adhoc_query",
    )
    served_model_name: Names = Field((), description="name that requests call the model by, one for each --model")
    models: Annotated[Mapping[str, ModelEntry], NoDecode] = Field(
        default_factory=dict, description="models by the name that requests call them by"
    )
    providers: Annotated[Mapping[str, ProviderEntry], NoDecode] = Field(
        default_factory=dict, description="other servers' APIs that models may be at, by name"
    )
    default_model: str | None = Field(
        None,
        min_length=1,
        description="what requests without `model` mean: a name, an alias or PROVIDER:MODEL; names that are not "
        "served are then looked for at its provider, too. Default: only /embed can do without, and takes the first",
    )
    allowed_models: Names = Field(
        (),
        description="model that may be used: a name, an alias or PROVIDER:MODEL, in which * stands for anything; may "
        "be repeated. What else is served is refused with 403. Default: all",
    )
    allowed_providers: Names = Field(
        (),
        description="provider whose models may be used, `local` for those that run here; may be repeated. Default: all",
    )
    config: str | None = Field(
        None,
        description="YAML file with the same settings, one key a flag (`max-batch-tokens` is `max_batch_tokens`), and "
        "with `models`: several, each with settings of its own",
    )
    backend: Literal["auto", "mlx", "torch"] = Field("auto", description="what runs the model")
    device: Device = Field(
        "auto", description="auto, cpu, cuda, cuda:N or mps; auto is the first of cuda, mps, cpu that is here"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="torch: of the matrix products, all else is float32. auto is bfloat16 where the device multiplies "
        "it natively (cosine >= 0.9999 to float32 for text models, up to three times as fast), float16 on other GPUs "
        "(not for ColQwen2.5, which overflows it), else float32. mlx: of the weights; auto is what they are stored in",
    )
    allow_unverified: bool = Field(
        False, description="serve architectures whose vectors no test compares with the reference implementation's"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the model on the hub")
    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 opens the server to the network: set --api-key"
    )
    port: int = Field(8888, ge=0, le=65535, description="port to listen on; 0 takes a free one, which is printed")
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="padded tokens of one batch: more fills a GPU better, fewer make a short query wait less. "
        "Default: 16384 on a GPU, 2048 on a CPU, where larger batches run slower",
    )
    keep_alive: Duration = Field(
        None,
        description="time without a request after which a model that is not pinned is unloaded: seconds, or such as "
        "30s, 5m or 1h. Default: never",
    )
    max_memory: Size = Field(
        None,
        description="memory of all loaded models' weights together, such as 16GB, 800MB or 12GiB; the least recently "
        "used model that is not pinned is unloaded to make room. Default: no limit",
    )
    max_queue_tokens: int = Field(
        1_048_576, ge=1, description="tokens that may wait; beyond it requests are refused with 429 and Retry-After"
    )
    max_request_inputs: int = Field(2048, ge=1, description="inputs of one request (OpenAI's limit is 2048)")
    max_request_bytes: int = Field(
        32 * 1024 * 1024, ge=1, description="size of a request's body, and of all images fetched for it together"
    )
    max_image_tokens: int | None = Field(
        None,
        ge=4,
        description="scale images down to so many tokens (of 28 x 28 pixels in ColQwen2.5): fewer are faster and show "
        "less detail. Default: the checkpoint's own limit",
    )
    allow_private_image_urls: bool = Field(
        False,
        description="fetch images from loopback, private and link-local addresses too: whoever may send requests can "
        "then reach what this machine reaches",
    )
    truncate: Literal["none", "end", "start"] = Field(
        "none",
        description="inputs that are too long: none refuses them, end and start cut there; a request may say otherwise",
    )
    token_encoding: str = Field(
        "native",
        description="what token ids in requests are: native, the model's own; or a tiktoken encoding such as "
        "cl100k_base (LangChain sends it), decoded and embedded as text",
    )
    dimensions_policy: DimensionsPolicy = Field(
        "reduce",
        description="a request's `dimensions`: reduce slices, pad also fills up with zeros, ignore returns all",
    )
    api_key: Key | None = Field(
        None,
        description="key that requests must send as `Authorization: Bearer` or `X-API-Key`; prefer the variable "
        "or the file, other users of the machine can read flags",
    )
    api_key_file: str | None = Field(None, description="file that holds that key")
    jwt_secret: JwtSecret | None = Field(
        None,
        description="for several users: requests must send a JSON Web Token as `Authorization: Bearer`, signed "
        "by HS256 with this secret of 32 bytes or more; prefer the variable or the file",
    )
    jwt_secret_file: str | None = Field(None, description="file that holds that secret")
    jwt_jwks: KeySetPlace | None = Field(
        None, description="file or https URL of the JSON Web Key Set whose RS256 or ES256 keys sign the tokens"
    )
    jwt_audience: str | None = Field(
        None, min_length=1, description="what `aud` of a token must name. Default: it is not looked at"
    )
    jwt_issuer: str | None = Field(
        None, min_length=1, description="what `iss` of a token must be. Default: it is not looked at"
    )
    jwt_admin_claim: str = Field(
        "admin",
        min_length=1,
        description="claim of a token that makes its user an admin: NAME, which must be true, or NAME=VALUE, such as "
        "role=admin, where the claim is that text, or a list or words with it among them",
    )
    open_metrics: bool = Field(
        False, description="/metrics without a key, where others need one; else it is an admin's"
    )
    cors_origin: Origins = Field(
        (),
        description="origin whose pages may call this server from a browser, such as https://app.example.com, or * "
        "for all; may be repeated",
    )
    rate_limit: bool = Field(
        False,
        description="limit each caller's requests and tokens a minute: to 600 and 1000000, unless the next two "
        "settings say otherwise, each of which by itself turns on that limit alone",
    )
    rate_limit_requests: int | None = Field(None, ge=0, description="requests a minute of one caller; 0 is no limit")
    rate_limit_tokens: int | None = Field(None, ge=0, description="tokens a minute of one caller; 0 is no limit")
    rate_limit_storage: RedisUrl | None = Field(
        None, description="redis://HOST:PORT where several servers count together. Default: each counts by itself"
    )
    cache: bool = Field(False, description="keep vectors, and answer inputs that were computed before from there")
    cache_entries: int = Field(5000, ge=1, description="inputs whose vectors are kept in memory")
    cache_bytes: Size = Field(
        ByteSize(512_000_000), description="memory that they may take, such as 512MB: the least recently used go first"
    )
    cache_ttl: Lifetime = Field(
        3600.0, description="time that they are kept: seconds, or such as 30m or 24h, or never, which is without an end"
    )
    cache_url: CacheUrl | None = Field(
        None,
        description="second layer, behind the memory, that servers share or that outlives them: redis://HOST:PORT/DB, "
        "or file:///PATH of a folder. Default: none",
    )
    cache_disk_bytes: Size = Field(ByteSize(10_000_000_000), description="size of that folder")
    collections: str | None = Field(
        None,
        min_length=1,
        description="store of documents with their vectors: chroma or qdrant, inside the server (an extra of that "
        "name), or the URL of one, http://HOST:8000 (Chroma) or qdrant+http://HOST:6333. Default: there are none",
    )
    collections_path: str | None = Field(
        None,
        min_length=1,
        description="folder for what of it is kept on this machine: of a store by URL which collection is which, of "
        "others all. Default: mlx-embeddings-server/collections where the user's programs keep their data",
    )
    collections_api_key: Key | None = Field(
        None, description="key of a store by URL; prefer the variable, other users of the machine can read flags"
    )
    collections_timeout: float = Field(30.0, gt=0, le=3600, description="seconds for each reply of a store by URL")
    reembed_worker: bool = Field(
        False, description="do the jobs that embed collections anew here; else `mlx-embeddings-server worker` does them"
    )
    reembed_retries: int = Field(
        10, ge=0, le=100, description="times in a row that a job is tried again when its model or the store is away"
    )
    jobs_url: RedisUrl | None = Field(
        None, description="redis://HOST:PORT/DB for the queue of these jobs. Default: a file beside the collections"
    )
    log_format: Literal["text", "json"] = Field("text", description="of the log, on stderr")
    access_log: bool = Field(False, description="log every request")
    otel: bool = Field(
        False,
        description="send traces by OpenTelemetry (the extra otel), to http://localhost:4318 or where "
        "OTEL_EXPORTER_OTLP_ENDPOINT says; the standard's other variables hold, too",
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds that requests in flight have to finish after SIGTERM")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Else `port: yes` would be port 1."""
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("must not be true or false (nor yes, no, on or off, which YAML reads as those)")
        return value

    @property
    def names_a_model(self) -> bool:
        """Whether there is any to serve: here, or at a provider."""
        at_providers = any(entry.models or entry.any_model for entry in self.providers.values())
        return bool(self.model or self.models or at_providers)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Flags that were given, then the environment, then the YAML file. Raises `SettingsError`: all that is wrong."""
    flags = dict(flags or {})
    config = flags.get("config") or os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    file = yaml_file.read(config) if config else YamlFile("")
    values = {name: value for name, value in file.values.items() if not name.startswith(_IGNORED)}
    further = {name: os.environ[variable] for variable, name in FURTHER_VARIABLES.items() if os.environ.get(variable)}

    class FromFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            *sources: PydanticBaseSettingsSource,
            **more: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            first = super().settings_customise_sources(settings_cls, *sources, **more)
            return *first, *(InitSettingsSource(settings_cls, init_kwargs=each) for each in (further, values))

    problems = _unread(file, values)
    if not values.get("models", True):
        del values["models"]
    try:
        settings = FromFile(**flags)
    except ValidationError as error:
        given = flags.keys() | {name for name in values if os.environ.get(f"{ENVIRONMENT_PREFIX}{name.upper()}")}
        given |= further.keys()
        # One more than is told, which says that there are more: looking for what was meant takes a millisecond each.
        shown = error.errors(include_url=False)[: MAX_PROBLEMS + 1]
        problems += [explain(each, file, in_file=values.keys() - given, known=Settings.model_fields) for each in shown]
    has_others = any((flags.get("model"), values.get("model"), os.environ.get(f"{ENVIRONMENT_PREFIX}MODEL")))
    problems += [
        at(file, location, message)
        for location, message in (
            *name_problems(values.get("models")),
            *provider_problems(values.get("models"), values.get("providers"), has_others=has_others),
        )
    ]
    if problems:
        raise SettingsError(told(file.path, problems))
    return settings


def _unread(file: YamlFile, values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong before any setting is looked at. Raises `SettingsError`, where the file is not looked at at all."""
    for name in sorted(FILE_ONLY):
        if os.environ.get(variable := f"{ENVIRONMENT_PREFIX}{name.upper()}"):
            instead = f"; ids are in {ENVIRONMENT_PREFIX}MODEL" if name == "models" else ""
            raise SettingsError(f"{variable}: only the file of --config has `{name}`{instead}")
    problems = [
        each if each.line is not None else Problem(None, f"{names('config')}: {each.message}") for each in file.problems
    ]
    if not values.get("models", True):
        problems.append(at(file, ("models",), "names no model: write `NAME: {name: ID_OR_PATH}` below it, or drop it"))
    return problems
