"""POST /embed: the OpenCLIP service's request, and that of Hugging Face's Text Embeddings Inference (TEI)."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool


class EmbedRequest(BaseModel):
    """One of `texts`, `images` and `inputs`. Unknown fields are ignored, as both services do."""

    model_config = ConfigDict(extra="ignore")

    # Checked by inputs.parse, whose messages name the item.
    texts: Any = Field(None, description="OpenCLIP service: a list of strings.", json_schema_extra={"type": "array"})
    images: Any = Field(
        None,
        description="OpenCLIP service: a list of URLs, data URIs or base64.",
        json_schema_extra={"type": "array"},
    )
    inputs: Any = Field(
        None,
        description="TEI: a string or a list of them. The reply is then the bare array of vectors.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array"}]},
    )
    normalize: StrictBool | None = Field(None, description="L2-normalise. Default: true.")
    truncate: StrictBool | Literal["none", "end", "start"] | None = Field(
        None, description="Cut what is too long, or refuse it; /v1/embeddings' words are taken too. Default: true."
    )
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(
        None, description="TEI: the side that is cut. Default: right."
    )
    prompt_name: str | None = Field(None, description="TEI: one of the checkpoint's prompts.")
    input_type: Literal["query", "document"] | None = Field(None, description="Picks the model's prompt.")
    dimensions: int | None = Field(None, ge=1, description="TEI: keep so many leading dimensions.")
    model: str | None = Field(None, description="A served id or alias. Default: the first that is served.")
