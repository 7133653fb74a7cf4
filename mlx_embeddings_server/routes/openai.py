"""OpenAI's API: /v1/embeddings and /v1/models."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlx_embeddings_backends.base import PatchGrid, Truncate
from mlx_embeddings_server.codec import embedding_list, encode_inputs, quantize
from mlx_embeddings_server.inputs.parse import parse_input
from mlx_embeddings_server.models import ServedModel
from mlx_embeddings_server.routes.replies import embedding_headers, joined
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
    """The inputs' vectors, in their order: one each, or with a multi-vector model a list of them each.

    With `Accept: application/octet-stream` the reply is the vectors' bytes, their shape in `X-Embeddings-Shape`.
    """
    body = await read_json(request, EmbeddingsRequest)
    runtime = runtime_of(request)
    model = runtime.models.get(body.model)
    contents = parse_input(
        body.input,
        modalities=model.info.modalities,
        separator=model.info.separator,
        max_inputs=runtime.settings.max_request_inputs,
    )
    work = runtime.service.embed(model, contents, _options(body))
    result = await disconnects_of(request).until_gone(request, work)
    rows = quantize(result.rows, body.output_dtype or "float")
    headers = embedding_headers(result, runtime.service.dimensions_policy)
    if request.headers.get("accept", "").startswith(_OCTET_STREAM):
        headers |= _describe_bytes(result, rows.shape[1], with_patches="patches" in (body.include or ()))
        return Response(rows.tobytes(), media_type=_OCTET_STREAM, headers=headers)
    usage: dict[str, Any] = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    if result.truncated:
        usage["truncated_inputs"] = result.truncated
    values = encode_inputs(rows, result.lengths, body.encoding_format or "float")
    if body.include:
        values = _with_patches(values, result.patches)
    content = await joined(embedding_list(values, model=model.name, usage=usage))
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
        adapter=body.adapter,
        truncate=truncate,
        dimensions=body.dimensions,
        normalize=body.normalize,
        pool=body.pool,
        token_pool_factor=body.token_pool_factor,
        with_patches=bool(body.include),
    )


def _with_patches(values: Iterable[dict[str, Any]], patches: Sequence[PatchGrid | None]) -> Iterator[dict[str, Any]]:
    """Beside each image's vectors, which of them are its patches."""
    for value, grid in zip(values, patches, strict=True):
        yield value if grid is None else value | {"patches": asdict(grid)}


def _describe_bytes(result: Embeddings, dimensions: int, *, with_patches: bool) -> dict[str, str]:
    """`inputs,dimensions`; with a multi-vector model `vectors,dimensions` of each input, with semicolons between."""
    lengths = [len(result.rows)] if result.lengths is None else result.lengths
    headers = {
        "X-Embeddings-Shape": ";".join(f"{length},{dimensions}" for length in lengths),
        "X-Embeddings-Prompt-Tokens": str(result.prompt_tokens),
    }
    if with_patches:
        grids = ("" if grid is None else f"{grid.rows},{grid.columns},{grid.offset}" for grid in result.patches)
        headers["X-Embeddings-Patches"] = ";".join(grids)
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
        "adapters": info.adapters,
        "verified": model.choice.verified,
        "loaded": model.engine.state == "ready",
    }
