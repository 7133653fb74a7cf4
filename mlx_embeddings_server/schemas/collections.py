"""Requests about collections."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from mlx_embeddings_server.stores.base import Part

Metadata = dict[str, Any]  # checked by the store, whose messages name the key

_WHERE = 'A filter by metadata, such as {"year": {"$gte": 2020}}.'
_MODEL = "The collection's own, if it is to be checked that it is that: another one is refused."
_TRUNCATE = "What to do with inputs that are too long: refuse (none, false), cut (end, true), cut (start)."
_Truncate = StrictBool | Literal["none", "end", "start"] | None
_DOCUMENTS_SCHEMA = {
    "type": "array",
    "items": {
        "anyOf": [
            {"type": "string", "description": "A document of that text."},
            {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "description": "Whose document it replaces. Default: a UUID."},
                    "text": {"type": "string"},
                    "image": {"type": "string", "description": "http(s) URL, data URI or base64"},
                    "metadata": {"type": "object", "description": "Texts, numbers, true and false."},
                },
            },
        ]
    },
}
_QUERY_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"text": {"type": "string"}, "image": {"type": "string"}}},
    ],
    "description": "A text, or an image where the collection's model takes images.",
}


class CreateRequest(BaseModel):
    """A collection, and the model that makes all its vectors."""

    model_config = ConfigDict(extra="ignore")

    name: StrictStr = Field(description="3 to 512 characters of a-z, A-Z, 0-9, '.', '_' and '-'.")
    metadata: Metadata | None = Field(None, description="The caller's own: texts, numbers, true and false.")
    embedding_model: str | None = Field(
        None, description="A served id, an alias or PROVIDER:MODEL. Default: the default model."
    )
    provider: str | None = Field(None, description="Whose model is meant: `local`, or one of the server's file.")


class UpsertRequest(BaseModel):
    """Documents to embed and store."""

    model_config = ConfigDict(extra="ignore")

    # Checked by the route, whose messages name the document.
    documents: Annotated[Any, Field(json_schema_extra=_DOCUMENTS_SCHEMA)]
    model: str | None = Field(None, description=_MODEL)
    truncate: _Truncate = Field(None, description=_TRUNCATE)


class DeleteRequest(BaseModel):
    """Which documents: one of the two."""

    model_config = ConfigDict(extra="ignore")

    ids: list[StrictStr] | None = None
    where: Any = Field(None, description=_WHERE)


class QueryRequest(BaseModel):
    """What to look for, and how many documents like it."""

    model_config = ConfigDict(extra="ignore")

    query: Annotated[Any, Field(json_schema_extra=_QUERY_SCHEMA)]
    n_results: StrictInt = Field(10, description="1 to 1000.")
    where: Any = Field(None, description=_WHERE)
    include: list[Part] | None = Field(None, description="What of each document is in the reply. Default: all.")
    model: str | None = Field(None, description=_MODEL)
    truncate: _Truncate = Field(None, description=_TRUNCATE)
