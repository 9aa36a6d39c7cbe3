"""Export of cache metrics to TensorBoard and Prometheus."""

from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torchrec_kvshare.cache.metrics import (
    COUNTER,
    DECLARED_BY_NAME,
    GAUGE,
    HISTOGRAM,
    CacheMetrics,
    CacheSnapshot,
    HistogramValue,
    Series,
)
from torchrec_kvshare.errors import MissingExtraError

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from torch.utils.tensorboard import SummaryWriter

PREFIX = "kvshare_cache"
UNITS = ("bytes", "seconds")


def write_scalars(snapshot: CacheSnapshot, writer: "SummaryWriter", step: int) -> None:
    """Write counters, gauges, and p50 and p99 of histograms to TensorBoard.

    Args:
        snapshot: the metrics.
        writer: its tags are ``cache/<name>/<label values>``; a histogram's tags end in ``/p50`` and
            ``/p99``.
        step: TensorBoard's global step.
    """
    for series, value in snapshot.values.items():
        writer.add_scalar(_tag(series), value, step)
    for series, histogram in snapshot.histograms.items():
        writer.add_scalar(f"{_tag(series)}/p50", histogram.quantile(0.5), step)
        writer.add_scalar(f"{_tag(series)}/p99", histogram.quantile(0.99), step)


class PrometheusCollector:
    """A collector for a prometheus_client registry; its metrics are ``kvshare_cache_<name>``.

    Args:
        metrics: of the cache; every scrape takes a snapshot.

    Raises:
        MissingExtraError: if prometheus_client is not installed.
    """

    def __init__(self, metrics: CacheMetrics) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise MissingExtraError("metrics", "exporting metrics to Prometheus") from error
        self._metrics = metrics
        self._family_by_kind: dict[str, type[Any]] = {
            COUNTER: core.CounterMetricFamily,
            GAUGE: core.GaugeMetricFamily,
            HISTOGRAM: core.HistogramMetricFamily,
        }

    def collect(self) -> "Iterable[Metric]":
        """Return every declared metric, even without samples: a registry learns the names here."""
        snapshot = self._metrics.snapshot()
        family_by_name = {
            name: self._family_by_kind[declared.kind](
                f"{PREFIX}_{name}", declared.help, labels=declared.labels, unit=_unit(name)
            )
            for name, declared in DECLARED_BY_NAME.items()
        }
        for series, value in snapshot.values.items():
            family_by_name[series.name].add_metric(series.label_values, value)
        for series, histogram in snapshot.histograms.items():
            buckets = _cumulative(histogram)
            family_by_name[series.name].add_metric(series.label_values, buckets, histogram.sum)
        return family_by_name.values()


def _tag(series: Series) -> str:
    return "/".join(("cache", series.name, *series.label_values))


def _unit(name: str) -> str:
    last = name.rpartition("_")[2]
    return last if last in UNITS else ""


def _cumulative(histogram: HistogramValue) -> list[tuple[str, float]]:
    """Return the number of observations at or below each bound, as Prometheus wants it."""
    bounds = (*map(str, histogram.bounds), "+Inf")
    return [*zip(bounds, accumulate(histogram.counts), strict=True)]
