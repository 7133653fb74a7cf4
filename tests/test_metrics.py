"""What /metrics tells of a server that has served all kinds of traffic, and the dashboard that shows it."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlx_embeddings_server.engine.worker import BatchStats
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.ratelimit import Counters, RateLimits
from tests.jobs import schedule, until
from tests.scripted import scripted_server
from tests.server import Server
from tests.upstream import always, good, providers_server, upstream

EXAMPLE = Path(__file__).parents[1] / "examples" / "grafana"
DASHBOARD = json.loads((EXAMPLE / "dashboard.json").read_text())
QUERIES = sorted({target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())})
# What Grafana fills in.
FILLED = {"$__rate_interval": "5m", "$instance": ".*", "$model": ".*", "$route": ".*"}
Labels = Mapping[str, str]


def samples(server: Server) -> dict[str, list[tuple[Labels, float]]]:
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(server: Server, name: str, **labels: str) -> float:
    """Of all that have the labels."""
    found = samples(server)[f"mlx_embeddings_{name}"]
    return sum(number for of_sample, number in found if labels.items() <= of_sample.items())


def embed_anew(client: httpx.Client) -> None:
    """A job of two documents."""
    client.post("/v1/collections", json={"name": "notes", "embedding_model": "toy"}).raise_for_status()
    client.post("/v1/collections/notes/documents", json={"documents": ["a", "b"]}).raise_for_status()
    until(client, schedule(client, collection="notes", embedder_version="toy"), "completed")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with all that can be counted, after traffic of every kind."""
    folder = tmp_path_factory.mktemp("busy")
    pages = {"up": good, "down": always({}, 500)}
    with upstream(pages) as there:
        providers = {name: {"url": f"{there.url}/{name}/v1", "retries": 0, "failure_threshold": 2} for name in pages}
        models: dict[str, dict[str, Any]] = {name: {"name": "m", "provider": name, "dimensions": 8} for name in pages}
        models["down"]["fallback"] = ["up"]
        settings: dict[str, Any] = {"cache": True, "cache_url": f"file://{folder / 'cache'}", "rate_limit_tokens": 90}
        settings |= {"collections": "chroma", "collections_path": str(folder / "kept"), "reembed_worker": True}
        with providers_server(folder, providers, models, **settings) as server:
            embed_anew(server.client)
            for text in ("one", "two words", "one", "fail here"):
                server.embed([text, "work 0.01", "a longer text than the others are"], "toy")
            for text in ("a", "b", "c"):
                server.embed(text, "down")
            server.embed("text", "unknown")
            for _ in range(2):
                server.embed(["more and more words"] * 20, "toy")
                server.embed(f"as many words as one may have in a minute {'word ' * 80}", "toy")
            server.client.post("/v1/models/toy/unload")
            server.client.get("/health")
            yield server


def test_requests_are_counted_by_route_method_and_status(busy: Server) -> None:
    route = {"route": "/v1/embeddings", "method": "POST"}
    counts = {status: value(busy, "requests_total", status=status, **route) for status in ("200", "404", "429", "500")}
    assert counts["200"] >= 7 and counts["404"] == counts["500"] == 1 and counts["429"] >= 1
    assert value(busy, "request_seconds_count", route="/v1/embeddings") == sum(counts.values())
    assert value(busy, "requests_in_flight") == 1  # this one
    assert value(busy, "rate_limited_requests_total", limit="tokens") == counts["429"]
    assert value(busy, "rate_limited_requests_total", limit="requests") == 0


def test_what_goes_to_providers_is_counted(busy: Server) -> None:
    assert value(busy, "provider_request_seconds_count", provider="down", result="failed") >= 2
    assert value(busy, "provider_request_seconds_count", provider="up", result="ok") == 3
    assert value(busy, "fallbacks_total", model="down", answered_by="up") == 3
    states = {labels["state"]: number for labels, number in samples(busy)["mlx_embeddings_provider_circuit_state"]
              if labels["provider"] == "down"}  # fmt: skip
    assert states == {"closed": 0, "open": 1, "half_open": 0}
    assert value(busy, "provider_circuit_failures", provider="down") == 2


def test_jobs_are_counted_by_what_became_of_them(busy: Server) -> None:
    counts = {
        status: value(busy, "reembed_jobs_finished_total", status=status)
        for status in ("completed", "failed", "cancelled")
    }
    assert counts == {"completed": 1, "failed": 0, "cancelled": 0}
    assert [value(busy, "reembed_jobs", status=status) for status in ("queued", "running")] == [0, 0]
    assert value(busy, "reembed_documents_total") == 2
    assert 0 < value(busy, "reembed_job_seconds_total", status="completed") < 60
    assert value(busy, "reembed_oldest_job_seconds") == 0
    told = busy.client.get("/api/v1/embeddings/metrics").json()
    assert told["counters"]["mlx_embeddings_reembed_documents_total"] == [{"labels": {}, "value": 2}]


