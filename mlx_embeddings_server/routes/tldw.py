"""The tldw server's API beside POST /api/v1/embeddings: batches, what is served, its state, and what admins do."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.codec import encode_inputs, vector_list
from mlx_embeddings_server.errors import InvalidInput
from mlx_embeddings_server.fallbacks import dimensions_of
from mlx_embeddings_server.inputs.parse import parse_input
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.options import EmbedOptions
from mlx_embeddings_server.routes.choice import asked_model, dimensions_policy_of, on_model
from mlx_embeddings_server.routes.health import circuit_state
from mlx_embeddings_server.routes.replies import embedding_headers, joined, json_reply
from mlx_embeddings_server.routes.requests import KeyedRoute, json_body_of, read_json, runtime_of
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.schemas.tldw import BatchRequest
from mlx_embeddings_server.service import Embeddings

router = APIRouter(prefix="/api/v1/embeddings", tags=["tldw server"], route_class=KeyedRoute)

# A batch may have so many times the inputs of another request.
_BATCH_FACTOR = 10


@router.post("/batch", openapi_extra=json_body_of(BatchRequest))
async def batch(request: Request) -> Response:
    """Texts' vectors, in their order: more texts than another request may have, that make way for other requests."""
    body = await read_json(request, BatchRequest)
    runtime = runtime_of(request)
    policy = dimensions_policy_of(request)
    most = _BATCH_FACTOR * runtime.settings.max_request_inputs
    _check_texts(body.texts)
    contents = parse_input(body.texts, modalities=("text",), max_inputs=most, field="texts")

    async def embed(model: Model) -> Embeddings:
        options = EmbedOptions(dimensions=body.dimensions, dimensions_policy=policy)
        return await runtime.service.embed(model, contents, options, field="texts")

    asked = asked_model(request, body.model, body.provider, or_first=True)
    answered = await on_model(request, asked, embed, inputs=body.texts)
    result = answered.result
    after = {"model": id_of(answered.model), "provider": result.provider, "count": len(contents)}
    values = encode_inputs(result.table.rows, result.table.lengths, "float")
    content = await joined(vector_list(values, b'{"embeddings":[', b"]," + bytes(json_reply(after).body)[1:]))
    headers = embedding_headers(result, policy or runtime.service.dimensions_policy) | answered.headers
    return Response(content, media_type="application/json", headers=headers)


@router.get("/models")
async def list_models(request: Request) -> Response:
    """All that is served, allowed or not."""
    models = runtime_of(request).models
    default = models.default_or_first
    data = [
        {
            "provider": model.spec.provider,
            "model": id_of(model),
            "allowed": models.allow_list.allows(model),
            "default": model is default,
        }
        for model in models
    ]
    allow_list = models.allow_list
    return json_reply({"data": data, "allowed_providers": allow_list.providers, "allowed_models": allow_list.models})


@router.get("/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One model, allowed or not. What is not known before its first load is null until then."""
    models = runtime_of(request).models
    model = models.get(name, request.query_params.get("provider") or None)
    info = model.known_info
    described: dict[str, Any] = {
        "model": id_of(model),
        "provider": model.spec.provider,
        "dimension": dimensions_of(model),
        "max_tokens": model.spec.max_tokens if info is None else info.max_tokens or model.spec.max_tokens,
        "allowed": models.allow_list.allows(model),
        "state": model.state,
    }
    if model.download is not None and model.download.state == "downloading":
        described["download"] = {"status": "downloading", "percent": model.download.percent}
    return json_reply(described)


@router.get("/providers-config")
async def providers_config(request: Request) -> Response:
    """The default, and the providers with their models, as far as they may be used."""
    models = runtime_of(request).models
    default = models.default_or_first
    usable = list(models.usable())
    return json_reply(
        {
            "default_provider": None if default is None else default.spec.provider,
            "default_model": None if default is None else id_of(default),
            "providers": [
                {"name": name, "models": [id_of(model) for model in usable if model.spec.provider == name]}
                for name in models.provider_names
                if models.allow_list.allows_provider(name)
            ],
        }
    )


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when every pinned model can answer, else 503."""
    runtime = runtime_of(request)
    status = runtime.status()
    body = {
        "status": "healthy" if status == "ok" else "degraded",
        "service": "mlx-embeddings-server",
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "cache_stats": cache_stats(runtime),
        "active_requests": runtime.in_flight - 1,  # this one aside
        "circuit_breakers": circuits(runtime),
    }
    return json_reply(body, status=200 if status == "ok" else 503)


def id_of(model: Model) -> str:
    """Its name beside its provider's: without that."""
    return model.name.removeprefix(f"{model.spec.provider}:")


def cache_stats(runtime: Runtime) -> dict[str, Any]:
    cache = runtime.service.cache
    if cache is None:
        return {"enabled": False, "size": 0, "max_size": 0, "ttl_seconds": 0}
    return {"enabled": True} | cache.stats()


def circuits(runtime: Runtime) -> dict[str, Any]:
    return {name: circuit_state(endpoint.circuit) for name, endpoint in runtime.models.providers.items()}


def _check_texts(texts: Any) -> None:
    """Raises `InvalidInput`."""
    if not isinstance(texts, list):
        raise InvalidInput("texts", "must be a list of strings", code="invalid_type")
    for index, each in enumerate(texts):
        if not isinstance(each, str):
            message = "must be a string: token ids and images are for POST /api/v1/embeddings"
            raise InvalidInput(f"texts[{index}]", message, code="invalid_type")
