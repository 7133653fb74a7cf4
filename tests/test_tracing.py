"""Traces, as a collector gets them: OTLP over HTTP, decoded by OpenTelemetry's own protobuf."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from tests.cached import until
from tests.scripted import scripted_server
from tests.server import Server
from tests.upstream import always, good, providers_server, upstream

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra otel is not installed"
)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "baggage": "person=baggage-of-the-client"}
SECRET = "secret-of-the-caller"
otel = pytest.importorskip("mlx_embeddings_server.otel", reason="the extra otel is not installed")
_KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True)
class Span:
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    events: int
    attributes: Mapping[str, str | int]


@dataclass
class Collector:
    """What it got: spans, the resources that they came from, and the raw bytes."""

    url: str
    spans: list[Span] = field(default_factory=list)
    resources: list[Mapping[str, str | int]] = field(default_factory=list)
    raw: bytes = b""
    delay: float = 0.0  # seconds before it answers

    def take(self, body: bytes) -> None:
        self.raw += body
        for of_resource in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(_values(of_resource.resource.attributes))
            self.spans += [_span(each) for scope in of_resource.scope_spans for each in scope.spans]

    def named(self, name: str) -> Span:
        [found] = [each for each in self.spans if each.name == name]
        return found


def _values(attributes: Any) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in attributes}


def _span(span: Any) -> Span:
    return Span(
        span.name,
        _KINDS[span.kind],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        len(span.events),
        _values(span.attributes),
    )


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(collector.delay)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def to(collector: Collector | str) -> dict[str, str]:
    """The variables of a traced server."""
    url = collector if isinstance(collector, str) else collector.url
    return {"MLX_EMBEDDINGS_OTEL": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


def traced_toy(
    folder: Path, collector: Collector | str, environment: Mapping[str, str] | None = None, **settings: Any
) -> Server:
    server = scripted_server(folder, **settings)
    server.environment |= {**to(collector), **(environment or {})}
    return server


def embed(server: Server, *texts: str, **headers: str) -> httpx.Response:
    return server.client.post("/v1/embeddings", json={"model": "toy", "input": list(texts)}, headers=headers)


def test_a_request_is_a_trace_of_its_stages(tmp_path: Path) -> None:
    with collecting() as collector, traced_toy(tmp_path, collector) as server:
        reply = embed(server, "one two", "work 0.2", **FROM_CLIENT)
        until(lambda: len(collector.spans) >= 4)

        top = collector.named("POST /v1/embeddings")
        assert (top.kind, top.trace, top.parent, top.failed) == ("server", TRACE, PARENT, False)
        assert top.attributes.items() >= {
            "http.request.method": "POST", "http.route": "/v1/embeddings", "http.response.status_code": 200,
            "gen_ai.request.model": "toy", "gen_ai.usage.input_tokens": 4, "mlx_embeddings.inputs": 2,
            "mlx_embeddings.request_id": reply.headers["x-request-id"],
        }.items()  # fmt: skip
        stages = [collector.named(name) for name in ("tokenize", "queue", "inference")]
        assert all((each.trace, each.parent, each.kind) == (TRACE, top.id, "internal") for each in stages)
        assert [top.start <= stages[0].start, stages[-1].end <= top.end] == [True, True]
        assert all(before.end == after.start for before, after in zip(stages, stages[1:], strict=False))
        assert 0.2e9 <= stages[-1].end - stages[-1].start < 5e9
        assert all(each.items() >= {"service.name": "mlx-embeddings-server"}.items() for each in collector.resources)


def test_the_standards_variables_hold(tmp_path: Path) -> None:
    names = {"OTEL_SERVICE_NAME": "search", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    with collecting() as collector, traced_toy(tmp_path, collector, environment=names) as server:
        embed(server, "one")
        until(lambda: bool(collector.spans))
        assert collector.resources[0].items() >= {"service.name": "search", "deployment.environment": "test"}.items()
    unsampled = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    (tmp_path / "second").mkdir()
    with collecting() as collector, traced_toy(tmp_path / "second", collector, environment=unsampled) as server:
        embed(server, "one")
        embed(server, "one", **FROM_CLIENT)
        until(lambda: bool(collector.spans))
        server.stop()
        assert {each.trace for each in collector.spans} == {TRACE}


def test_nothing_that_a_caller_sends_is_in_a_trace(tmp_path: Path) -> None:
    everything = {
        "MLX_EMBEDDINGS_API_KEY": SECRET,
        "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST": "authorization,x-api-key,cookie,content-type",
    }
    with collecting() as collector, traced_toy(tmp_path, collector, environment=everything) as server:
        headers = {"Authorization": f"Bearer {SECRET}", "Cookie": SECRET}
        url = f"http://{SECRET}:{SECRET}@127.0.0.1/{SECRET}.png"
        for input in (SECRET, f"fail {SECRET}", f"nan {SECRET}", {SECRET: 1}, {"image": url}, url):
            server.client.post(f"/v1/embeddings?key={SECRET}", json={"model": "toy", "input": input}, headers=headers)
        for path in (f"/{SECRET}", f"/v1/models/{SECRET}?{SECRET}"):
            server.client.get(path, headers=headers)
        server.client.request(SECRET.upper().replace("-", ""), "/", headers=headers)
        server.stop()

        assert {each.name for each in collector.spans} >= {"POST /v1/embeddings", "GET", "GET /v1/models/{name:path}"}
        assert all(each in collector.raw for each in (b"application/json", b"[REDACTED]"))  # headers were captured
        assert SECRET.encode() not in collector.raw and SECRET.upper().encode() not in collector.raw
        assert {each.failed for each in collector.spans if each.attributes.get("http.response.status_code") == 500} == {
            True
        }


def test_what_breaks_off_a_reply_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError(SECRET)

    async def ignore(*message: object) -> Message:
        return {}

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": None, "server": ("a", 1)}
    with collecting() as collector:
        for name, value in to(collector).items():
            monkeypatch.setenv(name, value)
        telemetry = otel.OpenTelemetry()
        with pytest.raises(KeyError, match=SECRET):
            asyncio.run(telemetry.around(app)(scope, ignore, ignore))
        telemetry.close(10)

        [span] = collector.spans
        assert (span.failed, span.events, span.attributes["error.type"]) == (True, 0, "KeyError")
        assert SECRET.encode() not in collector.raw


def test_probes_are_not_traced(tmp_path: Path) -> None:
    with collecting() as collector, traced_toy(tmp_path, collector) as server:
        for path in ("/health", "/livez", "/readyz", "/metrics", "/v1/models"):
            assert server.client.get(path).status_code == 200
        server.stop()
        assert [each.name for each in collector.spans] == ["GET /v1/models"]


def test_the_trace_goes_on_at_a_provider(tmp_path: Path) -> None:
    pages = {"up": good, "down": always({}, 500)}
    with collecting() as collector, upstream(pages) as there:
        providers = {name: {"url": f"{there.url}/{name}/v1", "retries": 0} for name in pages}
        models: dict[str, dict[str, Any]] = {name: {"name": "m", "provider": name, "dimensions": 8} for name in pages}
        models["down"]["fallback"] = ["up"]
        with providers_server(tmp_path, providers, models, environment=to(collector)) as server:
            body = {"model": "down", "input": ["a", "b"]}
            reply = server.client.post("/v1/embeddings", json=body, headers=FROM_CLIENT)
            assert reply.status_code == 200, reply.text
            server.stop()

        top, failed, call = map(collector.named, ("POST /v1/embeddings", "embeddings down", "embeddings up"))
        assert all((each.kind, each.trace, each.parent) == ("client", TRACE, top.id) for each in (failed, call))
        assert call.attributes.items() >= {"http.response.status_code": 200, "mlx_embeddings.inputs": 2}.items()
        assert (failed.failed, failed.attributes["error.type"], call.failed) == (True, "ProviderFailed", False)
        assert failed.events == 0  # which would tell what the exception says
        sent = {name.lower(): value for name, value in there.headers["up"].items()}
        assert sent["traceparent"] == f"00-{TRACE}-{call.id}-01"
        assert "baggage" not in sent
        assert top.attributes["gen_ai.request.model"] == "up"


def test_looking_into_the_cache_is_a_span(tmp_path: Path) -> None:
    with collecting() as collector, traced_toy(tmp_path, collector, cache=True) as server:
        embed(server, "one", "two")
        embed(server, "one", "three", "two")
        server.stop()

        looks = [each for each in collector.spans if each.name == "cache lookup"]
        assert [each.attributes["cache.hits"] for each in sorted(looks, key=lambda each: each.start)] == [0, 2]
        assert all(each.attributes["cache.layer"] == "memory" for each in looks)


def test_what_is_left_is_delivered_at_the_end(tmp_path: Path) -> None:
    slow = {"OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with collecting() as collector, traced_toy(tmp_path, collector, environment=slow) as server:
        embed(server, "one")
        assert collector.spans == []
        assert server.stop() == 0
        assert len(collector.spans) == 4


@pytest.mark.parametrize("is_there", [False, True], ids=["nobody listens", "it never answers"])
def test_a_collector_that_is_away_delays_nobody(tmp_path: Path, is_there: bool) -> None:
    with collecting() as collector:
        collector.delay = 60
        url = collector.url if is_there else "http://127.0.0.1:9"
        impatient = {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
        with traced_toy(tmp_path, url, environment={**impatient, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}) as server:
            embed(server, "first")
            times = []
            for count in range(60):
                started = time.monotonic()
                assert embed(server, f"text {count}").status_code == 200
                times.append(time.monotonic() - started)
            assert sorted(times)[len(times) // 2] < 0.25
            server.wait_for_log("WARNING the collector takes no traces")
            assert server.log.count("collector") == 1 and "Traceback" not in server.log
            started = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - started < 10


def test_the_log_names_the_trace(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"log_format": "json", "access_log": True}
    with collecting() as collector, traced_toy(tmp_path, collector, **settings) as server:
        embed(server, "one", **FROM_CLIENT)
        server.wait_for_log(f'"trace_id":"{TRACE}"')


def test_without_the_setting_nothing_of_it_is_imported_or_sent(tmp_path: Path) -> None:
    off = {"MLX_EMBEDDINGS_OTEL": ""}
    with collecting() as collector, traced_toy(tmp_path, collector, environment=off) as server:
        embed(server, "one", **FROM_CLIENT)
        assert server.stop() == 0
        assert collector.raw == b""
    script = "import sys, mlx_embeddings_server.serve; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    imported = done.stdout.split()
    assert "mlx_embeddings_server.app" in imported
    assert not {"opentelemetry.sdk", "opentelemetry.instrumentation", "opentelemetry.exporter"}.intersection(imported)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("sys.modules['opentelemetry.sdk'] = None", "uv sync --extra otel"),
        ("os.environ['OTEL_EXPORTER_OTLP_PROTOCOL'] = 'grpc'", "OTEL_EXPORTER_OTLP_PROTOCOL is grpc"),
        ("os.environ['OTEL_TRACES_EXPORTER'] = 'zipkin'", "OTEL_TRACES_EXPORTER is zipkin"),
    ],
)
def test_what_cannot_be_had_is_told_at_the_start(script: str, said: str) -> None:
    flags = ["--model", "no/such-model", "--otel", "--port", "0"]
    code = f"import os, sys; {script}; from mlx_embeddings_server.main import main; main({flags})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