def test_batches_and_their_fill_are_counted(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server:
        server.embed(["one two three four", "one two three"], "toy")  # 7 of 8 tokens
        server.embed(["word " * 7], "toy")

        bucket = {labels["le"]: number for labels, number in samples(server)["mlx_embeddings_batch_fill_ratio_bucket"]}
        assert (bucket["0.8"], bucket["0.9"], bucket["1.0"]) == (0, 1, 2)
        assert value(server, "batch_tokens_total", model="toy") == 14
        assert value(server, "batch_padded_tokens_total", model="toy") == 15
        assert (value(server, "inputs_total"), value(server, "prompt_tokens_total")) == (3, 14)
        assert (
            value(server, "batch_seconds_count", model="toy") == value(server, "queue_seconds_count", model="toy") == 2
        )
        assert (value(server, "model_loaded"), value(server, "model_loads_total", result="ok")) == (1, 1)


def test_series_do_not_grow_with_what_callers_type(busy: Server) -> None:
    def send(start: int) -> None:
        for each in range(start, start + 40):
            busy.client.get(f"/path/{each}")
            busy.client.get(f"/v1/models/{each}")
            busy.client.request(f"METHOD{each}", f"/{each}?{each}", headers={"X-Request-Id": str(each)})
            body = {"model": f"model-{each}", "input": str(each), "user": str(each), f"field-{each}": 1}
            busy.client.post("/v1/embeddings", json=body, headers={"X-Provider": f"provider-{each}"})
            busy.client.post("/v1/embeddings", json=body, headers={"X-Forwarded-For": f"192.0.2.{each}"})

    def series() -> set[str]:
        return {f"{name}{sorted(labels.items())}" for name, each in samples(busy).items() for labels, _ in each}

    send(0)
    before = series()
    send(100)
    assert series() == before


def test_names_and_units_are_as_prometheus_has_them(busy: Server) -> None:
    reply = busy.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(reply.text):
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"mlx_embeddings_[a-z_]+", family.name)
        assert re.match(r"[A-Z1][^.]{10,}$", family.documentation)
        if family.type == "histogram":
            assert re.search(r"_(seconds|ratio|items)$", family.name)
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent|total|count|sum)$", family.name)
        if family.type == "counter":
            assert all(sample.name == f"{family.name}_total" for sample in family.samples)


def test_json_has_the_same_as_the_text(busy: Server) -> None:
    metrics = Metrics()
    metrics.observe_request("/a", "GET", 200, 0.2)
    metrics.observe_request("/a", "GET", 404, 0.2)
    metrics.observe_batch("m", BatchStats(items=3, tokens=9, padded_tokens=10, seconds=0.5))
    metrics.observe_load("m", 1.5, 1000)
    limits = RateLimits(Counters(), requests=1, tokens=0)
    metrics.watch_rate_limits(limits.refused)

    found = json.loads(json.dumps(metrics.as_json(), allow_nan=False))

    counters, gauges, histograms = (found[each] for each in ("counters", "gauges", "histograms"))
    assert counters["mlx_embeddings_requests_total"] == [
        {"labels": {"route": "/a", "method": "GET", "status": status}, "value": 1} for status in ("200", "404")
    ]
    assert counters["mlx_embeddings_rate_limited_requests_total"] == [
        {"labels": {"limit": limit}, "value": 0} for limit in ("requests", "tokens")
    ]
    assert gauges["mlx_embeddings_model_memory_bytes"] == [{"labels": {"model": "m"}, "value": 1000}]
    [fill] = histograms["mlx_embeddings_batch_fill_ratio"]
    assert (fill["labels"], fill["count"], fill["sum"]) == ({"model": "m"}, 1, pytest.approx(0.9))
    assert (fill["buckets"]["0.8"], fill["buckets"]["0.9"], fill["buckets"]["+Inf"]) == (0, 1, 1)
    names = {*counters, *gauges, *(f"{name}_{part}" for name in histograms for part in ("count", "sum", "bucket"))}
    families = text_string_to_metric_families(metrics.render().decode())
    assert {sample.name for family in families for sample in family.samples} <= names


def test_counting_a_request_takes_some_microseconds() -> None:
    metrics = Metrics()

    def seconds_each(times: int = 20_000) -> float:
        started = time.perf_counter()
        for _ in range(times):
            metrics.observe_request("/v1/embeddings", "POST", 200, 0.003)
        return (time.perf_counter() - started) / times

    assert min(seconds_each() for _ in range(3)) < 20e-6


# The dashboard


def filled(query: str) -> str:
    for name, given in FILLED.items():
        query = query.replace(name, given)
    assert "$" not in query, "a variable that the dashboard does not have"
    return query


def selectors(query: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Names of metrics with their (label, operator, text)."""
    return [
        (name, re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers))
        for name, matchers in re.findall(r"([a-zA-Z_:]\w*)\{([^}]*)\}", filled(query))
    ]


def matches(labels: Labels, matchers: list[tuple[str, str, str]]) -> bool:
    """As Prometheus does; `instance` is its own."""
    for label, operator, text in matchers:
        if label == "instance":
            continue
        assert label in labels, f"there is no label {label}"
        is_equal = bool(re.fullmatch(text, labels[label])) if "~" in operator else labels[label] == text
        if is_equal == operator.startswith("!"):
            return False
    return True


def test_all_that_the_dashboard_asks_for_is_there(busy: Server) -> None:
    found = samples(busy)
    assert len(QUERIES) > 30
    for query in QUERIES:
        assert selectors(query), query
        for name, matchers in selectors(query):
            assert any(matches(labels, matchers) for labels, _ in found.get(name, ())), f"{name} {matchers}"


def test_all_that_is_told_is_on_the_dashboard(busy: Server) -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for query in QUERIES for name, _ in selectors(query)}
    told = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples(busy) if not name.startswith("process_")}
    assert told <= shown


def test_the_dashboard_is_in_grafanas_form() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    names = [each["name"] for each in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "instance", "model", "route"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references) > 0
    places = [(p["x"], p["y"], p["w"], p["h"]) for p in (panel["gridPos"] for panel in panels)]
    cells = [(x + dx, y + dy) for x, y, w, h in places for dx in range(w) for dy in range(h)]
    assert len(set(cells)) == len(cells), "panels lie on each other"


def test_the_dashboards_queries_are_promql() -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    with pytest.raises(ValueError):
        parser.parse("sum(rate(a[5m])")
    for query in QUERIES:
        parser.parse(filled(query))
