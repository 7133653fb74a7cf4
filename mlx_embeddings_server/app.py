"""create_app(): wiring, lifespan and error handlers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response, Security
from fastapi.params import Depends
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from mlx_embeddings_backends import detect
from mlx_embeddings_server import __version__
from mlx_embeddings_server.auth.access import access_of
from mlx_embeddings_server.auth.caller import Access
from mlx_embeddings_server.cache.memory import MemoryLayer
from mlx_embeddings_server.cache.result_cache import ResultCache
from mlx_embeddings_server.cache.shared import SharedLayer, UnusableStore, open_store
from mlx_embeddings_server.collection_service import CollectionService, open_collections
from mlx_embeddings_server.errors import (
    ApiError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    quoted,
)
from mlx_embeddings_server.inputs.images import ImageLoader
from mlx_embeddings_server.inputs.token_encoding import TokenDecoder, is_known_encoding, known_encodings
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.middleware import GuardMiddleware, RequestMiddleware
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.ranking import RankingService
from mlx_embeddings_server.routes import (
    admin,
    embed,
    health,
    openai,
    reembed,
    rerank,
    sparse,
    tldw,
    tldw_admin,
    unified,
)
from mlx_embeddings_server.routes import collections as collection_routes
from mlx_embeddings_server.routes.dialects import error_body
from mlx_embeddings_server.routes.disconnects import ClientGone, DisconnectWatcher
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.served_model import Load
from mlx_embeddings_server.service import EmbeddingService
from mlx_embeddings_server.setting_combinations import check_combinations, limits_rates
from mlx_embeddings_server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from mlx_embeddings_server.jobs.reembed_jobs import ReembedJobs
    from mlx_embeddings_server.otel import OpenTelemetry
    from mlx_embeddings_server.ratelimit import RateLimits

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# Headers of replies that a page of another origin may read.
_EXPOSED = (
    "X-Request-Id",
    "Server-Timing",
    "Retry-After",
    "WWW-Authenticate",
    "X-RateLimit-Limit-Requests",
    "X-RateLimit-Remaining-Requests",
    "X-RateLimit-Limit-Tokens",
    "X-RateLimit-Remaining-Tokens",
    "X-Embeddings-Provider",
    "X-Embeddings-Fallback-From",
    "X-Embeddings-Dimensions-Policy",
    "X-Embeddings-Truncated",
    "X-Embeddings-Shape",
    "X-Embeddings-Prompt-Tokens",
    "X-Embeddings-Patches",
)

# Seconds for the batches that run to end: Python aborts when it exits under a thread that is in native code.
_LAST_BATCH_TIMEOUT = 2
# Seconds that the collector of traces has for the last ones.
_LAST_SPANS_TIMEOUT = 2


def create_app(settings: Settings, *, load: Load = detect.load, preloads: bool = True) -> FastAPI:
    """The server as an ASGI app. Models are found here, and the pinned ones loaded at the latest when the app starts.

    Raises `SettingsError`, or `ModelError` for a model that is not to be had. `load` makes a backend of a checkpoint.
    Where it does not preload, all models are loaded when they are asked for.
    """
    if not settings.names_a_model:
        raise SettingsError("no model was named: give --model, or set MLX_EMBEDDINGS_MODEL")
    check_combinations(settings)
    access, rate_limits = access_of(settings), _rate_limits(settings)  # before anything is downloaded
    telemetry = _telemetry(settings)
    metrics = Metrics()
    image_loader = ImageLoader(
        allow_private=settings.allow_private_image_urls, max_total_bytes=settings.max_request_bytes
    )
    service = EmbeddingService(
        metrics,
        dimensions_policy=settings.dimensions_policy,
        token_decoder=token_decoder_of(settings),
        image_loader=image_loader,
        cache=_result_cache(settings, metrics),
    )
    disconnects = DisconnectWatcher()
    models = Models(settings, metrics, load)
    collections = _collections(settings, models, service, access)
    runtime = Runtime(
        settings,
        models,
        metrics,
        service,
        RankingService(service),
        access=access,
        rate_limits=rate_limits,
        collections=collections,
        reembed_jobs=_reembed_jobs(settings, models, collections),
    )
    _watch(runtime)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if preloads:
            await asyncio.to_thread(runtime.models.load)
        tasks = [asyncio.create_task(disconnects.run()), asyncio.create_task(runtime.models.unload_idle())]
        if service.cache is not None:
            tasks.append(asyncio.create_task(service.cache.clean()))
        if runtime.collections is not None:
            tasks.append(asyncio.create_task(runtime.collections.watch()))
        if runtime.reembed_jobs is not None:
            await runtime.reembed_jobs.start()
        yield
        runtime.draining = True
        if runtime.reembed_jobs is not None:
            await runtime.reembed_jobs.aclose()
        for task in tasks:
            task.cancel()
        await image_loader.aclose()
        await runtime.models.aclose()
        if runtime.rate_limits is not None:
            await runtime.rate_limits.aclose()
        if service.cache is not None:
            await service.cache.aclose()
        if runtime.collections is not None:
            await runtime.collections.aclose()
        await asyncio.to_thread(runtime.models.close, _LAST_BATCH_TIMEOUT)
        if telemetry is not None:
            await asyncio.to_thread(telemetry.close, _LAST_SPANS_TIMEOUT)

    app = FastAPI(
        title="mlx-embeddings-server",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        # Off: looking for OpenTelemetry's providers takes 0.02 ms a request. otel.py does it where it is asked for.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.runtime = runtime
    app.state.disconnects = disconnects
    # The last that is added is the outermost: it gives its id to preflights too, and those who may read an error's
    # headers are told by CORS.
    app.add_middleware(GuardMiddleware)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=_METHODS,
            allow_headers=("*",),  # OpenAI's client sends a dozen of its own
            expose_headers=_EXPOSED,
        )
    if telemetry is not None:
        app.add_middleware(telemetry.around)
    app.add_middleware(RequestMiddleware, runtime=runtime)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)  # it left before its body was here
    # Looked through in this order: what is asked most comes first. The paths of tldw_admin's downloads come before
    # tldw's models, whose names may have any form.
    keyed = (openai, embed, rerank, sparse, unified, tldw_admin, tldw, collection_routes, reembed, admin)
    for routes in keyed:
        app.include_router(routes.router, dependencies=_shown_at_docs(access))
    app.include_router(health.router)
    return app


def _shown_at_docs(access: Access | None) -> list[Depends]:
    """Where a key or token is typed in there. Keyed routes look at requests by themselves, and leave these aside."""
    if access is None:
        return []
    bearer = Security(HTTPBearer(auto_error=False))
    return [bearer, Security(APIKeyHeader(name="X-API-Key", auto_error=False))] if access.takes_api_key else [bearer]


def _watch(runtime: Runtime) -> None:
    """What others count, and metrics show."""
    metrics = runtime.metrics
    metrics.watch_in_flight(lambda: runtime.in_flight)
    if runtime.rate_limits is not None:
        metrics.watch_rate_limits(runtime.rate_limits.refused)
    if providers := runtime.models.providers:
        metrics.watch_circuits([endpoint.circuit for endpoint in providers.values()])
    if runtime.reembed_jobs is not None:
        metrics.watch_jobs(runtime.reembed_jobs.totals)


def _telemetry(settings: Settings) -> "OpenTelemetry | None":
    """Raises `SettingsError`."""
    if not settings.otel:
        return None
    try:
        from mlx_embeddings_server.otel import OpenTelemetry
    except ImportError as error:
        raise SettingsError(
            "--otel needs OpenTelemetry: install it with `uv sync --extra otel`, or `pip install "
            "'mlx-embeddings-server[otel]'`"
        ) from error
    try:
        return OpenTelemetry()
    except ValueError as error:
        raise SettingsError(f"--otel: {error}") from error


def _result_cache(settings: Settings, metrics: Metrics) -> ResultCache | None:
    if not settings.cache:
        return None
    shared = None
    if settings.cache_url is not None:
        url = settings.cache_url.get_secret_value()
        try:
            shared = SharedLayer(open_store(url, ttl=settings.cache_ttl, disk_bytes=settings.cache_disk_bytes))
        except UnusableStore as error:
            raise SettingsError(f"--cache-url: {error}") from error
    memory = MemoryLayer(entries=settings.cache_entries, max_bytes=settings.cache_bytes, ttl=settings.cache_ttl)
    cache = ResultCache(memory, shared)
    metrics.watch_cache(cache.stats)
    return cache


def _collections(
    settings: Settings, models: Models, service: EmbeddingService, access: Access | None
) -> CollectionService | None:
    """None where there are none. Raises `SettingsError`."""
    if settings.collections is None:
        return None
    return open_collections(settings, models, service, access)


def _reembed_jobs(settings: Settings, models: Models, collections: "CollectionService | None") -> "ReembedJobs | None":
    """None where there are no collections. Raises `SettingsError`."""
    if collections is None:
        return None
    # Only now: huey takes a tenth of a second to import.
    from mlx_embeddings_server.jobs.reembed_jobs import open_jobs

    return open_jobs(settings, collections, models)


def _rate_limits(settings: Settings) -> "RateLimits | None":
    """None where there are none. Raises `SettingsError`."""
    if not limits_rates(settings):
        return None
    # Only now: it takes a tenth of a second to import.
    from mlx_embeddings_server.ratelimit import DEFAULT_REQUESTS, DEFAULT_TOKENS, Counters, RateLimits, RedisCounters

    shared = None
    if settings.rate_limit_storage is not None:
        try:
            shared = RedisCounters(settings.rate_limit_storage.get_secret_value())
        except ImportError as error:
            raise SettingsError(
                "--rate-limit-storage needs redis: install it with `uv sync --extra redis`, or `pip install redis`"
            ) from error
        except ValueError as error:
            raise SettingsError("--rate-limit-storage: must be such as redis://HOST:PORT/0") from error
    requests, tokens = settings.rate_limit_requests, settings.rate_limit_tokens
    if settings.rate_limit:  # what is not said otherwise
        requests = DEFAULT_REQUESTS if requests is None else requests
        tokens = DEFAULT_TOKENS if tokens is None else tokens
    return RateLimits(Counters(shared), requests=requests or 0, tokens=tokens or 0)


def token_decoder_of(settings: Settings) -> TokenDecoder | None:
    """Raises `SettingsError`."""
    name = settings.token_encoding
    if name == "native":
        return None
    if not is_known_encoding(name):
        raise SettingsError(f"--token-encoding {name}: known are native, {', '.join(known_encodings())}")
    return TokenDecoder(name)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error_body(request.scope, error), status_code=error.status, headers=error.headers)


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
