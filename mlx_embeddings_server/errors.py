"""The error tree: each error carries its status, type and code; one renderer a dialect turns it into a body."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


class ApiError(Exception):
    """Base of all errors that a caller sees. The message says what was wrong, where, and what to do."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        details: Sequence[Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.details = details
        self.headers = dict(headers or {})


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class InvalidInput(InvalidRequest):
    """`where` is the input's place in the request, such as `input[3].text`."""

    def __init__(
        self, where: str, message: str, *, code: str, details: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__(f"{where} {message}", param=re.split(r"[.\[]", where)[0], code=code, details=details)


class AuthenticationFailed(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(ApiError):
    status = 403
    type = "permission_error"
    code = "admin_required"


class NotFound(ApiError):
    status = 404
    type = "not_found_error"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class NotJson(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class Overloaded(ApiError):
    """A queue is full, here or at a provider. Nothing was computed; there may be room after `Retry-After` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int, code: str | None = None) -> None:
        super().__init__(message, code=code, headers={"Retry-After": str(retry_after)})


class RateLimitExceeded(ApiError):
    """The caller has had what is his of this minute. `headers` has Retry-After."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InternalError(ApiError):
    code = "internal_error"


class BadGateway(ApiError):
    """Another server, which has the model, cannot do its part, and will not by itself."""

    status = 502
    type = "server_error"
    code = "provider_failed"


class Unavailable(ApiError):
    status = 503
    type = "server_error"
    code = "unavailable"


def quoted(text: str) -> str:
    """What a caller sent, for a message: no longer than a line."""
    return repr(text if len(text) <= 100 else text[:100] + "...")


def openai_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's shape; `details` only where there are some."""
    body: dict[str, Any] = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if error.details is not None:
        body["details"] = error.details
    return {"error": body}


def tldw_body(error: ApiError) -> dict[str, Any]:
    """The tldw server's shapes: one for inputs that are too long, FastAPI's for all else, with our `code` beside it."""
    if error.code == "input_too_long":
        return {"error": error.code, "message": error.message, "details": error.details or []}
    body: dict[str, Any] = {"detail": error.message, "code": error.code}
    return body if error.details is None else body | {"details": error.details}


def embed_body(error: ApiError) -> dict[str, Any]:
    """For POST /embed: TEI's keys, and FastAPI's `detail`, which the OpenCLIP service has."""
    kind = {429: "Overloaded", 500: "Backend", 503: "Unhealthy"}.get(error.status, "Validation")
    return {"error": error.message, "error_type": kind, "detail": error.message}
