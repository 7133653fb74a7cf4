"""The unified API under /api/v1: the same models, OpenAI's fields or its own, and `options`."""

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.routes import openai, rerank, sparse
from mlx_embeddings_server.routes.requests import KeyedRoute, json_body_of, read_json
from mlx_embeddings_server.schemas.unified import (
    UnifiedEmbeddingsRequest,
    UnifiedRerankRequest,
    UnifiedSparseRequest,
    with_options,
)

router = APIRouter(prefix="/api/v1", tags=["Unified API"], route_class=KeyedRoute)

router.add_api_route("/models", openai.list_models, methods=["GET"])
router.add_api_route("/models/{name:path}", openai.get_model, methods=["GET"])


@router.post("/embeddings", openapi_extra=json_body_of(UnifiedEmbeddingsRequest))
async def embeddings(request: Request) -> Response:
    """As /v1/embeddings; a request with `texts` is answered with `embeddings`, a list of vectors."""
    body = await read_json(request, UnifiedEmbeddingsRequest)
    return await openai.answer(request, with_options(body), bare=body.texts is not None)


@router.post("/embed_sparse", openapi_extra=json_body_of(UnifiedSparseRequest))
async def embed_sparse(request: Request) -> Response:
    """As /v1/embed_sparse."""
    return await sparse.answer(request, with_options(await read_json(request, UnifiedSparseRequest)))


@router.post("/rerank", openapi_extra=json_body_of(UnifiedRerankRequest))
async def rerank_documents(request: Request) -> Response:
    """As /v1/rerank."""
    return await rerank.answer(request, with_options(await read_json(request, UnifiedRerankRequest)))
