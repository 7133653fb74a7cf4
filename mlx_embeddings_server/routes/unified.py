"""The unified API under /api/v1: the same models, OpenAI's fields or its own, and `options`.

POST /api/v1/embeddings is the tldw server's, too.
"""

from functools import partial

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.model import Model
from mlx_embeddings_server.provider_entry import LOCAL_NAMES
from mlx_embeddings_server.providers import LOCAL
from mlx_embeddings_server.routes import openai, rerank, sparse
from mlx_embeddings_server.routes.requests import KeyedRoute, header_of, json_body_of, read_json, runtime_of
from mlx_embeddings_server.routes.tldw import id_of
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
    """As /v1/embeddings; a request with `texts` is answered with `embeddings`, a list of vectors.

    Where the request names a provider, the reply's `model` does too.
    """
    body = await read_json(request, UnifiedEmbeddingsRequest)
    name_of = partial(_answering, request, body.model)
    return await openai.answer(request, with_options(body), bare=body.texts is not None, name_of=name_of)


def _answering(request: Request, asked: str | None, model: Model) -> str:
    """As the tldw server tells it: OpenAI's ids stand alone, others' behind the provider, if the request names one."""
    own = model.spec.provider
    if own == "openai":
        return id_of(model)
    said = header_of(request, b"x-provider") or (asked or "").partition(":")[0]
    named = runtime_of(request).models.provider_of(said)
    if named is None:
        return model.name
    # This process has several names: that which the client knows.
    provider = named if own == LOCAL and named in LOCAL_NAMES else own
    return f"{provider}:{id_of(model)}"


@router.post("/embed_sparse", openapi_extra=json_body_of(UnifiedSparseRequest))
async def embed_sparse(request: Request) -> Response:
    """As /v1/embed_sparse."""
    return await sparse.answer(request, with_options(await read_json(request, UnifiedSparseRequest)))


@router.post("/rerank", openapi_extra=json_body_of(UnifiedRerankRequest))
async def rerank_documents(request: Request) -> Response:
    """As /v1/rerank."""
    return await rerank.answer(request, with_options(await read_json(request, UnifiedRerankRequest)))
