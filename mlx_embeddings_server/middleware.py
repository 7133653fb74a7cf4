"""Around every request: its id, its count and time, the log, and the outermost guard. Plain ASGI, for speed."""

import logging
import os
import re
import time

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_embeddings_server.errors import InternalError, openai_body
from mlx_embeddings_server.runtime import Runtime

log = logging.getLogger(__name__)
access_log = logging.getLogger("mlx_embeddings_server.access")

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
        request_id = _request_id(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id))
            await send(message)

        self.runtime.in_flight += 1
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:  # the outermost guard: whatever was foreseen has become a reply further in
            log.exception("unexpected error, request %s", request_id.decode())
            if status:  # too late for another reply: the connection ends here
                raise
            await _send_internal_error(send_with_id)
        finally:
            self.runtime.in_flight -= 1
            self._record(scope, status, time.perf_counter() - started, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: bytes) -> None:
        # The route's pattern, never the path, and known methods: metrics must not grow with what callers type.
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        metrics = self.runtime.metrics
        metrics.requests.labels(route, method, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if self.runtime.settings.access_log:
            access_log.info(
                "%s %s %d %.1f ms %s", scope["method"], scope["path"], status, seconds * 1000, request_id.decode()
            )


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return os.urandom(16).hex().encode()


async def _send_internal_error(send: Send) -> None:
    body = orjson.dumps(
        openai_body(InternalError("an unexpected error: the server's log has it, under the request's id"))
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
