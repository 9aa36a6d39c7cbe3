"""Compare the paths on requests of a trained model: merged, shared in a request, from the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
from torchrec.models.dlrm import DLRM

from torchrec_kvshare.benchmark.baselines.merged import merged_ranker
from torchrec_kvshare.benchmark.paths import CROSS_REQUEST_HIT, REQUEST_SHARED, UNCACHED_MERGED
from torchrec_kvshare.benchmark.plots import BLUE, GREEN, RED
from torchrec_kvshare.benchmark.timing import timed
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.plots import figure_class

NUM_WARM_UP = 3  # requests: TorchScript rewrites a program during its first calls, for seconds
COLOR_BY_PATH = {UNCACHED_MERGED: RED, REQUEST_SHARED: BLUE, CROSS_REQUEST_HIT: GREEN}
MERGED_CHUNK_ROWS = 16_384  # events and candidates at once; the fastest of those tried at dim 64


@dataclass(frozen=True)
class PathFigures:
    """Figures of one path.

    Attributes:
        path: ``uncached_merged``, ``request_shared`` or ``cross_request_hit``.
        num_requests: requests that were scored.
        latency_ms: median latency of a request.
        mean_ms: mean latency.
        requests_per_s: throughput over all requests.
        kv_bytes: K/V kept between requests once all are scored.
        max_score_difference: greatest difference from a score of ``request_shared``.
    """

    path: str
    num_requests: int
    latency_ms: float
    mean_ms: float
    requests_per_s: float
    kv_bytes: int
    max_score_difference: float


def compare_paths(
    model: DLRM, uncached: Engine, cached: Engine, requests: Sequence[Request], num_merged: int
) -> list[PathFigures]:
    """Score every request alone on each path, warmed up and with every history in the cache.

    Args:
        model: the trained model, in eval mode, for the merged path.
        uncached: an engine without a cache.
        cached: an engine with a cache.
        requests: the requests.
        num_merged: how many requests are scored on the merged path, which is slow.

    Returns:
        One row per path.
    """
    assert cached.store is not None
    merged = merged_ranker(model, MERGED_CHUNK_ROWS).eval()
    for engine in (uncached, cached):
        for request in requests[:NUM_WARM_UP]:
            engine.rank([request])

    def score_merged(request: Request) -> list[float]:
        batch = collate([request], uncached.schema)
        with torch.no_grad():
            logits = merged(batch.dense_features, batch.sparse_features)
        return torch.sigmoid(logits[:, 0]).tolist()

    score_by_path: dict[str, Callable[[Request], list[float]]] = {
        UNCACHED_MERGED: score_merged,
        REQUEST_SHARED: lambda request: uncached.rank([request])[0].ranking_scores,
        CROSS_REQUEST_HIT: lambda request: cached.rank([request])[0].ranking_scores,
    }
    timings: dict[str, list[_Timing]] = {path: [] for path in score_by_path}
    for index, request in enumerate(requests):
        expected = score_by_path[REQUEST_SHARED](request)
        # The cache may hold the history of another request of this user.
        cached.rank([request])
        # The paths take turns on every request, so that a busy moment slows them all.
        for path, score in score_by_path.items():
            if path != UNCACHED_MERGED or index < num_merged:
                scores, latency_ms = timed(partial(score, request))
                # numpy's max, in which a NaN stays one; Python's may lose it.
                difference = np.abs(np.subtract(scores, expected)).max(initial=0.0)
                timings[path].append(_Timing(latency_ms, float(difference)))
    kept_bytes = {CROSS_REQUEST_HIT: sum(cache.held_bytes for cache in cached.store.caches)}
    return [_figures(path, rows, kept_bytes.get(path, 0)) for path, rows in timings.items()]


def comparison_table(figures: Sequence[PathFigures]) -> str:
    """Return the figures as fixed-width text, with speed-ups over the first path."""
    lines = [
        f"{'path':<18} {'requests':>8} {'p50':>10} {'mean':>10} {'throughput':>12} "
        f"{'speedup':>8} {'K/V held':>10} {'max score difference':>21}"
    ]
    for row in figures:
        lines.append(
            f"{row.path:<18} {row.num_requests:>8} {row.latency_ms:>7.2f} ms "
            f"{row.mean_ms:>7.2f} ms {row.requests_per_s:>10.1f}/s "
            f"{figures[0].latency_ms / row.latency_ms:>7.1f}x "
            f"{row.kv_bytes / 2**20:>6.1f} MiB {row.max_score_difference:>21.1e}"
        )
    return "\n".join(lines)


def plot_comparison(path: Path, figures: Sequence[PathFigures]) -> None:
    """Draw a bar for each path, its median latency.

    Args:
        path: the PNG file to write.
        figures: as ``compare_paths`` returns them.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = figure_class()(figsize=(7.0, 2.4), layout="constrained")
    panel = figure.subplots()
    shown = figures[::-1]  # The first one on top.
    bars = panel.barh(
        [row.path for row in shown],
        [row.latency_ms for row in shown],
        color=[COLOR_BY_PATH[row.path] for row in shown],
    )
    panel.bar_label(bars, [f"{row.latency_ms:.1f} ms" for row in shown], padding=3)
    latencies_ms = [row.latency_ms for row in figures]
    panel.set_xscale("log")
    panel.set_xlim(min(1.0, min(latencies_ms)), 6 * max(latencies_ms))  # with room for labels
    panel.set_xlabel("median latency of a request [ms]")
    figure.savefig(path, dpi=120)


class _Timing(NamedTuple):
    latency_ms: float
    difference: float


def _figures(path: str, timings: Sequence[_Timing], kv_bytes: int) -> PathFigures:
    latencies_ms = [timing.latency_ms for timing in timings]
    return PathFigures(
        path=path,
        num_requests=len(timings),
        latency_ms=median(latencies_ms),
        mean_ms=mean(latencies_ms),
        requests_per_s=len(timings) / sum(latencies_ms) * 1e3,
        kv_bytes=kv_bytes,
        max_score_difference=float(np.max([timing.difference for timing in timings])),
    )
