"""Reranking, in Cohere's, Jina's and the unified API's shape, and in TEI's."""

from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.errors import InvalidInput, InvalidRequest
from mlx_embeddings_server.inputs.parse import Content, parse_input
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.ranking import Ranking
from mlx_embeddings_server.routes.choice import asked_model, on_model
from mlx_embeddings_server.routes.replies import account_headers, json_reply, usage
from mlx_embeddings_server.routes.requests import (
    KeyedRoute,
    json_body_of,
    read_json,
    runtime_of,
    truncate_of,
)
from mlx_embeddings_server.schemas.rerank import RerankRequest

router = APIRouter(tags=["Rerank"], route_class=KeyedRoute)


@router.post("/v2/rerank", include_in_schema=False)
@router.post("/rerank", include_in_schema=False)
@router.post("/v1/rerank", openapi_extra=json_body_of(RerankRequest))
async def rerank(request: Request) -> Response:
    """The documents' scores for the query, the best first.

    A reranker scores pairs; a multi-vector model by MaxSim, pages as images included; a dense model by cosine. `texts`
    in the place of `documents` is TEI's request, and its reply the bare array. Also at /v2/rerank and /rerank.
    """
    return await answer(request, await read_json(request, RerankRequest))


async def answer(request: Request, body: RerankRequest) -> Response:
    runtime = runtime_of(request)
    if body.documents is not None and body.texts is not None:
        raise InvalidRequest("documents and texts exclude each other: send one of them", param="texts")
    field = "documents" if body.texts is None else "texts"
    request.state.is_tei = field == "texts"  # so is what is wrong with it told
    given = body.documents if body.texts is None else body.texts
    if given is None:
        raise InvalidRequest("documents is missing", param="documents", code="missing_required_parameter")
    asked = asked_model(request, body.model) if body.model is not None else _first_reranker(runtime.models)

    async def work(model: Model) -> Ranking:
        [query] = _contents(model, [body.query], 1, "query", one=True)
        documents = _contents(model, given, runtime.settings.max_request_inputs, field)
        truncate = truncate_of(body.truncate, body.truncation_direction)
        return await runtime.ranking.rerank(
            model, query, documents, truncate=truncate, raw_scores=bool(body.raw_scores), field=field
        )

    answered = await on_model(request, asked, work, inputs=None, gives_vectors=False)
    model, result = answered.model, answered.result
    best = result.best(body.top_n)
    if field == "texts":
        reply: Any = [
            {"index": index, "score": float(result.scores[index])}
            | ({"text": given[index]} if body.return_text else {})
            for index in best
        ]
    else:
        results = [
            {"index": index, "relevance_score": float(result.scores[index])}
            | ({"document": _document(given[index])} if body.return_documents else {})
            for index in best
        ]
        reply = {"object": "rerank", "model": model.name, "results": results, "usage": usage(result)}
    return json_reply(reply, account_headers(result) | answered.headers)


def _contents(model: Model, given: Any, most: int, field: str, *, one: bool = False) -> list[Content]:
    """Raises `InvalidInput`."""
    if one and not isinstance(given[0], str | dict):
        raise InvalidInput(field, 'must be a string, {"text": ...} or {"image": ...}', code="invalid_type")
    if not isinstance(given, list):
        raise InvalidInput(field, "must be a list", code="invalid_type")
    for index, each in enumerate(given):
        if not isinstance(each, str | dict):
            raise InvalidInput(
                f"{field}[{index}]", 'must be a string, {"text": ...} or {"image": ...}', code="invalid_type"
            )
    kept = [_content_of(each) for each in given]
    return parse_input(
        kept[0] if one else kept,
        modalities=model.info.modalities,
        separator=model.info.separator,
        max_inputs=most,
        field=field,
    )


def _content_of(given: str | dict[str, Any]) -> str | dict[str, Any]:
    """Of an object what is scored: Cohere's clients send documents with an id, a title and whatever else they have."""
    if not isinstance(given, dict):
        return given
    return {key: value for key, value in given.items() if key in ("text", "image")} or given


def _document(given: str | dict[str, Any]) -> dict[str, Any]:
    return {"text": given} if isinstance(given, str) else given


def _first_reranker(models: Models) -> Model:
    """For clients that name none, TEI's: the same whatever has been loaded meanwhile. Raises `InvalidRequest`."""
    served = list(models.usable())
    for model in served:
        is_one = model.spec.pinned and model.known_info is not None and model.known_info.output == "rerank"
        if is_one or model.spec.kind == "rerank":
            return model
    if len(served) == 1:
        return served[0]
    raise InvalidRequest(
        "model is missing, and of the models that are served none is known to be the reranker: name one, or give it "
        "`type: rerank` in the server's file",
        param="model",
        code="missing_required_parameter",
    )
