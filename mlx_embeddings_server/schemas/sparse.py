"""Sparse vectors: the request."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt


class SparseRequest(BaseModel):
    """Unknown fields are ignored: clients send extras."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, description="A served id or alias. May be left out where there is a default model.")
    # Checked by inputs.parse, whose messages name the item.
    input: Annotated[
        Any, Field(json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    ]
    max_active_dims: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Keep so many of the largest values, in place of the checkpoint's own number."
    )
    tokens: StrictBool | None = Field(None, description="Put the vocabulary's tokens beside the indices.")
    input_type: Literal["query", "document"] | None = Field(None, description="Picks the model's prompt, or its part.")
    prompt: Annotated[str, Field(max_length=8192)] | None = Field(
        None, description="Put before each text. Exclusive with input_type and prompt_name."
    )
    prompt_name: str | None = Field(None, description="One of the checkpoint's prompts.")
    truncate: StrictBool | Literal["none", "end", "start"] | None = Field(
        None,
        description="What to do with inputs that are too long: refuse (none, false), cut (end, true), cut (start).",
    )
