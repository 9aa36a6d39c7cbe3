"""Cache metrics count what happened, also as exported to TensorBoard and Prometheus."""

import math
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import prometheus_client.exposition
import prometheus_client.openmetrics.exposition
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest
from prometheus_client.core import CollectorRegistry, Metric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from torchrec_kvshare.cache import metrics as metrics_module
from torchrec_kvshare.cache.exporters import PrometheusCollector, write_scalars
from torchrec_kvshare.cache.metrics import (
    DECLARED_BY_NAME,
    HISTOGRAM,
    CacheMetrics,
    HistogramValue,
    Series,
)
from torchrec_kvshare.errors import MissingExtraError

GET = Series("seconds", (("operation", "get"), ("tier", "host")))


def histogram_of(values: Iterable[float]) -> HistogramValue:
    metrics = CacheMetrics()
    for value in values:
        metrics.observe("seconds", value, tier="host", operation="get")
    return metrics.snapshot().histograms[GET]


# Counters.


def test_a_value_is_of_its_labels_or_the_sum_over_those_not_named() -> None:
    metrics = CacheMetrics()
    metrics.count("lookups", tier="host", outcome="hit")
    metrics.count("lookups", 2.0, outcome="cold", tier="host")
    metrics.count("lookups", 4.0, tier="disk", outcome="hit")
    snapshot = metrics.snapshot()
    assert snapshot.value("lookups", tier="host", outcome="cold") == 2.0
    assert snapshot.value("lookups", tier="host") == 3.0
    assert snapshot.value("lookups", outcome="hit") == 5.0
    assert snapshot.value("lookups") == 7.0


def test_labels_in_any_order_are_one_series() -> None:
    metrics = CacheMetrics()
    metrics.count("lookups", tier="host", outcome="hit")
    metrics.count("lookups", outcome="hit", tier="host")
    series = Series("lookups", (("outcome", "hit"), ("tier", "host")))
    assert metrics.snapshot().values == {series: 2.0}


def test_what_was_never_counted_is_zero() -> None:
    snapshot = CacheMetrics().snapshot()
    assert snapshot.value("evictions", tier="host") == 0.0
    assert snapshot.value("evictions") == 0.0
    assert snapshot.hit_rate() == 0.0


def test_the_hit_rate_is_of_events() -> None:
    metrics = CacheMetrics()
    metrics.count("events", 30, source="cached")
    assert metrics.snapshot().hit_rate() == 1.0
    metrics.count("events", 90, source="computed")
    assert metrics.snapshot().hit_rate() == 0.25


def test_threads_that_count_at_once_lose_nothing() -> None:
    metrics = CacheMetrics()
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for number in range(2000):
            metrics.count("lookups", tier="host", outcome="hit" if number % 2 else "cold")
            metrics.observe("seconds", 1e-3, tier="host", operation="get")

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    snapshot = metrics.snapshot()
    assert snapshot.value("lookups", outcome="hit") == snapshot.value("lookups", outcome="cold")
    assert snapshot.value("lookups") == 16_000
    assert snapshot.histograms[GET].count == 16_000
    assert snapshot.histograms[GET].sum == pytest.approx(16.0)


def test_a_snapshot_stays_as_it_was() -> None:
    metrics = CacheMetrics()
    metrics.count("evictions", tier="host")
    metrics.observe("seconds", 1e-3, tier="host", operation="get")
    snapshot = metrics.snapshot()
    metrics.count("evictions", tier="host")
    metrics.observe("seconds", 1e-3, tier="host", operation="get")
    assert snapshot.value("evictions") == 1.0
    assert snapshot.histograms[GET].count == 1


# Gauges.


def test_a_gauge_is_read_when_a_snapshot_is_taken() -> None:
    metrics = CacheMetrics()
    pinned: list[int] = []
    metrics.gauge("pinned_entries", lambda: len(pinned))
    assert metrics.snapshot().value("pinned_entries") == 0.0
    pinned += [1, 2, 3]
    assert metrics.snapshot().value("pinned_entries") == 3.0


def test_the_last_registration_of_a_gauge_counts() -> None:
    metrics = CacheMetrics()
    for held_bytes in (5, 7):
        metrics.gauge("held_bytes", lambda held_bytes=held_bytes: held_bytes, tier="host")
    metrics.gauge("held_bytes", lambda: 11, tier="disk")
    assert metrics.snapshot().value("held_bytes", tier="host") == 7.0
    assert metrics.snapshot().value("held_bytes") == 18.0


