"""The same requests scored merged, with K/V shared in a request, and with K/V from a warm cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torchrec.models.dlrm import DLRM

from torchrec_kvshare.benchmark.baselines.merged import MergedEmbeddingBagCollection, share_weights
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection
from torchrec_kvshare.scoring.engine import Engine

NUM_WARM_UP = 3  # requests: TorchScript rewrites a program in its first calls, which takes seconds
MERGED_CHUNK_ROWS = 16_384  # events and candidates at once; the fastest of those tried at dim 64


@dataclass(frozen=True)
class PathFigures:
    """How one path did.

    Attributes:
        path: ``uncached_merged``, ``request_shared`` or ``cross_request_hit``.
        num_requests: scored.
        latency_ms: median of a request.
        requests_per_s: over all requests.
        kv_bytes: held between requests when all were scored.
        max_score_difference: to the scores of ``request_shared``.
    """

    path: str
    num_requests: int
    latency_ms: float
    requests_per_s: float
    kv_bytes: int
    max_score_difference: float


def compare_paths(
    model: DLRM, uncached: Engine, cached: Engine, requests: Sequence[Request], num_merged: int
) -> list[PathFigures]:
    """Score every request alone, on each path, warmed up and with every history in the cache.

    Args:
        model: the trained model, in eval mode, for the merged path.
        uncached: an engine without a cache.
        cached: an engine with a cache.
        requests: to score.
        num_merged: only so many of them go the merged way, which is slow.

    Returns:
        One row per path.
    """
    assert cached.store is not None
    merged = merged_dlrm(model)
    cached.rank(requests)
    for engine in (uncached, cached):
        for request in requests[:NUM_WARM_UP]:
            engine.rank([request])

    def score_merged(request: Request) -> list[float]:
        batch = collate([request], uncached.schema)
        with torch.no_grad():
            logits = merged(batch.dense_features, batch.sparse_features)
        return torch.sigmoid(logits.squeeze(1)).tolist()

    score_by_path: dict[str, Callable[[Request], list[float]]] = {
        "uncached_merged": score_merged,
        "request_shared": lambda request: uncached.rank([request])[0].scores,
        "cross_request_hit": lambda request: cached.rank([request])[0].scores,
    }
    timings: dict[str, list[_Timing]] = {path: [] for path in score_by_path}
    for place, request in enumerate(requests):
        expected = score_by_path["request_shared"](request)
        # What is cached of its user may be another request's history.
        cached.rank([request])
        # The paths take turns on every request, so that a busy moment meets them all.
        for path, score in score_by_path.items():
            if path != "uncached_merged" or place < num_merged:
                timings[path].append(_timed(score, request, expected))
    held = {"cross_request_hit": sum(cache.held_bytes for cache in cached.store.caches)}
    return [_figures(path, rows, held.get(path, 0)) for path, rows in timings.items()]


def merged_dlrm(model: DLRM) -> DLRM:
    """The same model, one row per candidate, its history encoded again for each."""
    collection = next(m for m in model.modules() if isinstance(m, KVShareEmbeddingBagCollection))
    replacement = MergedEmbeddingBagCollection(collection, MERGED_CHUNK_ROWS)
    return share_weights(model, collection, replacement).eval()


def comparison_table(figures: Sequence[PathFigures]) -> str:
    """The figures as fixed-width text, speed-ups against the first path."""
    lines = [
        f"{'path':<18} {'requests':>8} {'latency':>10} {'throughput':>12} {'speedup':>8} "
        f"{'K/V held':>10} {'max score difference':>21}"
    ]
    for row in figures:
        lines.append(
            f"{row.path:<18} {row.num_requests:>8} {row.latency_ms:>7.2f} ms "
            f"{row.requests_per_s:>10.1f}/s {figures[0].latency_ms / row.latency_ms:>7.1f}x "
            f"{row.kv_bytes / 2**20:>6.1f} MiB {row.max_score_difference:>21.1e}"
        )
    return "\n".join(lines)


class _Timing(NamedTuple):
    latency_ms: float
    difference: float


def _timed(
    score: Callable[[Request], list[float]], request: Request, expected: list[float]
) -> _Timing:
    start = time.perf_counter()
    scores = score(request)
    latency_ms = (time.perf_counter() - start) * 1e3
    # numpy's max, in which a NaN stays one; Python's may lose it.
    difference = np.abs(np.subtract(scores, expected)).max(initial=0.0)
    return _Timing(latency_ms, float(difference))


def _figures(path: str, timings: Sequence[_Timing], kv_bytes: int) -> PathFigures:
    latencies_ms = [timing.latency_ms for timing in timings]
    return PathFigures(
        path,
        len(timings),
        median(latencies_ms),
        len(timings) / sum(latencies_ms) * 1e3,
        kv_bytes,
        float(np.max([timing.difference for timing in timings])),
    )
