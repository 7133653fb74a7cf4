"""For probes, monitors and people: /health, /livez, /readyz, /metrics and /."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlx_embeddings_server import __version__
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.providers.circuit import Circuit
from mlx_embeddings_server.routes.requests import admin_of, runtime_of

router = APIRouter(tags=["Service"])

_ENDPOINTS = (
    "/v1/embeddings", "/v1/embed_sparse", "/v1/rerank", "/v1/models", "/api/v1/embeddings", "/api/v1/embed_sparse",
    "/api/v1/rerank", "/api/v1/models", "/embed", "/rerank", "/health", "/livez", "/readyz", "/metrics", "/docs",
)  # fmt: skip


@router.head("/", include_in_schema=False)
@router.get("/")
async def index(request: Request) -> JSONResponse:
    """What is served here."""
    runtime = runtime_of(request)
    models = [model.name for model in runtime.models.usable()]
    own = () if runtime.collections is None else ("/v1/collections", "/api/v1/embeddings/collections")
    return JSONResponse(
        {
            "status": "ok",
            "name": "mlx-embeddings-server",
            "version": __version__,
            "models": models,
            "endpoints": _ENDPOINTS + own,
        }
    )


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 when every model can answer; 503 with the reason while one cannot, and while the server shuts down."""
    runtime = runtime_of(request)
    status = runtime.status()
    body: dict[str, Any] = {
        "status": status,
        "version": __version__,
        "uptime_seconds": round(runtime.uptime_seconds, 1),
        "requests_in_flight": runtime.in_flight - 1,  # this one aside
        "models": list(map(_state, runtime.models)),
    }
    if (cache := runtime.service.cache) is not None:
        body["cache"] = cache.stats()
    if providers := runtime.models.providers:
        body["circuit_breakers"] = {name: circuit_state(each.circuit) for name, each in providers.items()}
    if (collections := runtime.collections) is not None:
        state = "ok" if collections.is_available else "unavailable"
        body["collections"] = {"store": collections.store.name, "state": state}
    return JSONResponse(body, status_code=200 if status == "ok" else 503)


def circuit_state(circuit: Circuit) -> dict[str, Any]:
    """`retry_after` is in seconds."""
    return {
        "state": circuit.state,
        "failure_count": circuit.failure_count,
        "opened_at": circuit.opened_at.isoformat() if circuit.opened_at else None,
        "retry_after": circuit.retry_after,
    }


def _state(model: Model) -> dict[str, Any]:
    engine = model.engine
    return {
        "id": model.name,
        "state": model.state,
        "reason": model.reason,
        "restarts": engine.restarts if engine else 0,
        "queue": {
            "items": engine.queue.backlog_items if engine else 0,
            "tokens": engine.queue.backlog_tokens if engine else 0,
        },
    }


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """200 when the server takes work."""
    status = runtime_of(request).status()
    return Response(status, status_code=200 if status == "ok" else 503, media_type="text/plain")


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def live(request: Request) -> Response:
    """503 only when a worker is dead and will not come back by itself: the process should be restarted."""
    dead = [model.name for model in runtime_of(request).models if model.spec.pinned and model.state == "dead"]
    return Response("dead" if dead else "ok", status_code=503 if dead else 200, media_type="text/plain")


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format: an admin's, where callers are told apart, unless --open-metrics."""
    if not runtime_of(request).settings.open_metrics:
        await admin_of(request)
    return Response(runtime_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