def test_a_gauge_may_wait_for_someone_who_counts() -> None:
    """An owner counts under its own lock, and its gauge takes that lock: no deadlock."""
    metrics = CacheMetrics()

    def read() -> float:
        owner = threading.Thread(target=metrics.count, args=("evictions",), kwargs={"tier": "host"})
        owner.start()
        owner.join(timeout=10.0)
        return float(owner.is_alive())

    metrics.gauge("pinned_entries", read)
    assert metrics.snapshot().value("pinned_entries") == 0.0
    assert metrics.snapshot().value("evictions") == 1.0


# Histograms.


def test_a_bound_is_inside_its_bucket() -> None:
    bounds = metrics_module.SECONDS
    assert histogram_of(bounds).counts == (*(1 for _ in bounds), 0)
    above = histogram_of([bounds[-1] * 1.01])
    assert above.counts == (*(0 for _ in bounds), 1)


@pytest.mark.parametrize("bounds", [metrics_module.SECONDS, metrics_module.AGES])
def test_bounds_ascend_and_cover_what_was_promised(bounds: tuple[float, ...]) -> None:
    assert [*bounds] == sorted({*bounds})
    assert (bounds[0], bounds[-1]) in ((2e-5, 10.0), (1.0, 86_400.0))


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_within_a_bucket_of_the_true_one(q: float) -> None:
    values = np.exp(np.random.default_rng(5).normal(-6.0, 1.0, 5000))
    histogram = histogram_of(values)
    true = float(np.quantile(values, q))
    upper = np.searchsorted(histogram.bounds, true)
    width = histogram.bounds[upper] - (histogram.bounds[upper - 1] if upper else 0.0)
    assert abs(histogram.quantile(q) - true) <= width
    assert histogram.count == 5000
    assert histogram.sum == pytest.approx(values.sum())


def test_a_quantile_lies_between_its_bucket_s_bounds_as_even_spread_has_it() -> None:
    histogram = HistogramValue((1.0, 3.0, 7.0), (0, 4, 4, 0), 28.0)
    assert [histogram.quantile(q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 2.0, 3.0, 5.0, 7.0]


def test_a_quantile_above_all_bounds_is_the_highest_and_of_nothing_is_nan() -> None:
    assert HistogramValue((1.0, 3.0), (1, 0, 9), 100.0).quantile(0.5) == 3.0
    assert math.isnan(HistogramValue((1.0, 3.0), (0, 0, 0), 0.0).quantile(0.5))


def test_a_block_is_timed_also_if_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 10.25, 20.0, 20.5])
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(seconds))
    metrics = CacheMetrics()
    with metrics.timed("seconds", tier="host", operation="get"):
        pass
    with (
        pytest.raises(OSError, match="gone"),
        metrics.timed("seconds", tier="host", operation="get"),
    ):
        raise OSError("gone")
    histogram = metrics.snapshot().histograms[GET]
    assert (histogram.count, histogram.sum) == (2, 0.75)


# Undeclared metrics.


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda m: m.count("look_ups"), "look_ups is not declared"),
        (lambda m: m.count("lookups", tier="host"), "lookups has labels"),
        (lambda m: m.count("lookups", tier="host", outcome="hit", user="7"), "lookups has labels"),
        (lambda m: m.observe("evictions", 1.0, tier="host"), "declared as a counter"),
        (lambda m: m.count("held_bytes", tier="host"), "declared as a gauge"),
        (lambda m: m.gauge("pinned_entries", float, tier="host"), "pinned_entries has labels"),
        (lambda m: m.snapshot().value("seconds", tier="host"), "seconds is a histogram"),
        (lambda m: m.snapshot().value("lookups", reason="cold"), "lookups has labels"),
    ],
)
def test_an_undeclared_series_is_a_bug_of_ours(
    update: Callable[[CacheMetrics], object], message: str
) -> None:
    metrics = CacheMetrics()
    with pytest.raises(AssertionError, match=message):
        update(metrics)
    assert metrics.snapshot().values == {}


def test_only_histograms_have_buckets() -> None:
    for declared in DECLARED_BY_NAME.values():
        assert bool(declared.bounds) == (declared.kind == HISTOGRAM)


# Exports.


