"""OpenAI's API: /v1/embeddings and /v1/models."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlx_embeddings_backends.base import Truncate
from mlx_embeddings_server.codec import embedding_list, quantize
from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.inputs.parse import parse_input
from mlx_embeddings_server.models import ServedModel
from mlx_embeddings_server.routes.requests import KeyedRoute, disconnects_of, read_json, runtime_of
from mlx_embeddings_server.schemas.openai import EmbeddingsRequest
from mlx_embeddings_server.service import Embeddings, EmbedOptions

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=KeyedRoute)

_OCTET_STREAM = "application/octet-stream"


@router.post(
    "/embeddings",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}},
        }
    },
)
async def create_embeddings(request: Request) -> Response:
    """One vector for each input, in their order.

    With `Accept: application/octet-stream` the reply is the rows' bytes, their shape in `X-Embeddings-Shape`.
    """
    body = await read_json(request, EmbeddingsRequest)
    runtime = runtime_of(request)
    model = runtime.models.get(body.model)
    contents = parse_input(body.input, modalities=model.info.modalities, max_inputs=runtime.settings.max_request_inputs)
    work = runtime.service.embed(model, contents, _options(body))
    result = await disconnects_of(request).until_gone(request, work)
    rows = quantize(result.rows, body.output_dtype or "float")
    headers = _headers(result, runtime.service.dimensions_policy)
    if request.headers.get("accept", "").startswith(_OCTET_STREAM):
        headers["X-Embeddings-Shape"] = ",".join(map(str, rows.shape))
        headers["X-Embeddings-Prompt-Tokens"] = str(result.prompt_tokens)
        return Response(rows.tobytes(), media_type=_OCTET_STREAM, headers=headers)
    usage: dict[str, Any] = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    if result.truncated:
        usage["truncated_inputs"] = result.truncated
    content = embedding_list(rows, body.encoding_format or "float", model=model.name, usage=usage)
    return Response(content, media_type="application/json", headers=headers)


@router.get("/models")
async def list_models(request: Request) -> JSONResponse:
    """All served models."""
    models = [_describe(model) for model in runtime_of(request).models]
    return JSONResponse({"object": "list", "data": models})


@router.get("/models/{name:path}")
async def get_model(request: Request, name: str) -> JSONResponse:
    """One served model."""
    return JSONResponse(_describe(runtime_of(request).models.get(name)))


def _options(body: EmbeddingsRequest) -> EmbedOptions:
    for field in ("token_pool_factor", "pool"):
        if getattr(body, field) is not None:
            raise InvalidRequest(
                f"{field} is for multi-vector models, which this one is not", param=field, code="invalid_value"
            )
    truncate: Truncate | None
    match body.truncate:
        case bool():
            truncate = "end" if body.truncate else "none"
        case _:
            truncate = body.truncate
    return EmbedOptions(
        input_type=body.input_type,
        prompt=body.prompt,
        prompt_name=body.prompt_name,
        truncate=truncate,
        dimensions=body.dimensions,
        normalize=body.normalize,
    )


def _headers(result: Embeddings, dimensions_policy: str) -> dict[str, str]:
    timings = (
        ("tokenize", result.tokenize_seconds),
        ("queue", result.queue_seconds),
        ("inference", result.inference_seconds),
    )
    headers = {
        "Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in timings),
        "X-Embeddings-Provider": result.provider,
        "X-Embeddings-Dimensions-Policy": dimensions_policy,
    }
    if result.truncated:
        headers["X-Embeddings-Truncated"] = ",".join(map(str, result.truncated))
    return headers


def _describe(model: ServedModel) -> dict[str, Any]:
    info = model.info
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.snapshot.name.partition("/")[0],
        "backend": info.backend,
        "device": info.device,
        "dtype": info.dtype,
        "dimensions": info.dimensions,
        "max_tokens": info.max_tokens,
        "modalities": info.modalities,
        "output": info.output,
        "loaded": model.engine.state == "ready",
    }
