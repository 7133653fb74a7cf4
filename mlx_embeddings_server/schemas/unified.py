"""The unified API's requests: the other routes' fields, `texts` and `model_id`, and sentence-transformers' options."""

from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from mlx_embeddings_server.errors import InvalidRequest, quoted
from mlx_embeddings_server.schemas.openai import EmbeddingsRequest
from mlx_embeddings_server.schemas.rerank import RerankRequest
from mlx_embeddings_server.schemas.sparse import SparseRequest
from mlx_embeddings_server.schemas.spellings import respelled

_SPELLINGS = {"model_id": "model", "texts": "input"}


class Options(BaseModel):
    """What sentence-transformers' `encode` and `predict` call these."""

    model_config = ConfigDict(extra="forbid")

    batch_size: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Accepted: batches are formed of all requests that wait."
    )
    normalize_embeddings: StrictBool | None = None
    truncate_dim: Annotated[StrictInt, Field(ge=1)] | None = None
    max_active_dims: Annotated[StrictInt, Field(ge=1)] | None = None
    prompt: Annotated[str, Field(max_length=8192)] | None = None
    prompt_name: str | None = None


class _Request(Protocol):
    option_fields: ClassVar[dict[str, str]]
    options: Options | None


class UnifiedEmbeddingsRequest(EmbeddingsRequest):
    """As /v1/embeddings, with `options`."""

    option_fields: ClassVar[dict[str, str]] = {
        "normalize_embeddings": "normalize",
        "truncate_dim": "dimensions",
        "prompt": "prompt",
        "prompt_name": "prompt_name",
    }

    model: str | None = Field(None, description="`model_id` means the same.")
    input: Any = Field(description="`texts` means the same.")
    texts: Any = None
    options: Options | None = None

    @model_validator(mode="before")
    @classmethod
    def _respell(cls, values: Any) -> Any:
        return respelled(values, _SPELLINGS)


class UnifiedSparseRequest(SparseRequest):
    """As /v1/embed_sparse, with `options`."""

    option_fields: ClassVar[dict[str, str]] = {
        "max_active_dims": "max_active_dims",
        "prompt": "prompt",
        "prompt_name": "prompt_name",
    }

    model: str | None = Field(None, description="`model_id` means the same.")
    input: Any = Field(description="`texts` means the same.")
    options: Options | None = None

    @model_validator(mode="before")
    @classmethod
    def _respell(cls, values: Any) -> Any:
        return respelled(values, _SPELLINGS)


class UnifiedRerankRequest(RerankRequest):
    """As /v1/rerank, with `options`."""

    option_fields: ClassVar[dict[str, str]] = {}

    options: Options | None = None


Request = TypeVar("Request", bound=_Request)


def with_options(body: Request) -> Request:
    """The request with its options in the fields that mean the same.

    An option that this route has no use for is refused: it would be taken to have done something.
    """
    given = {} if body.options is None else body.options.model_dump(exclude_none=True, exclude={"batch_size"})
    for name, value in given.items():
        if name not in body.option_fields:
            known = ", ".join(["batch_size", *body.option_fields])
            raise InvalidRequest(
                f"options.{quoted(name)} means nothing here; known: {known}", param="options", code="invalid_value"
            )
        field = body.option_fields[name]
        if getattr(body, field) is not None:
            raise InvalidRequest(f"options.{name} and {field} exclude each other: send one of them", param="options")
        setattr(body, field, value)
    return body
