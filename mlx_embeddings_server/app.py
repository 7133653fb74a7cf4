"""create_app(): wiring, lifespan and error handlers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mlx_embeddings_backends import detect
from mlx_embeddings_server import __version__
from mlx_embeddings_server.errors import (
    ApiError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    embed_body,
    openai_body,
    quoted,
)
from mlx_embeddings_server.inputs.images import ImageLoader
from mlx_embeddings_server.inputs.token_encoding import TokenDecoder, is_known_encoding, known_encodings
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.middleware import RequestMiddleware
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.ranking import RankingService
from mlx_embeddings_server.routes import admin, embed, health, openai, rerank, sparse, unified
from mlx_embeddings_server.routes.disconnects import ClientGone, DisconnectWatcher
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.served_model import Load
from mlx_embeddings_server.service import EmbeddingService
from mlx_embeddings_server.settings import Settings, SettingsError

# Seconds for the batches that run to end: Python aborts when it exits under a thread that is in native code.
_LAST_BATCH_TIMEOUT = 2


def create_app(settings: Settings, *, load: Load = detect.load) -> FastAPI:
    """The server as an ASGI app. Models are found here, and loaded at the latest when the app starts.

    Raises `SettingsError`, or `ModelError` for a model that is not to be had. `load` makes a backend of a checkpoint.
    """
    if not settings.model and not settings.models:
        raise SettingsError("no model was named: give --model, or set MLX_EMBEDDINGS_MODEL")
    metrics = Metrics()
    image_loader = ImageLoader(
        allow_private=settings.allow_private_image_urls, max_total_bytes=settings.max_request_bytes
    )
    service = EmbeddingService(
        metrics,
        dimensions_policy=settings.dimensions_policy,
        token_decoder=_token_decoder(settings.token_encoding),
        image_loader=image_loader,
    )
    disconnects = DisconnectWatcher()
    runtime = Runtime(settings, Models(settings, metrics, load), metrics, service, RankingService(service, metrics))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(runtime.models.load)
        tasks = [asyncio.create_task(disconnects.run()), asyncio.create_task(runtime.models.unload_idle())]
        yield
        runtime.draining = True
        for task in tasks:
            task.cancel()
        await image_loader.aclose()
        await asyncio.to_thread(runtime.models.close, _LAST_BATCH_TIMEOUT)

    app = FastAPI(
        title="mlx-embeddings-server",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        # Off: looking for OpenTelemetry's providers takes 0.02 ms a request, and there are none.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.runtime = runtime
    app.state.disconnects = disconnects
    app.add_middleware(RequestMiddleware, runtime=runtime)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)  # it left before its body was here
    for routes in (openai, sparse, rerank, unified, admin, embed, health):
        app.include_router(routes.router)
    return app


def _token_decoder(encoding_name: str) -> TokenDecoder | None:
    if encoding_name == "native":
        return None
    if not is_known_encoding(encoding_name):
        raise SettingsError(f"--token-encoding {encoding_name}: known are native, {', '.join(known_encodings())}")
    return TokenDecoder(encoding_name)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    is_embed = request.method == "POST" and request.url.path in embed.PATHS
    render = embed_body if is_embed or getattr(request.state, "is_tei", False) else openai_body
    return JSONResponse(render(error), status_code=error.status, headers=error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the router refuses by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {quoted(request.url.path)}: {error.detail}"
    match error.status_code:
        case 404:
            answer: ApiError = NotFound(f"{message}; GET / lists the endpoints", code="unknown_url")
        case 405:
            answer = MethodNotAllowed(message, headers=error.headers)
        case _:
            answer = InvalidRequest(message)
    return await _answer_api_error(request, answer)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    # nginx's status for a client that has gone: nobody reads it, but logs and metrics do.
    return Response(status_code=499)
