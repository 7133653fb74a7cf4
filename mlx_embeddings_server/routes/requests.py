"""What every route needs of a request: the runtime, who calls, what is his to take, and the JSON body."""

import ipaddress
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from mlx_embeddings_backends.base import Truncate
from mlx_embeddings_server.auth.caller import ANONYMOUS, Caller, check_admin
from mlx_embeddings_server.errors import BodyTooLarge, InvalidRequest, NotJson, Unavailable, quoted
from mlx_embeddings_server.request_record import current_record
from mlx_embeddings_server.routes.disconnects import DisconnectWatcher
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.schemas.spellings import EXCLUSIVE

Body = TypeVar("Body", bound=BaseModel)


def runtime_of(request: Request) -> Runtime:
    return cast("Runtime", request.app.state.runtime)


def header_of(request: Request, name: bytes) -> str | None:
    """As `request.headers` has it, at a tenth of the cost. `name` is in small letters."""
    for key, value in request.scope["headers"]:
        if key == name:
            return cast("bytes", value).decode("latin-1")
    return None


def disconnects_of(request: Request) -> DisconnectWatcher:
    return cast("DisconnectWatcher", request.app.state.disconnects)


def json_body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """For the reference at /docs, which cannot see what an endpoint reads."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def truncate_of(value: bool | Truncate | None, direction: str | None = None) -> Truncate | None:
    """A request's `truncate`, where true cuts, at the end unless the `direction` is left."""
    match value:
        case True:
            return "start" if (direction or "").lower() == "left" else "end"
        case False:
            return "none"
    return value


def caller_of(request: Request) -> Caller:
    """Whom the route has found to call: of a keyed route's requests alone."""
    if runtime_of(request).access is None:
        return ANONYMOUS
    return cast("Caller", request.scope["caller"])


async def identify(request: Request) -> Caller:
    """Raises `AuthenticationFailed`, or `Unavailable` where that cannot be told now."""
    access = runtime_of(request).access
    if access is None:
        return ANONYMOUS
    scheme, _, token = (header_of(request, b"authorization") or "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else None
    caller = request.scope["caller"] = await access.identify(bearer, header_of(request, b"x-api-key"))
    return caller


async def admin_of(request: Request) -> Caller:
    """Raises what `identify` does, and `PermissionDenied`."""
    caller = await identify(request)
    check_admin(caller)
    return caller


class KeyedRoute(APIRoute):
    """Calls its endpoint with the request and the path's parameters, once it is known who calls, and that he may.

    A POST is work, and counts for the caller's limits. FastAPI's own handler solves dependencies and reads the body
    anew for every request, which for one short text takes as long as all the rest of serving it. The endpoint's
    signature still makes the reference at /docs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        is_work = "POST" in (self.methods or ())

        async def handle(request: Request) -> Response:
            runtime = runtime_of(request)
            if runtime.access is not None:
                await identify(request)
            if is_work and runtime.rate_limits is not None:
                return await self._within_limits(request)
            return cast("Response", await self.endpoint(request, **request.path_params))

        return handle

    async def _within_limits(self, request: Request) -> Response:
        """Raises `RateLimitExceeded`."""
        limits, name = runtime_of(request).rate_limits, _limited_name(request)
        assert limits is not None
        headers = await limits.admit(name)
        try:
            response = cast("Response", await self.endpoint(request, **request.path_params))
        finally:
            record = current_record()
            assert record is not None
            headers |= await limits.charge(name, record.tokens or 0)
        response.headers.update(headers)
        return response


class AdminRoute(KeyedRoute):
    """For admins, and without limits."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            await admin_of(request)
            return cast("Response", await self.endpoint(request, **request.path_params))

        return handle


def _limited_name(request: Request) -> str:
    """A caller's name; of nobody in particular the address, as uvicorn has it of the socket or of a trusted proxy."""
    if runtime_of(request).access is not None:
        return f"user:{caller_of(request).name}"
    host = request.client.host if request.client else "local"
    if ":" in host:
        with suppress(ValueError):
            address = ipaddress.IPv6Address(host.partition("%")[0])
            # Where the socket takes both kinds, IPv4 is within IPv6. Whoever has IPv6 has a network of it.
            host = str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))
    return f"address:{host[:64]}"


async def read_json(request: Request, schema: type[Body]) -> Body:
    """The validated body. Refuses new work while the server drains, other media types, and bodies over the limit."""
    runtime = runtime_of(request)
    if runtime.draining:
        raise Unavailable("the server is shutting down", code="shutting_down")
    media_type = (header_of(request, b"content-type") or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise NotJson(f"send JSON, with the header Content-Type: application/json (it was {quoted(media_type)})")
    body = await _read_body(request, runtime.settings.max_request_bytes)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _invalid_body(error) from error


async def _read_body(request: Request, limit: int) -> bytes:
    announced = header_of(request, b"content-length") or ""
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> BodyTooLarge:
    # What is left of the body is not read: the connection has to go.
    return BodyTooLarge(
        f"the body is larger than {limit} bytes: send several smaller requests", headers={"Connection": "close"}
    )


def _invalid_body(error: ValidationError) -> InvalidRequest:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == EXCLUSIVE:
        return InvalidRequest(first["msg"], param=first["ctx"]["other"], code="invalid_value")
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object", code="invalid_json")
    param = str(first["loc"][0])
    name = ".".join(map(str, first["loc"][:2])) if param == "options" else param  # the only one with fields of its own
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{quoted(name)} is not known here", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is missing", param=param, code="missing_required_parameter")
    # A field of several types has one error for each.
    depth = 2 if param == "options" else 1
    reasons = dict.fromkeys(each["msg"] for each in error.errors() if each["loc"][:depth] == first["loc"][:depth])
    return InvalidRequest(f"{name}: {', or '.join(reasons)}", param=param, code="invalid_value")
