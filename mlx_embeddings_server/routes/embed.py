"""POST /embed, as the OpenCLIP service and Hugging Face's Text Embeddings Inference (TEI) have it."""

from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_embeddings_backends.base import ModelInfo
from mlx_embeddings_server.codec import encode_inputs, vector_list
from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.inputs.parse import Content, parse_input
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.options import EmbedOptions
from mlx_embeddings_server.routes.choice import asked_model, dimensions_policy_of, on_model
from mlx_embeddings_server.routes.replies import embedding_headers, joined
from mlx_embeddings_server.routes.requests import (
    KeyedRoute,
    json_body_of,
    read_json,
    runtime_of,
    truncate_of,
)
from mlx_embeddings_server.schemas.embed import EmbedRequest
from mlx_embeddings_server.service import Embeddings
from mlx_embeddings_server.settings import DimensionsPolicy

router = APIRouter(tags=["OpenCLIP service, TEI"], route_class=KeyedRoute)

_FIELDS = ("texts", "images", "inputs")


@router.post("/", include_in_schema=False)
@router.post(
    "/embed",
    openapi_extra=json_body_of(EmbedRequest),
)
async def embed(request: Request) -> Response:
    """`{"texts"}` or `{"images"}` -> `{"embeddings": [...]}`; `{"inputs"}` -> the bare array of vectors.

    As in both services inputs that are too long are cut; `X-Embeddings-Truncated` has their indexes.
    """
    body = await read_json(request, EmbedRequest)
    runtime = runtime_of(request)
    field = _field(body)
    policy = dimensions_policy_of(request)

    async def work(model: Model) -> Embeddings:
        contents = _contents(field, getattr(body, field), model.info, runtime.settings.max_request_inputs)
        options = _options(body, policy, is_remote=model.spec.is_remote)
        return await runtime.service.embed(model, contents, options, field=field)

    answered = await on_model(
        request, asked_model(request, body.model, or_first=True), work, inputs=getattr(body, field)
    )
    result = answered.result
    before, after = (b"[", b"]") if field == "inputs" else (b'{"embeddings":[', b"]}")
    content = await joined(vector_list(encode_inputs(result.table.rows, result.table.lengths, "float"), before, after))
    headers = embedding_headers(result, policy or runtime.service.dimensions_policy) | answered.headers
    return Response(content, media_type="application/json", headers=headers)


def _field(body: EmbedRequest) -> str:
    given = [name for name in _FIELDS if getattr(body, name) is not None]
    if not given:
        raise InvalidRequest("texts, images or inputs is missing", code="missing_required_parameter")
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} exclude each other: send one of them", param=given[1])
    return given[0]


def _contents(field: str, value: Any, info: ModelInfo, max_inputs: int) -> list[Content]:
    """Raises `InvalidRequest`."""
    if field != "inputs" and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise InvalidRequest(f"{field} must be a list of strings", param=field, code="invalid_type")
    if field == "images":
        value = [{"image": each} for each in value]
    modalities = ("text",) if field == "texts" else info.modalities  # texts, whatever they look like
    return parse_input(value, modalities=modalities, separator=info.separator, max_inputs=max_inputs, field=field)


def _options(body: EmbedRequest, policy: DimensionsPolicy | None, *, is_remote: bool) -> EmbedOptions:
    cuts = not is_remote if body.truncate is None else body.truncate  # elsewhere it is not to be had
    return EmbedOptions(
        input_type=body.input_type,
        prompt_name=body.prompt_name,
        truncate=truncate_of(cuts, body.truncation_direction),
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        dimensions_policy=policy,
    )
