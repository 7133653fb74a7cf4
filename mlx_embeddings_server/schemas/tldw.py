"""The tldw server's requests that are not OpenAI's."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt


class BatchRequest(BaseModel):
    """Unknown fields are ignored: clients send extras."""

    model_config = ConfigDict(extra="ignore")

    # Checked by inputs.parse, whose messages name the item.
    texts: Annotated[
        Any, Field(json_schema_extra={"type": "array", "items": {"type": "string"}, "description": "None empty."})
    ]
    model: str | None = Field(None, description="A served id, an alias or PROVIDER:MODEL. Default: the default model.")
    provider: str | None = Field(None, description="Whose model is meant: `local`, or one of the server's file.")
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None,
        description="What becomes of it says the header X-Embeddings-Dimensions-Policy, or the server's own setting.",
    )


class ModelRequest(BaseModel):
    """One model, for what an admin does with it."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, description="A served id, an alias or PROVIDER:MODEL. Default: the default model.")
    provider: str | None = Field(None, description="Whose model is meant: `local`, or one of the server's file.")
