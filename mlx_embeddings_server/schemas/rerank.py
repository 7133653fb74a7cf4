"""Reranking: the fields of Cohere's, Jina's and the unified API's requests, and those of TEI's."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from mlx_embeddings_server.schemas.spellings import respelled

_ONE: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}]}


class RerankRequest(BaseModel):
    """`documents`, or TEI's `texts`, which have TEI's reply. Unknown fields are ignored: clients send extras."""

    model_config = ConfigDict(extra="ignore")

    spellings: ClassVar[dict[str, str]] = {"model_id": "model", "top_k": "top_n"}

    model: str | None = Field(
        None,
        description="A served id or alias. Default: the first that is known to be a reranker.",
    )
    # Checked by inputs.parse, whose messages name the item.
    query: Annotated[Any, Field(json_schema_extra=_ONE)]
    documents: Any = Field(
        None,
        description='Strings, `{"text"}` or `{"image"}`.',
        json_schema_extra={"type": "array", "items": _ONE},
    )
    texts: Any = Field(None, description="TEI: a list of strings.", json_schema_extra={"type": "array"})
    top_n: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None,
        description="So many of the best (`top_k` means the same). Default: all.",
    )
    return_documents: StrictBool | None = Field(None, description="Put each document beside its score.")
    return_text: StrictBool | None = Field(None, description="TEI: put each text beside its score.")
    raw_scores: StrictBool | None = Field(None, description="A reranker's scores before its activation (a sigmoid).")
    truncate: StrictBool | Literal["none", "end", "start"] | None = Field(
        None, description="What to do with documents that are too long: refuse (none, false), cut (end, true; start)."
    )
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(
        None, description="TEI: the side that is cut. Default: right."
    )

    @model_validator(mode="before")
    @classmethod
    def _respell(cls, values: Any) -> Any:
        return respelled(values, cls.spellings)