def busy_metrics() -> CacheMetrics:
    metrics = CacheMetrics()
    metrics.count("lookups", 3, tier="host", outcome="hit")
    metrics.count("bytes", 4096, tier='disk "a"', direction="read")
    metrics.count("forgotten_bytes", 12, tier="host")
    metrics.gauge("pinned_entries", lambda: 5)
    metrics.gauge("breaker_open", lambda: 0.5, tier="remote")
    for seconds in (15e-6, 30e-6, 40e-6, 99.0):
        metrics.observe("seconds", seconds, tier="host", operation="get")
    return metrics


def test_json_has_one_number_for_each_series() -> None:
    assert busy_metrics().snapshot().to_json() == {
        "lookups{outcome=hit,tier=host}": 3.0,
        'bytes{direction=read,tier=disk "a"}': 4096.0,
        "forgotten_bytes{tier=host}": 12.0,
        "pinned_entries": 5.0,
        "breaker_open{tier=remote}": 0.5,
        "seconds_count{operation=get,tier=host}": 4,
        "seconds_sum{operation=get,tier=host}": pytest.approx(99.000085),
        "seconds_p50{operation=get,tier=host}": pytest.approx(35e-6),
        "seconds_p99{operation=get,tier=host}": 10.0,
    }


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_scalars(busy_metrics().snapshot(), writer, step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    value_by_tag = {}
    for tag in events.Tags()["scalars"]:
        (scalar,) = events.Scalars(tag)
        assert scalar.step == 7
        value_by_tag[tag] = scalar.value
    assert value_by_tag == {
        "cache/lookups/host/hit": 3.0,
        'cache/bytes/disk "a"/read': 4096.0,
        "cache/forgotten_bytes/host": 12.0,
        "cache/pinned_entries": 5.0,
        "cache/breaker_open/remote": 0.5,
        "cache/seconds/host/get/p50": pytest.approx(35e-6),
        "cache/seconds/host/get/p99": 10.0,
    }


def scraped(metrics: CacheMetrics, is_open: bool) -> dict[str, Metric]:
    """Families by name, as a scraper of either format gets them."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(PrometheusCollector(metrics))
    if is_open:
        text = prometheus_client.openmetrics.exposition.generate_latest(registry).decode()
        families = prometheus_client.openmetrics.parser.text_string_to_metric_families(text)
    else:
        text = prometheus_client.exposition.generate_latest(registry).decode()
        families = prometheus_client.parser.text_string_to_metric_families(text)
    return {family.name: family for family in families}


@pytest.mark.parametrize("is_open", [False, True], ids=["text", "openmetrics"])
def test_prometheus_reads_names_labels_and_numbers(is_open: bool) -> None:
    family_by_name = scraped(busy_metrics(), is_open)
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in family_by_name.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    get = (("operation", "get"), ("tier", "host"))
    assert samples == {
        ("kvshare_cache_lookups_total", ("outcome", "hit"), ("tier", "host")): 3.0,
        ("kvshare_cache_bytes_total", ("direction", "read"), ("tier", 'disk "a"')): 4096.0,
        ("kvshare_cache_forgotten_bytes_total", ("tier", "host")): 12.0,
        ("kvshare_cache_pinned_entries",): 5.0,
        ("kvshare_cache_breaker_open", ("tier", "remote")): 0.5,
        ("kvshare_cache_seconds_count", *get): 4.0,
        ("kvshare_cache_seconds_sum", *get): pytest.approx(99.000085),
    }
    assert {
        sample.labels["le"]: sample.value
        for sample in family_by_name["kvshare_cache_seconds"].samples
        if sample.name == "kvshare_cache_seconds_bucket"
    } == {
        "2e-05": 1.0,
        **{str(bound): 3.0 for bound in metrics_module.SECONDS[1:]},
        "+Inf": 4.0,
    }


def test_prometheus_learns_kinds_and_units_of_every_declared_metric() -> None:
    family_by_name = scraped(CacheMetrics(), is_open=True)
    assert {name: family.type for name, family in family_by_name.items()} == {
        f"kvshare_cache_{name}": declared.kind for name, declared in DECLARED_BY_NAME.items()
    }
    assert {name for name, family in family_by_name.items() if family.unit == "bytes"} == {
        f"kvshare_cache_{name}"
        for name in ("bytes", "forgotten_bytes", "held_bytes", "capacity_bytes", "queue_bytes")
    }
    assert {name for name, family in family_by_name.items() if family.unit == "seconds"} == {
        "kvshare_cache_seconds",
        "kvshare_cache_evicted_age_seconds",
    }


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"exporting .* needs the extra \[metrics\]"):
        PrometheusCollector(CacheMetrics())
