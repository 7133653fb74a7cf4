"""The tldw server's API for admins: metrics, the cache, circuit breakers, loading and downloading models."""

import logging
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from mlx_embeddings_backends.base import Item, Pair
from mlx_embeddings_server.downloads import Download
from mlx_embeddings_server.errors import InvalidRequest, NotFound, quoted
from mlx_embeddings_server.failures import as_api_errors
from mlx_embeddings_server.found import Found
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.routes.choice import asked_model
from mlx_embeddings_server.routes.replies import json_reply
from mlx_embeddings_server.routes.requests import AdminRoute, disconnects_of, json_body_of, read_json, runtime_of
from mlx_embeddings_server.routes.tldw import cache_stats, circuits, id_of
from mlx_embeddings_server.schemas.tldw import ModelRequest

log = logging.getLogger(__name__)

router = APIRouter(prefix="/api/v1/embeddings", tags=["tldw server"], route_class=AdminRoute)

_PROBE = "warmup"  # a text that is embedded to see that a model works


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What /metrics has, as JSON, and the state of the cache and of the circuit breakers."""
    runtime = runtime_of(request)
    body = {
        "cache": cache_stats(runtime),
        "active_requests": runtime.in_flight - 1,  # this one aside
        "circuit_breakers": circuits(runtime),
    }
    return json_reply(body | runtime.metrics.as_json())


@router.delete("/cache")
async def clear_cache(request: Request) -> Response:
    """Forget all vectors that are kept, in all layers of the cache."""
    cache = runtime_of(request).service.cache
    if cache is None:
        return json_reply({"message": "The cache is off (--cache): there was nothing to clear", "entries_removed": 0})
    removed = await cache.clear()
    log.info("the cache was cleared: %d entries", removed)
    return json_reply({"message": "Cache cleared successfully", "entries_removed": removed})


@router.get("/circuit-breakers")
async def circuit_breakers(request: Request) -> Response:
    """Of each provider elsewhere: closed, open or half_open, and how often it failed in a row."""
    return json_reply(circuits(runtime_of(request)))


@router.post("/circuit-breakers/{provider}/reset")
async def reset_circuit_breaker(request: Request, provider: str) -> Response:
    """Have a provider asked again at once."""
    providers = runtime_of(request).models.providers
    if provider not in providers:
        known = ", ".join(providers) or "none"
        raise NotFound(
            f"there is no circuit breaker for the provider {quoted(provider)}; known: {known}",
            code="provider_not_found",
        )
    providers[provider].circuit.reset()
    log.info("the circuit of %s was reset", provider)
    return json_reply({"message": f"Circuit breaker for '{provider}' reset successfully"})


@router.post("/models/warmup", openapi_extra=json_body_of(ModelRequest))
async def warm_up(request: Request) -> Response:
    """Load the model, whenever it failed last, and have it embed a text; answers when that is done."""
    body = await read_json(request, ModelRequest)
    model = asked_model(request, body.model, body.provider)
    started = time.perf_counter()

    async def work() -> int:
        await model.load()
        async with model:
            with as_api_errors("model", ()):
                item = Item(Pair(_PROBE, _PROBE) if model.info.output == "rerank" else _PROBE)
                await model.provider.embed([item], "none")
            return model.info.dimensions

    dimension = await disconnects_of(request).until_gone(request, work())
    seconds = round(time.perf_counter() - started, 3)
    return json_reply({"status": "ok", **_named(model), "warmed": True, "dimension": dimension, "seconds": seconds})


@router.post("/models/download", openapi_extra=json_body_of(ModelRequest))
async def download(request: Request) -> Response:
    """Begin to fetch the model's files, unless they are here; answers at once with how far it is."""
    body = await read_json(request, ModelRequest)
    model = asked_model(request, body.model, body.provider)
    begun = _download_of(model)
    if model.found is None:
        begun.start()
    described = _how_far(model)
    return json_reply(described, status=200 if described["downloaded"] else 202)


@router.get("/models/download/{name:path}")
async def get_download(request: Request, name: str) -> Response:
    """How far the download is that was begun, or that a request for the model has caused."""
    return json_reply(_how_far(runtime_of(request).models.get(name)))


def _download_of(model: Model) -> Download[Found]:
    """Raises `InvalidRequest`, where it runs elsewhere."""
    if model.download is None:
        raise InvalidRequest(
            f"the model {model.name!r} runs at its provider {model.spec.provider!r}: there is nothing to download",
            param="model",
            code="invalid_value",
        )
    return model.download


def _how_far(model: Model) -> dict[str, Any]:
    """`percent` is null while it is not known how much there is to fetch. Raises `InvalidRequest`."""
    download = _download_of(model)
    if model.found is not None:
        return {"status": "ok", **_named(model), "downloaded": True, "percent": 100.0}
    described = {"status": download.state, **_named(model), "downloaded": False, "percent": download.percent}
    return described if download.reason is None else described | {"detail": download.reason}


def _named(model: Model) -> dict[str, Any]:
    return {"provider": model.spec.provider, "model": id_of(model)}
