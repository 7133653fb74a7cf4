"""Sparse vectors: /v1/embed_sparse."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.codec import embedding_list, sparse_value
from mlx_embeddings_server.errors import InvalidRequest
from mlx_embeddings_server.failures import as_api_errors
from mlx_embeddings_server.inputs.parse import parse_input
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.options import EmbedOptions
from mlx_embeddings_server.routes.choice import asked_model, on_model
from mlx_embeddings_server.routes.replies import account_headers, joined, usage
from mlx_embeddings_server.routes.requests import (
    KeyedRoute,
    json_body_of,
    read_json,
    runtime_of,
    truncate_of,
)
from mlx_embeddings_server.schemas.sparse import SparseRequest
from mlx_embeddings_server.service import Embeddings

router = APIRouter(tags=["Sparse"], route_class=KeyedRoute)


@router.post("/v1/embed_sparse", openapi_extra=json_body_of(SparseRequest))
async def embed_sparse(request: Request) -> Response:
    """For each input the indices and values of its sparse vector, the indices ascending."""
    return await answer(request, await read_json(request, SparseRequest))


async def answer(request: Request, body: SparseRequest) -> Response:
    runtime = runtime_of(request)
    options = EmbedOptions(
        input_type=body.input_type,
        prompt=body.prompt,
        prompt_name=body.prompt_name,
        truncate=truncate_of(body.truncate),
        outputs=("sparse",),
        max_active_dims=body.max_active_dims,
    )

    async def work(model: Model) -> tuple[Embeddings, list[list[str] | None]]:
        name = _token_names(model) if body.tokens else None
        contents = parse_input(
            body.input,
            modalities=model.info.modalities,
            separator=model.info.separator,
            max_inputs=runtime.settings.max_request_inputs,
        )
        result = await runtime.service.embed(model, contents, options)
        return result, [name(each.indices.tolist()) for each in result.sparse or ()] if name else []

    answered = await on_model(request, asked_model(request, body.model), work, inputs=body.input)
    model, (result, words) = answered.model, answered.result

    def values() -> Iterator[dict[str, Any]]:
        for index, vector in enumerate(result.sparse or ()):
            yield {"embedding": sparse_value(vector) | ({"tokens": words[index]} if body.tokens else {})}

    content = await joined(embedding_list(values(), model=model.name, usage=usage(result)))
    return Response(content, media_type="application/json", headers=account_headers(result) | answered.headers)


def _token_names(model: Model) -> Callable[[Sequence[int]], list[str] | None] | None:
    """Of the places of the model's vectors. Raises `InvalidRequest` where these stand for no tokens."""
    if model.engine is None or "sparse" not in model.info.outputs:
        return None  # it is refused for that, later
    with as_api_errors("input", ()):
        backend = model.engine.backend
    if backend.token_strings([]) is None:
        raise InvalidRequest(
            f"the dimensions of {model.name!r}'s vectors are learnt, and stand for no tokens of its vocabulary: leave "
            "tokens out",
            param="tokens",
            code="invalid_value",
        )
    return backend.token_strings
