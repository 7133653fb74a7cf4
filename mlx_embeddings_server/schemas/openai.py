"""OpenAI's embeddings request, with this server's optional extensions (`extra_body` in the official client)."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from mlx_embeddings_server.codec import EncodingFormat, OutputDType
from mlx_embeddings_server.pooling import Pool

_ITEM_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "image": {"type": "string", "description": "http(s) URL, data URI or base64"},
        "title": {"type": "string", "description": "a paper's, with its abstract"},
        "abstract": {"type": "string"},
    },
}
_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}}
_INPUT_SCHEMA = {
    "description": "A text, token ids, an item, or a list of them; none empty. A string that is an http(s) URL or a "
    "data URI of an image is an image where the model takes images.",
    "anyOf": [
        {"type": "string"},
        _TOKEN_IDS_SCHEMA,
        _ITEM_SCHEMA,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKEN_IDS_SCHEMA, _ITEM_SCHEMA]}},
    ],
    "examples": ["The weather is lovely today."],
}


class EmbeddingsRequest(BaseModel):
    """Unknown fields are ignored: clients send extras."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, description="A served id or alias. May be left out where there is a default model.")
    # Checked by inputs.parse, whose messages name the item: a union's errors would name every branch.
    input: Annotated[Any, Field(json_schema_extra=_INPUT_SCHEMA)]
    encoding_format: EncodingFormat | None = Field(None, description="float if absent.")
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Keep so many leading dimensions; renormalised where the model normalises."
    )
    user: Any = Field(None, description="Accepted, not used.")
    input_type: Literal["query", "document"] | None = Field(None, description="Picks the model's prompt.")
    # The length is bounded because the prompt is put before each of up to 2048 texts.
    prompt: Annotated[str, Field(max_length=8192)] | None = Field(
        None, description="Put before each text. Exclusive with input_type and prompt_name."
    )
    prompt_name: str | None = Field(None, description="One of the checkpoint's prompts.")
    adapter: str | None = Field(
        None, description="One of the model's adapters, as SPECTER2 has them. Default: by input_type, else the first."
    )
    truncate: StrictBool | Literal["none", "end", "start"] | None = Field(
        None,
        description="What to do with inputs that are too long: refuse (none, false), cut (end, true), cut (start).",
    )
    normalize: StrictBool | None = Field(None, description="L2-normalise; default: what the checkpoint does.")
    output_dtype: OutputDType | None = Field(None, description="float if absent.")
    token_pool_factor: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Multi-vector models: so many times fewer vectors, the means of clusters."
    )
    pool: Pool | None = Field(
        None,
        description="Multi-vector models: the means of an image's patches, one a row, one a column, or one of all.",
    )
    outputs: Annotated[list[Literal["dense", "sparse", "multi_vector"]], Field(min_length=1)] | None = Field(
        None,
        description="Several kinds of vector of one forward pass, where the model has them (BGE-M3): `embedding`, "
        "`sparse_embedding` and `multi_vector` in each item of the reply.",
    )
    include: list[Literal["patches"]] | None = Field(
        None, description="patches: which of an image's vectors are its patches, as rows, columns and offset."
    )
