"""Time calls: paths take turns, as no machine is ever idle. And the seed model's cost curve."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import numpy as np

MIN_REPEATS = 5
ROUND_MS = 50.0  # a turn of a path repeats its call until that much time has passed

# Cost of the seed model's fused scoring of N candidates, in scorings of one: 0.85 + 0.15 N.
SEED_HISTORY_COST = 0.85
SEED_CANDIDATE_COST = 0.15

Path = TypeVar("Path", bound=Hashable)
Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Call and return the result and the milliseconds it took.

    Example:
        >>> result, latency_ms = timed(lambda: sum(range(10)))
        >>> result, latency_ms > 0
        (45, True)
    """
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1e3


def interleaved_medians(
    call_by_path: Mapping[Path, Callable[[], object]], repeats: int
) -> dict[Path, float]:
    """Return the median time of each call; the paths take turns, so a busy minute slows them all.

    Args:
        call_by_path: the calls to compare, each called at least once before.
        repeats: turns of each path; a turn is one call, or as many as fit into ``ROUND_MS``.

    Returns:
        Milliseconds by path.

    Example:
        >>> medians = interleaved_medians({"list": list, "dict": dict}, repeats=5)
        >>> sorted(medians), medians["list"] < ROUND_MS
        (['dict', 'list'], True)
    """
    samples_ms: dict[Path, list[float]] = {path: [] for path in call_by_path}
    for _ in range(repeats):
        for path, call in call_by_path.items():
            samples_ms[path] += _turn(call)
    return {path: median(samples) for path, samples in samples_ms.items()}


def fusion_costs(candidates: Sequence[int], latencies_ms: Sequence[float]) -> tuple[float, float]:
    """Fit latency(N) = history_cost + candidate_cost × N by least squares.

    Args:
        candidates: the N measured, at least two distinct values.
        latencies_ms: latency at each N.

    Returns:
        ``history_cost`` and ``candidate_cost`` in ms; ``fusion_cost_ratio`` is the second over the
        first.

    Example:
        >>> history_cost, candidate_cost = fusion_costs([1, 3, 5], [12.0, 16.0, 20.0])
        >>> round(history_cost, 6), round(candidate_cost, 6)
        (10.0, 2.0)
    """
    candidate_cost, history_cost = np.polyfit(candidates, latencies_ms, deg=1)
    return float(history_cost), float(candidate_cost)


def seed_model_speedup(num_candidates: int) -> float:
    """Return the speed-up over one-by-one scoring that the seed model's cost curve gives for N.

    Example:
        >>> seed_model_speedup(1), round(seed_model_speedup(500), 2)
        (1.0, 6.59)
    """
    return num_candidates / (SEED_HISTORY_COST + SEED_CANDIDATE_COST * num_candidates)


def _turn(call: Callable[[], object]) -> list[float]:
    samples_ms: list[float] = []
    start = time.perf_counter()
    while not samples_ms or (time.perf_counter() - start) * 1e3 < ROUND_MS:
        _, latency_ms = timed(call)
        samples_ms.append(latency_ms)
    return samples_ms
