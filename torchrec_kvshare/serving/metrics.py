"""What the server counts, as Prometheus reads it, and what a person wants to see of it now."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from torchrec_kvshare.cache.exporters import PrometheusCollector
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.features.request import IdCount

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# How requests end; Prometheus gets one series of each.
OK, INVALID, OVERLOADED, DEADLINE = "ok", "invalid", "overloaded", "deadline"
CANCELLED, UNAVAILABLE, UNKNOWN, INTERNAL = "cancelled", "unavailable", "unknown_model", "internal"
NOT_FINITE = "not_finite"
OUTCOMES = (
    *(OK, INVALID, OVERLOADED, DEADLINE, CANCELLED, UNAVAILABLE, UNKNOWN, INTERNAL, NOT_FINITE),
)
# Limits of which the server counts what they refuse or end.
CONNECTIONS, HEADER_TIME, BODY_TIME = "connections", "header_time", "body_time"
ANSWER_TIME, IDLE_TIME, STREAM_TIME = "answer_time", "idle_time", "stream_time"
REQUEST_BYTES, INFLIGHT_BYTES, CALLS = "request_bytes", "inflight_bytes", "calls"
WATCHERS, STREAMS, QUEUE_LENGTH, TOKEN = "watchers", "streams", "queue", "token"
LIMITS = (
    *(CONNECTIONS, HEADER_TIME, BODY_TIME, ANSWER_TIME, IDLE_TIME, STREAM_TIME, REQUEST_BYTES),
    *(INFLIGHT_BYTES, CALLS, WATCHERS, STREAMS, QUEUE_LENGTH, TOKEN),
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


class ServerMetrics:
    """Counters, gauges and histograms of one server.

    Args:
        cache: what its caches count; shown as ``kvshare_cache_*``.
    """

    def __init__(self, cache: CacheMetrics) -> None:
        self.cache = cache
        self.registry = registry = CollectorRegistry()
        registry.register(PrometheusCollector(cache))
        self.requests = Counter(
            "kvshare_requests",
            "Requests by how they ended.",
            ("model", "face", "outcome"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "kvshare_request_seconds",
            "From a request's last byte to its answer.",
            ("model", "face"),
            buckets=SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "kvshare_stage_seconds",
            "Where the time of answered requests went: parse, queue, score.",
            ("model", "stage"),
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_requests = Histogram(
            "kvshare_batch_requests",
            "Requests in a step.",
            buckets=REQUESTS,
            registry=registry,
        )
        self.batch_candidates = Histogram(
            "kvshare_batch_candidates",
            "Candidates in a step.",
            buckets=CANDIDATES,
            registry=registry,
        )
        self.ids = Counter(
            "kvshare_ids",
            "Ids of requests; of events, those that the model reads.",
            ("model", "column"),
            registry=registry,
        )
        self.unknown_ids = Counter(
            "kvshare_unknown_ids",
            "Those of them that no table of the model knows.",
            ("model", "column"),
            registry=registry,
        )
        self.sorted_histories = Counter(
            "kvshare_sorted_histories",
            "Histories that came out of order and were sorted.",
            ("model",),
            registry=registry,
        )
        self.not_finite = Counter(
            "kvshare_not_finite_scores",
            "Requests with a score that is NaN or infinite, in a list or a stream too.",
            registry=registry,
        )
        self.refusals = Counter(
            "kvshare_refusals",
            "Connections, calls and requests that were refused or ended, by the limit.",
            ("limit",),
            registry=registry,
        )
        for limit in LIMITS:
            self.refusals.labels(limit)
        self.connections_open = Gauge(
            "kvshare_connections_open", "Connections of HTTP.", registry=registry
        )
        self.calls_open = Gauge(
            "kvshare_calls_open", "Calls of gRPC that are read or answered.", registry=registry
        )
        self.inflight_bytes = Gauge(
            "kvshare_inflight_bytes",
            "Of messages that are read or answered, beyond the first 64 KiB of each.",
            registry=registry,
        )
        self.queue_requests = Gauge(
            "kvshare_queue_requests", "Requests that wait.", registry=registry
        )
        self.streams_open = Gauge(
            "kvshare_streams_open", "Streams that hold K/V.", registry=registry
        )
        self.version_info = Gauge(
            "kvshare_model_version_info",
            "1 for the version that answers.",
            ("model", "version", "model_version"),
            registry=registry,
        )
        self.loads = Counter(
            "kvshare_model_loads",
            "Versions that were loaded: served, refused.",
            ("model", "outcome"),
            registry=registry,
        )
        self.refused = Gauge(
            "kvshare_model_refused",
            "1 while a version that was refused stands in the folder.",
            ("model", "version"),
            registry=registry,
        )
        self.parity_checks = Counter(
            "kvshare_parity_checks",
            "Cached answers that were scored again without the cache.",
            ("model",),
            registry=registry,
        )
        self.parity_drift = Gauge(
            "kvshare_parity_drift",
            "Greatest difference of a probability; infinite where one of two was no number.",
            ("model",),
            registry=registry,
        )
        self.parity_alarm = Gauge(
            "kvshare_parity_alarm",
            "1 while the cache is left alone because its scores were wrong.",
            ("model",),
            registry=registry,
        )

    def refuse(self, limit: str) -> None:
        """Something was refused or ended, to keep within this one of ``LIMITS``."""
        self.refusals.labels(limit).inc()

    def count_ids(self, model: str, count_by_column: Mapping[str, IdCount]) -> None:
        """Count a request's ids; columns are those of the model's schema, and no more."""
        for column, count in count_by_column.items():
            self.ids.labels(model, column).inc(count.given)
            self.unknown_ids.labels(model, column).inc(count.unknown)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def write(self, writer: "SummaryWriter", step: int) -> None:
        """Write every sample to TensorBoard; buckets of histograms are left out."""
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    tag = "/".join((sample.name, *sample.labels.values()))
                    writer.add_scalar(tag, sample.value, step)


class LiveView:
    """The last requests, for the page: rates, quantiles, misses with their reasons.

    Args:
        clock: seconds that only go forward.
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
        """A request has ended."""
        self._num_by_outcome[outcome] += 1
        if outcome == OK:
            self._latencies_ms.append(latency_ms)
            self._ends.append(self._clock())
        while self._ends and self._ends[0] < self._clock() - QPS_WINDOW_S:
            self._ends.popleft()

    def step(self, num_requests: int) -> None:
        """So many requests were scored together."""
        self._batches.append(num_requests)

    def miss(self, model: str, request_id: object, use: CacheUse) -> None:
        """An answer whose K/V was not all there."""
        miss = {"at": time.time(), "request_id": request_id, "model": model, "status": use.status}
        miss |= {"reason": use.reason, "cached_events": use.cached_events}
        self._misses.appendleft(miss | {"computed_events": use.computed_events})

    def to_json(self) -> dict[str, Any]:
        """What it saw, as JSON values."""
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
    """Hit rates, as the page shows them."""
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
