"""Around every request: its id, its count and time, the log, and the guard. Plain ASGI, for speed."""

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_embeddings_server.errors import InternalError
from mlx_embeddings_server.logs import without_words
from mlx_embeddings_server.request_record import RequestRecord, recording
from mlx_embeddings_server.routes.dialects import error_body
from mlx_embeddings_server.runtime import Runtime

log = logging.getLogger(__name__)
access_log = logging.getLogger("mlx_embeddings_server.access")

OTHER_METHOD = "other"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestMiddleware:
    """Gives `X-Request-Id` to every reply, the caller's own where it is sane."""

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app = app
        self.runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope["request_id"] = _request_id(scope)
        record = RequestRecord(request_id.decode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id))
            await send(message)

        self.runtime.in_flight += 1
        with recording(record):
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                self.runtime.in_flight -= 1
                self._record(scope, scope.get("status", 0), time.perf_counter() - started, record)

    def _record(self, scope: Scope, status: int, seconds: float, record: RequestRecord) -> None:
        # The route's pattern, never the path, and known methods: metrics must not grow with what callers type, nor the
        # log have it.
        route = getattr(scope.get("route"), "path", "none")
        method = known_method(scope)
        self.runtime.metrics.observe_request(route, method, status, seconds)
        if self.runtime.settings.access_log:
            _log_access(route, method, status, seconds, record, getattr(scope.get("caller"), "name", None))


class GuardMiddleware:
    """Answers 500 to what nobody foresaw: all else has become a reply further in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            quiet = without_words(error)
            log.error("unexpected error, request %s", scope["request_id"].decode(), exc_info=quiet)
            if "status" in scope:  # too late for another reply: the connection ends here
                raise quiet from None
            await _send_internal_error(scope, send)


def known_method(scope: Mapping[str, Any]) -> str:
    return scope["method"] if scope["method"] in _METHODS else OTHER_METHOD


def _log_access(
    route: str, method: str, status: int, seconds: float, record: RequestRecord, caller: str | None
) -> None:
    milliseconds = round(seconds * 1000, 1)
    counts = {"inputs": record.inputs, "tokens": record.tokens, "caller": caller}
    what = "".join(f" {name}={value!r}" for name, value in counts.items() if value is not None)
    if record.model is not None:
        what = f" {record.model}{what}"
    access_log.info(
        "%s %s %d %.1f ms%s %s",
        method, route, status, milliseconds, what, record.id,
        extra={
            "method": method, "route": route, "status": status, "duration_ms": milliseconds, "caller": caller,
            "model": record.model, "inputs": record.inputs, "tokens": record.tokens,
        },
    )  # fmt: skip


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return os.urandom(16).hex().encode()


async def _send_internal_error(scope: Scope, send: Send) -> None:
    error = InternalError("an unexpected error: the server's log has it, under the request's id")
    body = orjson.dumps(error_body(scope, error))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
