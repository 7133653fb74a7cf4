"""Prometheus metrics of one app, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mlx_embeddings_server.engine.queue import Queue
from mlx_embeddings_server.engine.worker import BatchStats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PREFIX = "mlx_embeddings_"


class Metrics:
    """What is counted, and how it is shown."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            f"{_PREFIX}requests",
            "Requests by route, method and status",
            ["route", "method", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            f"{_PREFIX}request_seconds", "Time to answer a request", ["route"], buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter(f"{_PREFIX}prompt_tokens", "Tokens embedded", ["model"], registry=registry)
        self.queue_seconds = Histogram(
            f"{_PREFIX}queue_seconds", "Time a request waited", ["model"], buckets=_SECONDS, registry=registry
        )
        self._batch_seconds = Histogram(
            f"{_PREFIX}batch_seconds", "Time of a batch on the device", ["model"], buckets=_SECONDS, registry=registry
        )
        self._batch_items = Histogram(
            f"{_PREFIX}batch_items", "Items in a batch", ["model"], buckets=_ITEMS, registry=registry
        )
        self._padded_tokens = Counter(
            f"{_PREFIX}batch_padded_tokens", "Tokens computed, padding included", ["model"], registry=registry
        )
        self._batch_tokens = Counter(
            f"{_PREFIX}batch_tokens", "Tokens computed, without padding", ["model"], registry=registry
        )
        self._queue_tokens = Gauge(f"{_PREFIX}queue_tokens", "Tokens waiting", ["model"], registry=registry)
        self._queue_items = Gauge(f"{_PREFIX}queue_items", "Items waiting", ["model"], registry=registry)

        self._loads = Counter(
            f"{_PREFIX}model_loads", "Loads of a model, by how they ended", ["model", "result"], registry=registry
        )
        self._unloads = Counter(
            f"{_PREFIX}model_unloads", "Times that a model was unloaded", ["model"], registry=registry
        )
        self._load_seconds = Gauge(
            f"{_PREFIX}model_load_seconds", "Time of a model's last load", ["model"], registry=registry
        )
        self._model_bytes = Gauge(
            f"{_PREFIX}model_memory_bytes", "Weights of a loaded model; 0 while it is not", ["model"], registry=registry
        )

    def observe_batch(self, model: str, stats: BatchStats) -> None:
        self._batch_seconds.labels(model).observe(stats.seconds)
        self._batch_items.labels(model).observe(stats.items)
        self._batch_tokens.labels(model).inc(stats.tokens)
        self._padded_tokens.labels(model).inc(stats.padded_tokens)

    def observe_load(self, model: str, seconds: float, memory_bytes: int) -> None:
        self._loads.labels(model, "ok").inc()
        self._load_seconds.labels(model).set(seconds)
        self._model_bytes.labels(model).set(memory_bytes)

    def observe_failed_load(self, model: str) -> None:
        self._loads.labels(model, "failed").inc()

    def observe_unload(self, model: str) -> None:
        self._unloads.labels(model).inc()
        self._model_bytes.labels(model).set(0)

    def watch_queue(self, model: str, queue: Queue) -> None:
        self._queue_tokens.labels(model).set_function(lambda: queue.tokens)
        self._queue_items.labels(model).set_function(lambda: len(queue.waiting))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
