"""One frozen Settings: flags over environment over the YAML file over defaults."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

ENVIRONMENT_PREFIX = "MLX_EMBEDDINGS_"

DimensionsPolicy = Literal["reduce", "pad", "ignore"]
# From a flag a list comes as it is; from the environment or YAML it may be one string, with commas between the names.
Names = Annotated[tuple[str, ...], NoDecode]


class SettingsError(Exception):
    """A setting is wrong. The message names the flag, the variable and the YAML key."""


class Settings(BaseSettings):
    """Every field is a flag, an environment variable and a YAML key."""

    # An empty variable is how container images and compose files say that it is not set.
    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    model: Names = Field((), description="Hugging Face id or local folder of a model to serve; may be repeated")
    pretrained: str | None = Field(
        None,
        description="open_clip's name of the weights, where --model is its name of an architecture "
        "(--model ViT-B-32 --pretrained laion2b_s34b_b79k)",
    )
    adapter: Names = Field(
        (),
        description="NAME=ID_OR_PATH of an AdapterHub adapter of the model, as SPECTER2 has them; may be repeated: a "
        "request's `adapter` chooses one, the first is the default, and queries take that named adhoc_query",
    )
    served_model_name: Names = Field((), description="name that requests call the model by, one for each --model")
    config: str | None = Field(None, description="YAML file with the same settings, one key a flag (`max-batch-tokens` "
                               "is `max_batch_tokens`)")  # fmt: skip
    backend: Literal["auto", "mlx", "torch"] = Field("auto", description="what runs the model")
    device: str = Field(
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
    api_key: SecretStr | None = Field(
        None, description="key that requests must send as `Authorization: Bearer` or `X-API-Key`; prefer the variable, "
        "other users of the machine can read flags"
    )  # fmt: skip
    log_format: Literal["text", "json"] = Field("text", description="of the log, on stderr")
    access_log: bool = Field(False, description="log every request")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that requests in flight have to finish after SIGTERM")

    @field_validator("model", "served_model_name", "adapter", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        return value

    @field_validator("adapter", mode="before")
    @classmethod
    def _join_mapping(cls, value: Any) -> Any:
        """YAML's way to write names with values."""
        return [f"{name}={place}" for name, place in value.items()] if isinstance(value, dict) else value

    @field_validator("adapter")
    @classmethod
    def _check_adapters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [name for name, _, place in (each.partition("=") for each in value) if name and place]
        if len(names) < len(value):
            raise ValueError("must be NAME=ID_OR_PATH, such as adhoc_query=allenai/specter2_adhoc_query")
        if len(set(names)) < len(names):
            raise ValueError("gives two adapters the same name")
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        kind, colon, number = value.partition(":")
        if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
            raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Flags that were given, then the environment, then the YAML file. Raises `SettingsError`."""
    flags = dict(flags or {})
    config = flags.get("config") or os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    if config:
        _check_file(config)

    class FromFile(Settings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        return FromFile(**flags)
    except ValidationError as error:
        raise SettingsError(
            "\n".join(_explain(each["loc"], each["msg"], each["type"]) for each in error.errors())
        ) from error


def _check_file(config: str) -> None:
    """A mapping of names: pydantic-settings itself shows a traceback for anything else."""
    try:
        content = yaml.safe_load(Path(config).read_text())
    except FileNotFoundError:
        raise SettingsError(f"{_names('config')}: there is no file {config}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{_names('config')}: {config} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{_names('config')}: {config} is not YAML: {error}") from error
    if content is not None and not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise SettingsError(f"{_names('config')}: {config} must hold settings, one `key: value` a line")


def _explain(location: tuple[int | str, ...], message: str, kind: str) -> str:
    name = str(location[0]) if location else "config"
    if kind == "extra_forbidden":
        return f"{name}: there is no such setting; known: {', '.join(Settings.model_fields)}"
    return f"{_names(name)}: {message.removeprefix('Value error, ')}"


def _names(field: str) -> str:
    return f"--{field.replace('_', '-')} (variable {ENVIRONMENT_PREFIX}{field.upper()}, YAML key {field})"
