"""Metrics of the server: Prometheus counters, and the live figures of the page."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from torchrec_kvshare.cache.exporters import PrometheusCollector
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.features.request import IdCount

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Outcomes of requests, values of a Prometheus label.
OK, INVALID, OVERLOADED, DEADLINE = "ok", "invalid", "overloaded", "deadline"
CANCELLED, UNAVAILABLE, UNKNOWN, INTERNAL = "cancelled", "unavailable", "unknown_model", "internal"
NOT_FINITE = "not_finite"
OUTCOMES = (
    *(OK, INVALID, OVERLOADED, DEADLINE, CANCELLED, UNAVAILABLE, UNKNOWN, INTERNAL, NOT_FINITE),
)
# Limits whose refusals are counted.
CONNECTIONS, HEADER_TIME, BODY_TIME = "connections", "header_time", "body_time"
ANSWER_TIME, IDLE_TIME, STREAM_TIME = "answer_time", "idle_time", "stream_time"
REQUEST_BYTES, INFLIGHT_BYTES, CALLS = "request_bytes", "inflight_bytes", "calls"
WATCHERS, STREAMS, QUEUE_LENGTH, TOKEN = "watchers", "streams", "queue", "token"
PREFETCHES = "prefetches"
LIMITS = (
    *(CONNECTIONS, HEADER_TIME, BODY_TIME, ANSWER_TIME, IDLE_TIME, STREAM_TIME, REQUEST_BYTES),
    *(INFLIGHT_BYTES, CALLS, WATCHERS, STREAMS, QUEUE_LENGTH, TOKEN, PREFETCHES),
)
PARSE, QUEUE, SCORING = "parse", "queue", "score"  # stages of a request

# fmt: off
SECONDS = (
    5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0,
)
# fmt: on
REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
CANDIDATES = (1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

QPS_WINDOW_S = 10.0
MAX_LATENCIES = 1000
MAX_MISSES = 20


class Metric(NamedTuple):
    """A row of ``METRICS``; its name in Prometheus is ``kvshare_<name>``."""

    kind: type[Counter | Gauge | Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None


METRICS = (
    Metric(
        Counter, "requests", "Requests by how they ended.", labels=("model", "server", "outcome")
    ),
    Metric(
        Histogram,
        "request_seconds",
        "From a request's last byte to its answer.",
        labels=("model", "server"),
        buckets=SECONDS,
    ),
    Metric(
        Histogram,
        "stage_seconds",
        "Where the time of answered requests went: parse, queue, score.",
        labels=("model", "stage"),
        buckets=SECONDS,
    ),
    Metric(Histogram, "batch_requests", "Requests in a batch.", buckets=REQUESTS),
    Metric(Histogram, "batch_candidates", "Candidates in a batch.", buckets=CANDIDATES),
    Metric(
        Counter,
        "ids",
        "Ids of requests; of events, those that the model reads.",
        labels=("model", "column"),
    ),
    Metric(
        Counter,
        "unknown_ids",
        "Those of them that no table of the model knows.",
        labels=("model", "column"),
    ),
    Metric(
        Counter,
        "sorted_histories",
        "Histories that came out of order and were sorted.",
        labels=("model",),
    ),
    Metric(
        Counter,
        "not_finite_scores",
        "Requests with a score that is NaN or infinite, in a list or a stream too.",
    ),
    Metric(
        Counter,
        "refusals",
        "Connections, calls and requests that were refused or ended, by the limit.",
        labels=("limit",),
    ),
    Metric(Gauge, "connections_open", "Connections of HTTP."),
    Metric(Gauge, "calls_open", "Calls of gRPC that are read or answered."),
    Metric(
        Gauge,
        "inflight_bytes",
        "Of messages that are read or answered, beyond the first 64 KiB of each.",
    ),
    Metric(Gauge, "queue_requests", "Requests that wait."),
    Metric(Gauge, "streams_open", "Streams that hold K/V."),
    Metric(
        Counter,
        "prefetches",
        "Users to encode ahead: the cache's status, or why they were dropped.",
        labels=("outcome",),
    ),
    Metric(Gauge, "prefetches_waiting", "Users that wait to be encoded ahead."),
    Metric(Gauge, "pinned_users", "Users that are pinned."),
    Metric(
        Gauge,
        "model_version_info",
        "1 for the version that answers.",
        labels=("model", "version", "model_version"),
    ),
    Metric(
        Counter,
        "model_loads",
        "Versions that were loaded: served, refused.",
        labels=("model", "outcome"),
    ),
    Metric(
        Gauge,
        "model_refused",
        "1 while a version that was refused stands in the folder.",
        labels=("model", "version"),
    ),
    Metric(
        Counter,
        "parity_checks",
        "Cached answers that were scored again without the cache.",
        labels=("model",),
    ),
    Metric(
        Gauge,
        "parity_drift",
        "Greatest difference of a probability; infinite where one of two was no number.",
        labels=("model",),
    ),
    Metric(
        Gauge,
        "parity_alarm",
        "1 while the cache is left alone because its scores were wrong.",
        labels=("model",),
    ),
)


class ServerMetrics:
    """Counters, gauges and histograms of one server, by their names in ``METRICS``.

    Args:
        cache: counters of the caches; exported as ``kvshare_cache_*``.

    Example:
        >>> from torchrec_kvshare.cache.metrics import CacheMetrics
        >>> metrics = ServerMetrics(CacheMetrics())
        >>> metrics.count("requests", "shop", "grpc", OK)
        >>> [line for line in metrics.text().decode().splitlines() if "shop" in line][0]
        'kvshare_requests_total{model="shop",outcome="ok",server="grpc"} 1.0'
    """

    def __init__(self, cache: CacheMetrics) -> None:
        self.cache = cache
        self.registry = CollectorRegistry()
        self.registry.register(PrometheusCollector(cache))
        self._metric_by_name: dict[str, Any] = {}
        for row in METRICS:
            options: dict[str, Any] = {} if row.buckets is None else {"buckets": row.buckets}
            self._metric_by_name[row.name] = row.kind(
                f"kvshare_{row.name}", row.help, row.labels, registry=self.registry, **options
            )
        for limit in LIMITS:
            self._series("refusals", limit)

    def count(self, name: str, *labels: str, amount: int = 1) -> None:
        """Add to a counter; its labels are given in the order of the table."""
        self._series(name, *labels).inc(amount)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        self._series(name, *labels).observe(value)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._series(name, *labels).set(value)

    def read(self, name: str, read: Callable[[], float]) -> None:
        """Have a gauge read by a function whenever it is exported."""
        self._series(name).set_function(read)

    def remove(self, name: str, *labels: str) -> None:
        """Remove one series of a metric, or all of them if no labels are given."""
        metric = self._metric_by_name[name]
        if labels:
            metric.remove(*labels)
        else:
            metric.clear()

    def refuse(self, limit: str) -> None:
        """Count something that was refused or ended, by which of ``LIMITS`` did it."""
        self.count("refusals", limit)

    def count_ids(self, model: str, count_by_column: Mapping[str, IdCount]) -> None:
        """Count a request's ids; columns are those of the model's schema only."""
        for column, count in count_by_column.items():
            self.count("ids", model, column, amount=count.given)
            self.count("unknown_ids", model, column, amount=count.unknown)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def write(self, writer: "SummaryWriter", step: int) -> None:
        """Write every sample to TensorBoard, except buckets of histograms."""
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    tag = "/".join((sample.name, *sample.labels.values()))
                    writer.add_scalar(tag, sample.value, step)

    def _series(self, name: str, *labels: str) -> Any:
        metric = self._metric_by_name[name]
        return metric.labels(*labels) if labels else metric


class LiveView:
    """The last requests, for the page: rates, quantiles, misses with their reasons.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._num_by_outcome = dict.fromkeys(OUTCOMES, 0)
        self._ends: deque[float] = deque()
        self._latencies_ms: deque[float] = deque(maxlen=MAX_LATENCIES)
        self._batches: deque[int] = deque(maxlen=MAX_LATENCIES)
        self._misses: deque[dict[str, Any]] = deque(maxlen=MAX_MISSES)

    def end(self, outcome: str, latency_ms: float) -> None:
        """Record the end of a request."""
        self._num_by_outcome[outcome] += 1
        if outcome == OK:
            self._latencies_ms.append(latency_ms)
            self._ends.append(self._clock())
        while self._ends and self._ends[0] < self._clock() - QPS_WINDOW_S:
            self._ends.popleft()

    def batch(self, num_requests: int) -> None:
        """Record the size of a batch that is scored."""
        self._batches.append(num_requests)

    def miss(self, model: str, request_id: object, use: CacheUse) -> None:
        """Record an answer whose K/V was not all cached."""
        miss = {"at": time.time(), "request_id": request_id, "model": model, "status": use.status}
        miss |= {"reason": use.reason, "cached_events": use.cached_events}
        self._misses.appendleft(miss | {"computed_events": use.computed_events})

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        now = self._clock()
        window_s = min(QPS_WINDOW_S, max(now - self._started_at, 1.0))
        return {
            "uptime_s": now - self._started_at,
            "qps": sum(end >= now - window_s for end in [*self._ends]) / window_s,
            "requests": dict(self._num_by_outcome),
            "latency_ms": _quantiles([*self._latencies_ms]),
            "batch_requests": float(np.mean(self._batches)) if self._batches else None,
            "misses": [*self._misses],
        }


def cache_to_json(cache: CacheMetrics) -> dict[str, Any]:
    """Return the hit rate and the hits by tier, for the page."""
    snapshot = cache.snapshot()
    by_tier: dict[str, int] = {}
    for series, value in snapshot.values.items():
        labels: Mapping[str, str] = dict(series.labels)
        if series.name == "lookups" and labels["outcome"] == "hit":
            by_tier[labels["tier"]] = int(value)
    lookups = int(snapshot.value("lookups", tier="pages"))
    return {"hit_rate": snapshot.hit_rate(), "hits_by_tier": by_tier, "lookups": lookups}


def _quantiles(values: Iterable[float]) -> dict[str, float | None]:
    found = [*values]
    names = {"p50": 50, "p90": 90, "p99": 99}
    if not found:
        return dict.fromkeys(names)
    return {name: float(np.percentile(found, share)) for name, share in names.items()}
