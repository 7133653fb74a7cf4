"""OpenTelemetry: spans to a collector over OTLP/HTTP, configured by the standard's own variables (the extra `otel`).

Spans hold names, counts and times, and what a socket and a user agent say; never inputs, paths, queries or what
exceptions say, which may have inputs in them.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_embeddings_server import __version__
from mlx_embeddings_server.middleware import OTHER_METHOD, known_method
from mlx_embeddings_server.request_record import current_record
from mlx_embeddings_server.tracing import INPUTS, Value, traced_by

log = logging.getLogger(__name__)

_NAME: Final = "mlx-embeddings-server"
# Values of what is traced in any case, should somebody have headers put into spans.
_SECRET_HEADERS: Final = [".*authorization.*", ".*api-?key.*", ".*token.*", ".*cookie.*"]
# What probes ask for every few seconds.
_UNTRACED: Final = frozenset(("/health", "/livez", "/readyz", "/metrics"))
# They tell every failure of every batch, and every span that finds the queue full.
_TALKATIVE: Final = ("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk._shared_internal")


class OpenTelemetry:
    """A tracer of its own: the process's global one, which others may set, is left alone."""

    def __init__(self) -> None:
        """Raises `ValueError` for a variable that asks for what is not here."""
        _check_variables()
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # The names of attributes that the standard has settled on, unless someone says otherwise.
        os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._exporter = _Exporter(OTLPSpanExporter())
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(_NAME, __version__)
        # Baggage, which callers send too, is not told to other servers.
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Value], *, is_client: bool) -> Iterator["_Span"]:
        kind = SpanKind.CLIENT if is_client else SpanKind.INTERNAL
        with self._tracer.start_as_current_span(
            name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            headers: dict[str, str] = {}
            if is_client:
                self._propagator.inject(headers)
            try:
                yield _Span(span, headers)
            except BaseException as error:
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", type(error).__name__)
                raise

    def stages(self, seconds: Mapping[str, float]) -> None:
        end = time.time_ns()
        start = end - sum(map(_nanoseconds, seconds.values()))
        for name, length in seconds.items():
            span = self._tracer.start_span(name, start_time=start)
            start += _nanoseconds(length)
            span.end(start)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Starts a server span for each request, as a part of the trace that its headers name."""
        return _Traced(app, self)

    def middleware(self, app: ASGIApp) -> OpenTelemetryMiddleware:
        return OpenTelemetryMiddleware(
            app,
            default_span_details=lambda scope: (_method(scope), {}),  # the route is not known yet
            tracer_provider=self._provider,
            meter_provider=NoOpMeterProvider(),
            http_capture_headers_sanitize_fields=_SECRET_HEADERS,
            exclude_spans=["receive", "send"],
        )

    def close(self, timeout: float) -> None:
        """Deliver what is left, in so many seconds at most."""
        # It waits for the exporter for up to half a minute: not here.
        closing = threading.Thread(target=self._provider.shutdown, name="otel-shutdown", daemon=True)
        closing.start()
        closing.join(timeout)
        if closing.is_alive():
            self._exporter.shutdown()  # it may be pausing before it tries again


class _Span:
    def __init__(self, span: Span, headers: Mapping[str, str]) -> None:
        self._span = span
        self.headers = headers

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)


class _Traced:
    """OpenTelemetry's own middleware makes the server span. It is shown no path, query or exception."""

    def __init__(self, app: ASGIApp, telemetry: OpenTelemetry) -> None:
        self._app = app
        self._telemetry = telemetry
        self._traced = telemetry.middleware(self._inner)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        shown = {**scope, "path": "", "raw_path": b"", "query_string": b"", "method": _method(scope)}
        shown["whole"], shown["failures"] = scope, []
        await self._traced(shown, receive, send)
        for error in shown["failures"]:
            raise error

    async def _inner(self, shown: Scope, receive: Receive, send: Send) -> None:
        scope: Scope = shown["whole"]
        span = trace.get_current_span()
        record = current_record()
        if record is not None:
            record.trace_id = trace.format_trace_id(span.get_span_context().trace_id)

        async def send_described(message: Message) -> None:
            if message["type"] == "http.response.start":
                _describe(span, scope)
            await send(message)

        try:
            with traced_by(self._telemetry):
                await self._app(scope, receive, send_described)
        except Exception as error:  # it is raised further out: what it says would get into the span
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", type(error).__name__)
            shown["failures"].append(error)


def _describe(span: Span, scope: Scope) -> None:
    """What is known once there is a reply."""
    if (route := getattr(scope.get("route"), "path", None)) is not None:
        span.update_name(f"{_method(scope)} {route}")
        span.set_attribute("http.route", route)
    record = current_record()
    if record is None:
        return
    span.set_attribute("mlx_embeddings.request_id", record.id)
    if record.model is not None and record.inputs is not None:
        span.set_attribute("gen_ai.request.model", record.model)
        span.set_attribute(INPUTS, record.inputs)
    if record.tokens is not None:
        span.set_attribute("gen_ai.usage.input_tokens", record.tokens)


class _Exporter(SpanExporter):
    """Says once that the collector takes nothing, and once that it does again."""

    def __init__(self, exporter: OTLPSpanExporter) -> None:
        self._exporter = exporter
        self._is_away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS and self._is_away:
            self._is_away = False
            log.info("the collector takes traces again")
        elif result is not SpanExportResult.SUCCESS and not self._is_away:
            self._is_away = True
            log.warning("the collector takes no traces: they are dropped until it does (OTEL_EXPORTER_OTLP_ENDPOINT)")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _check_variables() -> None:
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable)
        if protocol not in (None, "", "http/protobuf"):
            raise ValueError(f"{variable} is {protocol}: traces are sent by http/protobuf alone")
    exporter = os.environ.get("OTEL_TRACES_EXPORTER")
    if exporter not in (None, "", "otlp"):
        raise ValueError(f"OTEL_TRACES_EXPORTER is {exporter}: traces are sent by otlp alone; drop --otel for none")


def _resource() -> Resource:
    """What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, and our name where they say none."""
    found = Resource.create({SERVICE_VERSION: __version__})
    if str(found.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: _NAME}))
    return found


def _method(scope: Mapping[str, Any]) -> str:
    return method if (method := known_method(scope)) != OTHER_METHOD else "HTTP"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
