"""Metrics of the cache: counters, gauges and histograms, read together as a snapshot.

Every metric is declared in the table below; another name or label is a bug of ours. An update
writes one dict entry under one lock. Gauges are read outside that lock: the owner of a gauge may
update a counter while it has its own lock, and the two would deadlock.
"""

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

COUNTER = "counter"
GAUGE = "gauge"
HISTOGRAM = "histogram"

# Upper bounds of the buckets, inclusive.
# fmt: off
SECONDS = (
    2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01,
    0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)
AGES = (
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
    1800.0, 3600.0, 7200.0, 21600.0, 43200.0, 86400.0,
)
# fmt: on


class Declared(NamedTuple):
    """A metric: its kind, help text, labels, and a histogram's bucket bounds."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


DECLARED_BY_NAME = {
    "lookups": Declared(
        COUNTER, "Look-ups by outcome: hit, or the reason for missing K/V.", ("tier", "outcome")
    ),
    "hits_by_scope": Declared(COUNTER, "Hits: request, cross_request, cross_user.", ("scope",)),
    "events": Declared(COUNTER, "History events: cached, computed.", ("source",)),
    "bytes": Declared(COUNTER, "Bytes of K/V: read, written.", ("tier", "direction")),
    "evictions": Declared(COUNTER, "Entries evicted from a full tier.", ("tier",)),
    "not_kept": Declared(COUNTER, "Entries put but not kept.", ("tier",)),
    "not_finite": Declared(COUNTER, "Entries with NaN or infinity, which are not kept."),
    "dropped_writes": Declared(COUNTER, "Writes dropped, by reason.", ("tier", "reason")),
    "tier_failures": Declared(COUNTER, "Failures of a tier, by kind.", ("tier", "kind")),
    "flights": Declared(COUNTER, "Single-flight encodings: led, joined, timed_out.", ("outcome",)),
    "forgotten_bytes": Declared(COUNTER, "Bytes dropped by forgetting users.", ("tier",)),
    "seconds": Declared(
        HISTOGRAM, "Seconds of a lookup, get, put, encode, decode.", ("tier", "operation"), SECONDS
    ),
    "evicted_age_seconds": Declared(HISTOGRAM, "Age of K/V when it was evicted.", ("tier",), AGES),
    "held_bytes": Declared(GAUGE, "Bytes stored in a tier.", ("tier",)),
    "capacity_bytes": Declared(GAUGE, "Byte budget of a tier.", ("tier",)),
    "queue_length": Declared(GAUGE, "Queued writes.", ("tier",)),
    "queue_bytes": Declared(GAUGE, "Bytes of K/V in queued writes.", ("tier",)),
    "breaker_open": Declared(GAUGE, "Circuit breaker: 0 closed, 0.5 half-open, 1 open.", ("tier",)),
    "pinned_entries": Declared(GAUGE, "Entries leased by requests in flight."),
}


class Series(NamedTuple):
    """A metric's name and its labels, sorted by name."""

    name: str
    labels: tuple[tuple[str, str], ...]

    @property
    def label_values(self) -> tuple[str, ...]:
        """Label values in the order of the declaration."""
        value_by_label = dict(self.labels)
        return tuple(value_by_label[label] for label in DECLARED_BY_NAME[self.name].labels)


