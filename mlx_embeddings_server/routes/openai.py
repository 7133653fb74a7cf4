"""OpenAI's API: /v1/embeddings and /v1/models."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from operator import attrgetter, or_
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlx_embeddings_backends.base import PatchGrid
from mlx_embeddings_server.codec import embedding_list, encode_inputs, quantize, sparse_value, vector_list
from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.inputs.parse import parse_input
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.options import EmbedOptions
from mlx_embeddings_server.routes.choice import asked_model, dimensions_policy_of, on_model
from mlx_embeddings_server.routes.replies import embedding_headers, joined, usage
from mlx_embeddings_server.routes.requests import (
    KeyedRoute,
    header_of,
    json_body_of,
    read_json,
    runtime_of,
    truncate_of,
)
from mlx_embeddings_server.schemas.openai import EmbeddingsRequest
from mlx_embeddings_server.service import Embeddings, Table
from mlx_embeddings_server.settings import DimensionsPolicy

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=KeyedRoute)

_OCTET_STREAM = "application/octet-stream"
# What each kind of vector is called where a request asks for `outputs`.
_NAMES = {"dense": "embedding", "multi_vector": "multi_vector", "sparse": "sparse_embedding"}


@router.post("/embeddings", openapi_extra=json_body_of(EmbeddingsRequest))
async def create_embeddings(request: Request) -> Response:
    """The inputs' vectors, in their order: one each, or with a multi-vector model a list of them each.

    With `Accept: application/octet-stream` the reply is the vectors' bytes, their shape in `X-Embeddings-Shape`.
    """
    return await answer(request, await read_json(request, EmbeddingsRequest))


async def answer(
    request: Request,
    body: EmbeddingsRequest,
    *,
    bare: bool = False,
    name_of: Callable[[Model], str] = attrgetter("name"),
) -> Response:
    """`bare`: with the vectors alone, as `embeddings`, in the place of OpenAI's list. `name_of`: for its `model`."""
    runtime = runtime_of(request)
    options = _options(body, dimensions_policy_of(request))

    async def embed(model: Model) -> Embeddings:
        contents = parse_input(
            body.input,
            modalities=model.info.modalities,
            separator=model.info.separator,
            max_inputs=runtime.settings.max_request_inputs,
        )
        return await runtime.service.embed(model, contents, options)

    answered = await on_model(request, asked_model(request, body.model), embed, inputs=body.input)
    model, result = answered.model, answered.result
    headers = embedding_headers(result, runtime.service.policy(options)) | answered.headers
    if (header_of(request, b"accept") or "").startswith(_OCTET_STREAM):
        rows = quantize(_only_table(result).rows, body.output_dtype or "float")
        headers |= _describe_bytes(result, rows.shape[1], with_patches="patches" in (body.include or ()))
        return Response(rows.tobytes(), media_type=_OCTET_STREAM, headers=headers)
    values = _values(result, body)
    if body.include:
        values = _with_patches(values, result.patches)
    if bare and body.outputs is None:
        after = b'],"model":' + orjson.dumps(name_of(model)) + b',"usage":' + orjson.dumps(usage(result)) + b"}"
        content = await joined(vector_list(values, b'{"embeddings":[', after))
    else:
        content = await joined(embedding_list(values, model=name_of(model), usage=usage(result)))
    return Response(content, media_type="application/json", headers=headers)


@router.get("/models")
async def list_models(request: Request) -> JSONResponse:
    """All served models that may be used."""
    models = [describe(model) for model in runtime_of(request).models.usable()]
    return JSONResponse({"object": "list", "data": models})


@router.get("/models/{name:path}")
async def get_model(request: Request, name: str) -> JSONResponse:
    """One served model."""
    return JSONResponse(describe(runtime_of(request).models.asked(name, remembers=False)))


def _options(body: EmbeddingsRequest, dimensions_policy: DimensionsPolicy | None) -> EmbedOptions:
    return EmbedOptions(
        input_type=body.input_type,
        prompt=body.prompt,
        prompt_name=body.prompt_name,
        adapter=body.adapter,
        truncate=truncate_of(body.truncate),
        dimensions=body.dimensions,
        normalize=body.normalize,
        pool=body.pool,
        token_pool_factor=body.token_pool_factor,
        with_patches=bool(body.include),
        outputs=None if body.outputs is None else tuple(body.outputs),
        dimensions_policy=dimensions_policy,
    )


def _values(result: Embeddings, body: EmbeddingsRequest) -> Iterator[dict[str, Any]]:
    """Each input's vectors by the names that they have in the reply."""
    parts = [
        encode_inputs(
            quantize(table.rows, body.output_dtype or "float"),
            table.lengths,
            body.encoding_format or "float",
            "embedding" if body.outputs is None else _NAMES[output],
        )
        for output, table in result.tables.items()
    ]
    if result.sparse is not None:
        parts.append({_NAMES["sparse"]: sparse_value(vector)} for vector in result.sparse)
    return (reduce(or_, of_one) for of_one in zip(*parts, strict=True))


def _only_table(result: Embeddings) -> Table:
    if len(result.tables) != 1 or result.sparse is not None:
        message = "bytes are of one kind of dense or multi-vector output: ask for JSON, or for one of outputs"
        raise InvalidRequest(message, param="outputs", code="invalid_value")
    return result.table


def _with_patches(values: Iterable[dict[str, Any]], patches: Sequence[PatchGrid | None]) -> Iterator[dict[str, Any]]:
    """Beside each image's vectors, which of them are its patches."""
    for value, grid in zip(values, patches, strict=True):
        yield value if grid is None else value | {"patches": asdict(grid)}


def _describe_bytes(result: Embeddings, dimensions: int, *, with_patches: bool) -> dict[str, str]:
    """`inputs,dimensions`; with a multi-vector model `vectors,dimensions` of each input, with semicolons between."""
    table = result.table
    lengths = [len(table.rows)] if table.lengths is None else table.lengths
    headers = {
        "X-Embeddings-Shape": ";".join(f"{length},{dimensions}" for length in lengths),
        "X-Embeddings-Prompt-Tokens": str(result.prompt_tokens),
    }
    if with_patches:
        grids = ("" if grid is None else f"{grid.rows},{grid.columns},{grid.offset}" for grid in result.patches)
        headers["X-Embeddings-Patches"] = ";".join(grids)
    return headers


def describe(model: Model) -> dict[str, Any]:
    """What is known of it: before its first load that is little."""
    info, found = model.known_info, model.found
    described: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.spec.provider
        if model.spec.is_remote
        else (found.checkpoint.snapshot.name if found else model.spec.source).partition("/")[0],
        "provider": model.spec.provider,
        "aliases": model.spec.aliases,
        "fallback": model.spec.fallback,
        "loaded": model.state == "ready",
        "state": model.state,
        "pinned": model.spec.pinned,
    }
    if info is None:
        said = {"dimensions": model.spec.dimensions, "max_tokens": model.spec.max_tokens}
        return described | {name: value for name, value in said.items() if value is not None}
    if found is None:
        return described | {
            "dimensions": info.dimensions,
            "max_tokens": model.spec.max_tokens,
            "modalities": info.modalities,
            "output": info.output,
            "outputs": info.outputs,
        }
    return described | {
        "backend": info.backend,
        "device": info.device,
        "dtype": info.dtype,
        "dimensions": info.dimensions,
        "max_tokens": info.max_tokens,
        "modalities": info.modalities,
        "output": info.output,
        "outputs": info.outputs,
        "adapters": info.adapters,
        "memory_bytes": info.memory_bytes,
        "verified": found.choice.verified,
    }
