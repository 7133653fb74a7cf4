"""Prometheus metrics of one app, in a registry of its own.

Labels are what the server's settings name, routes' patterns and a few fixed words: none grows with what callers type.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_embeddings_server.engine.queue import Queue
from mlx_embeddings_server.engine.worker import BatchStats
from mlx_embeddings_server.jobs.base import Totals
from mlx_embeddings_server.providers.circuit import Circuit, State

# When each was begun to be counted: a third of all lines, and nobody asks for them.
disable_created_metrics()

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PREFIX = "mlx_embeddings_"

Child = TypeVar("Child", Counter, Gauge, Histogram)


class Metrics:
    """What is counted, and how it is shown."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._children: dict[tuple[Collector, tuple[str, ...]], Any] = {}
        ProcessCollector(registry=self._registry)
        self._of_requests()
        self._of_batches()
        self._of_models()

    def _of_requests(self) -> None:
        self._requests = self._counter("requests", "Requests by route, method and status", "route", "method", "status")
        self._request_seconds = self._histogram("request_seconds", "Time to answer a request", _SECONDS, "route")
        self._inputs = self._counter("inputs", "Inputs of requests that were answered", "model")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of requests that were answered", "model")
        self._queue_seconds = self._histogram("queue_seconds", "Time a request waited", _SECONDS, "model")
        self._fallbacks = self._counter(
            "fallbacks", "Requests that another model answered than the one asked for", "model", "answered_by"
        )
        self._provider_seconds = self._histogram(
            "provider_request_seconds",
            "Time that another server took for a request's inputs, by how it ended: ok or failed",
            _SECONDS,
            "provider",
            "result",
        )

    def _of_batches(self) -> None:
        self._batch_seconds = self._histogram("batch_seconds", "Time of a batch on the device", _SECONDS, "model")
        self._batch_items = self._histogram("batch_items", "Items in a batch", _ITEMS, "model")
        self._batch_fill = self._histogram(
            "batch_fill_ratio", "Share of a batch's tokens that are no padding", _RATIOS, "model"
        )
        self._padded_tokens = self._counter("batch_padded_tokens", "Tokens computed, padding included", "model")
        self._batch_tokens = self._counter("batch_tokens", "Tokens computed, without padding", "model")
        self._queue_tokens = self._gauge("queue_tokens", "Tokens waiting", "model")
        self._queue_items = self._gauge("queue_items", "Items waiting", "model")

    def _of_models(self) -> None:
        self._loads = self._counter("model_loads", "Loads of a model, by how they ended", "model", "result")
        self._unloads = self._counter("model_unloads", "Times that a model was unloaded", "model")
        self._load_seconds = self._gauge("model_load_seconds", "Time of a model's last load", "model")
        self._model_bytes = self._gauge("model_memory_bytes", "Weights of a loaded model; 0 while it is not", "model")
        self._is_loaded = self._gauge("model_loaded", "1 for a loaded model; 0 while it is not", "model")

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, what, labels, registry=self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(_PREFIX + name, what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, what, labels, buckets=buckets, registry=self._registry)

    def _child(self, metric: Child, *labels: str) -> Child:
        """`metric.labels(...)`, which takes longer than counting does, looked up once."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = metric.labels(*labels)
        return cast("Child", child)

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is its pattern, and `method` one of the known."""
        self._child(self._requests, route, method, str(status)).inc()
        self._child(self._request_seconds, route).observe(seconds)

    def observe_answer(self, model: str, inputs: int, tokens: int) -> None:
        self._child(self._inputs, model).inc(inputs)
        self._child(self._prompt_tokens, model).inc(tokens)

    def observe_wait(self, model: str, seconds: float) -> None:
        self._child(self._queue_seconds, model).observe(seconds)

    def observe_provider(self, provider: str, seconds: float, *, failed: bool) -> None:
        self._child(self._provider_seconds, provider, "failed" if failed else "ok").observe(seconds)

    def observe_fallback(self, asked: str, answered_by: str) -> None:
        self._child(self._fallbacks, asked, answered_by).inc()

    def observe_batch(self, model: str, stats: BatchStats) -> None:
        """From a worker's thread."""
        self._child(self._batch_seconds, model).observe(stats.seconds)
        self._child(self._batch_items, model).observe(stats.items)
        self._child(self._batch_fill, model).observe(stats.tokens / max(1, stats.padded_tokens))
        self._child(self._batch_tokens, model).inc(stats.tokens)
        self._child(self._padded_tokens, model).inc(stats.padded_tokens)

    def observe_load(self, model: str, seconds: float, memory_bytes: int) -> None:
        self._child(self._loads, model, "ok").inc()
        self._child(self._load_seconds, model).set(seconds)
        self._child(self._model_bytes, model).set(memory_bytes)
        self._child(self._is_loaded, model).set(1)

    def observe_failed_load(self, model: str) -> None:
        self._child(self._loads, model, "failed").inc()

    def observe_unload(self, model: str) -> None:
        self._child(self._unloads, model).inc()
        self._child(self._model_bytes, model).set(0)
        self._child(self._is_loaded, model).set(0)

    def watch_in_flight(self, count: Callable[[], int]) -> None:
        self._gauge("requests_in_flight", "Requests that are being answered").set_function(count)

    def watch_queue(self, model: str, queue: Queue) -> None:
        self._queue_tokens.labels(model).set_function(lambda: queue.backlog_tokens)
        self._queue_items.labels(model).set_function(lambda: queue.backlog_items)

    def watch_cache(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._registry.register(_Watched(lambda: _cache_metrics(stats())))

    def watch_circuits(self, circuits: Sequence[Circuit]) -> None:
        self._registry.register(_Watched(lambda: _circuit_metrics(circuits)))

    def watch_rate_limits(self, refused: Mapping[str, int]) -> None:
        """`refused` has the requests that met each limit, and is looked at again whenever metrics are asked for."""
        self._registry.register(_Watched(lambda: _limit_metrics(refused)))

    def watch_jobs(self, totals: Callable[[], Totals | None]) -> None:
        """None: they cannot be told now."""
        self._registry.register(_Watched(lambda: _job_metrics(totals())))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def as_json(self) -> dict[str, Any]:
        """The same for people: `counters`, `gauges` and `histograms`, by name.

        Each is a list of `{"labels": {...}, "value": number}`; of a histogram `{"labels", "count", "sum", "buckets"}`,
        where buckets has the observations up to each bound.
        """
        found: dict[str, dict[str, Any]] = {"counters": {}, "gauges": {}, "histograms": {}}
        for family in self._registry.collect():
            match family.type:
                case "counter":
                    found["counters"][f"{family.name}_total"] = _values(family, f"{family.name}_total")
                case "gauge":
                    found["gauges"][family.name] = _values(family, family.name)
                case "histogram":
                    found["histograms"][family.name] = _histograms(family)
        return found


class _Watched(Collector):
    """Others' own counts, read when they are asked for: counting costs a request nothing more."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def _cache_metrics(stats: Mapping[str, Any]) -> Iterator[Metric]:
    for name, what in (
        ("hits", "Inputs found in a layer of the cache"),
        ("misses", "Inputs looked for in a layer of the cache, and not found"),
        ("failures", "Times that a layer of the cache could not be reached"),
    ):
        family = CounterMetricFamily(f"{_PREFIX}cache_{name}", what, labels=["layer"])
        for layer, counts in stats["layers"].items():
            if name in counts:
                family.add_metric([layer], counts[name])
        yield family
    joined = "Inputs that waited for another request's computation of the same"
    yield CounterMetricFamily(f"{_PREFIX}cache_joined", joined, stats["joined"])
    yield GaugeMetricFamily(f"{_PREFIX}cache_entries", "Entries in the cache's memory", stats["size"])
    yield GaugeMetricFamily(f"{_PREFIX}cache_bytes", "Bytes of the entries in the cache's memory", stats["bytes"])


def _circuit_metrics(circuits: Sequence[Circuit]) -> Iterator[Metric]:
    what = "1 for the state that a provider's circuit is in, 0 for the others"
    states = GaugeMetricFamily(f"{_PREFIX}provider_circuit_state", what, labels=["provider", "state"])
    failures = GaugeMetricFamily(
        f"{_PREFIX}provider_circuit_failures", "Failures of a provider in a row", labels=["provider"]
    )
    for circuit in circuits:
        current = circuit.state
        for state in get_args(State):
            states.add_metric([circuit.provider, state], int(state == current))
        failures.add_metric([circuit.provider], circuit.failure_count)
    yield from (states, failures)


def _limit_metrics(refused: Mapping[str, int]) -> Iterator[Metric]:
    what = "Requests refused by a limit of their caller's"
    family = CounterMetricFamily(f"{_PREFIX}rate_limited_requests", what, labels=["limit"])
    for limit, count in refused.items():
        family.add_metric([limit], count)
    yield family


def _job_metrics(totals: Totals | None) -> Iterator[Metric]:
    if totals is None:
        return
    unfinished = GaugeMetricFamily(f"{_PREFIX}reembed_jobs", "Jobs that are not finished", labels=["status"])
    for status, count in totals.unfinished.items():
        unfinished.add_metric([status], count)
    finished = CounterMetricFamily(f"{_PREFIX}reembed_jobs_finished", "Jobs that came to an end", labels=["status"])
    what = "Time of finished jobs, from when they were begun"
    seconds = CounterMetricFamily(f"{_PREFIX}reembed_job_seconds", what, labels=["status"])
    for status, (jobs, took) in totals.finished.items():
        finished.add_metric([status], jobs)
        seconds.add_metric([status], took)
    yield from (unfinished, finished, seconds)
    documents = "Documents that jobs have embedded anew"
    yield CounterMetricFamily(f"{_PREFIX}reembed_documents", documents, totals.documents)
    oldest = "Time since the oldest job that is not finished was asked for; 0 where there is none"
    yield GaugeMetricFamily(f"{_PREFIX}reembed_oldest_job_seconds", oldest, totals.oldest_seconds)


def _values(family: Metric, name: str) -> list[dict[str, Any]]:
    return [{"labels": each.labels, "value": each.value} for each in family.samples if each.name == name]


def _histograms(family: Metric) -> list[dict[str, Any]]:
    found: defaultdict[tuple[tuple[str, str], ...], dict[str, Any]] = defaultdict(dict)
    for sample in family.samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        entry = found[tuple(labels.items())]
        entry.setdefault("labels", labels)
        match sample.name.removeprefix(f"{family.name}_"):
            case "bucket":
                entry.setdefault("buckets", {})[sample.labels["le"]] = sample.value
            case "count" | "sum" as what:
                entry[what] = sample.value
    return list(found.values())
