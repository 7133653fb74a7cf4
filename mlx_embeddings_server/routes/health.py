"""For probes, monitors and people: /health, /livez, /readyz, /metrics and /."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlx_embeddings_server import __version__
from mlx_embeddings_server.routes.requests import runtime_of
from mlx_embeddings_server.served_model import ServedModel

router = APIRouter(tags=["Service"])

_ENDPOINTS = (
    "/v1/embeddings", "/v1/embed_sparse", "/v1/rerank", "/v1/models", "/api/v1/embeddings", "/api/v1/embed_sparse",
    "/api/v1/rerank", "/api/v1/models", "/embed", "/rerank", "/health", "/livez", "/readyz", "/metrics", "/docs",
)  # fmt: skip


@router.head("/", include_in_schema=False)
@router.get("/")
async def index(request: Request) -> JSONResponse:
    """What is served here."""
    models = [model.name for model in runtime_of(request).models]
    return JSONResponse(
        {
            "status": "ok",
            "name": "mlx-embeddings-server",
            "version": __version__,
            "models": models,
            "endpoints": _ENDPOINTS,
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
    return JSONResponse(body, status_code=200 if status == "ok" else 503)


def _state(model: ServedModel) -> dict[str, Any]:
    engine = model.engine
    return {
        "id": model.name,
        "state": model.state,
        "reason": model.reason,
        "restarts": engine.restarts if engine else 0,
        "queue": {"items": len(engine.queue.waiting) if engine else 0, "tokens": engine.queue.tokens if engine else 0},
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
    """Prometheus' text format."""
    return Response(runtime_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
