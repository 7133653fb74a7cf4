"""The tldw server's request for a re-embedding, and ours by collection."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from mlx_embeddings_backends.base import Truncate

_Name = Annotated[StrictStr, Field(min_length=1, max_length=255)]


class ReembedRequest(BaseModel):
    """Unknown fields are ignored: clients send extras."""

    model_config = ConfigDict(extra="ignore")

    media_id: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="The user's collections with documents that have this `media_id` in their metadata."
    )
    collection: Annotated[StrictStr, Field(min_length=1)] | None = Field(
        None, description="Or one collection, by its name."
    )
    user_id: _Name | StrictInt | None = Field(
        None, description="Whose collections. Default: the caller's; where there are no users it means nothing."
    )
    embedder_name: _Name | None = Field(None, description="The new model's provider: `local`, or one of the file.")
    embedder_version: Annotated[StrictStr, Field(min_length=1)] | None = Field(
        None, description="The new model: a served id, an alias or PROVIDER:MODEL. Default: the default model."
    )
    priority: Annotated[StrictInt, Field(ge=0, le=1000)] = Field(50, description="The smallest number is done first.")
    idempotency_key: _Name | None = Field(None, description="The job that was made with it is answered, not another.")
    dedupe_key: _Name | None = Field(None, description="The same while that job is queued or running.")
    operation_id: _Name | None = Field(None, description="Kept with the job.")
    truncate: StrictBool | Truncate | None = Field(
        None, description="Documents that are too long: none refuses them, end (true) and start cut there."
    )
    user_tier: _Name | None = Field(None, description="Kept with the job.")