@dataclass(frozen=True)
class HistogramValue:
    """The state of a histogram.

    Attributes:
        bounds: the largest value of each bucket but the last, ascending.
        counts: observations in each bucket; the last bucket has those above all bounds.
        sum: of the observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    def quantile(self, q: float) -> float:
        """Return a quantile, interpolated linearly inside its bucket.

        Args:
            q: share of the observations, 0 to 1.

        Returns:
            The value; the highest bound if it lies above that, NaN without observations.

        Example:
            >>> HistogramValue((1.0, 2.0), (1, 4, 0), 7.5).quantile(0.6)
            1.5
        """
        rank = q * self.count
        num_below = 0
        for (low, high), num_inside in zip(
            pairwise((0.0, *self.bounds)), self.counts[:-1], strict=True
        ):
            if num_inside and num_below + num_inside >= rank:
                return low + (high - low) * (rank - num_below) / num_inside
            num_below += num_inside
        return self.bounds[-1] if self.count else math.nan


@dataclass(frozen=True)
class CacheSnapshot:
    """All metrics at one moment.

    Attributes:
        values: of counters that were updated and gauges that are registered.
        histograms: those with observations.
    """

    values: dict[Series, float]
    histograms: dict[Series, HistogramValue]

    def value(self, name: str, **labels: str) -> float:
        """Return a counter or gauge; 0.0 if it was never updated.

        Args:
            name: as declared.
            labels: some or all of its labels; the value is summed over the others.
        """
        declared = DECLARED_BY_NAME[name]
        assert declared.kind != HISTOGRAM, f"{name} is a histogram"
        assert labels.keys() <= {*declared.labels}, f"{name} has labels {declared.labels}"
        wanted = labels.items()
        found = (
            value
            for series, value in self.values.items()
            if series.name == name and wanted <= {*series.labels}
        )
        return sum(found, start=0.0)

    def hit_rate(self) -> float:
        """Return the share of history events whose K/V was cached; 0.0 without events."""
        num_events = self.value("events")
        return self.value("events", source="cached") / num_events if num_events else 0.0

    def to_json(self) -> dict[str, float]:
        """Return numbers by ``name{label=value,...}``; for a histogram count, sum, p50 and p99."""
        number_by_series = {_text(series): value for series, value in self.values.items()}
        for series, histogram in self.histograms.items():
            for suffix, number in (
                ("count", histogram.count),
                ("sum", histogram.sum),
                ("p50", histogram.quantile(0.5)),
                ("p99", histogram.quantile(0.99)),
            ):
                number_by_series[_text(series, suffix)] = number
        return number_by_series


class CacheMetrics:
    """Counters, gauges and histograms of one cache; thread-safe.

    Example:
        >>> metrics = CacheMetrics()
        >>> metrics.count("events", 30, source="cached")
        >>> metrics.count("events", 10, source="computed")
        >>> metrics.snapshot().hit_rate()
        0.75
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers_by_series = _NumbersBySeries()
        self._read_by_series: dict[Series, Callable[[], float]] = {}

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        series = _series(COUNTER, name, *labels.items())
        with self._lock:
            self._numbers_by_series[series][-1] += amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        series = _series(HISTOGRAM, name, *labels.items())
        bucket = bisect_left(DECLARED_BY_NAME[name].bounds, value)
        with self._lock:
            numbers = self._numbers_by_series[series]
            numbers[bucket] += 1
            numbers[-1] += value

    def gauge(self, name: str, read: Callable[[], float], **labels: str) -> None:
        """Register a gauge, which is read whenever a snapshot is taken.

        Args:
            name: as declared.
            read: called by the thread that takes the snapshot; replaces the one registered before
                for the same labels.
            labels: all of its labels.
        """
        series = _series(GAUGE, name, *labels.items())
        with self._lock:
            self._read_by_series[series] = read

    @contextmanager
    def timed(self, name: str, **labels: str) -> Iterator[None]:
        """Observe the seconds of a ``with`` block, also if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.observe(name, time.perf_counter() - start, **labels)

    def snapshot(self) -> CacheSnapshot:
        """Return counters and histograms of one moment, and gauges read right after it."""
        with self._lock:
            numbers_by_series = {s: [*numbers] for s, numbers in self._numbers_by_series.items()}
            read_by_series = dict(self._read_by_series)
        values, histograms = {}, {}
        for series, (*counts, total) in numbers_by_series.items():
            if counts:
                bounds = DECLARED_BY_NAME[series.name].bounds
                histograms[series] = HistogramValue(bounds, tuple(map(int, counts)), total)
            else:
                values[series] = total
        values.update((series, float(read())) for series, read in read_by_series.items())
        return CacheSnapshot(values, histograms)


class _NumbersBySeries(dict[Series, list[float]]):
    """For each series its bucket counts, if it is a histogram, then its sum."""

    def __missing__(self, series: Series) -> list[float]:
        declared = DECLARED_BY_NAME[series.name]
        num_buckets = len(declared.bounds) + 1 if declared.kind == HISTOGRAM else 0
        numbers = self[series] = [0.0] * (num_buckets + 1)
        return numbers


@cache  # Checking and sorting cost as much as counting; there are few tiers and reasons.
def _series(kind: str, name: str, *labels: tuple[str, str]) -> Series:
    declared = DECLARED_BY_NAME.get(name)
    names = sorted(label for label, _ in labels)
    assert declared is not None, f"{name} is not declared"
    assert declared.kind == kind, f"{name} is declared as a {declared.kind}, not a {kind}"
    assert sorted(declared.labels) == names, f"{name} has labels {declared.labels}, not {names}"
    return Series(name, tuple(sorted(labels)))


def _text(series: Series, suffix: str = "") -> str:
    name = f"{series.name}_{suffix}" if suffix else series.name
    labels = ",".join(f"{label}={value}" for label, value in series.labels)
    return f"{name}{{{labels}}}" if labels else name
