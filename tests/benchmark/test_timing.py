"""Timed calls and cost curves."""

import time

import pytest

from torchrec_kvshare.benchmark import timing
from torchrec_kvshare.benchmark.timing import (
    fusion_costs,
    interleaved_medians,
    seed_model_speedup,
)


def test_fusion_costs_of_a_straight_line_are_its_own() -> None:
    queues = [1, 5, 50, 1000]
    history_cost, candidate_cost = fusion_costs(queues, [7.5 + 0.02 * n for n in queues])
    assert history_cost == pytest.approx(7.5)
    assert candidate_cost == pytest.approx(0.02)
    assert candidate_cost / history_cost == pytest.approx(0.02 / 7.5)


def test_fusion_costs_minimise_the_squared_error() -> None:
    """By hand: through (0, 1), (1, 0), (2, 2) the line of least squares is 0.5 + 0.5 N."""
    assert fusion_costs([0, 1, 2], [1.0, 0.0, 2.0]) == pytest.approx((0.5, 0.5))


def test_paths_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND_MS", 0.0001)
    called: list[str] = []

    def call(path: str) -> None:
        time.sleep(0.001)
        called.append(path)

    calls = {"one": lambda: call("one"), "other": lambda: call("other")}
    medians = interleaved_medians(calls, repeats=5)
    assert called == ["one", "other"] * 5
    assert all(1.0 <= value < 1000.0 for value in medians.values())  # ms


def test_a_quick_path_is_called_more_often_in_its_turn() -> None:
    called: list[int] = []
    start = time.perf_counter()
    interleaved_medians({"quick": lambda: called.append(1)}, repeats=1)
    assert len(called) > 1
    assert time.perf_counter() - start < 100 * timing.ROUND_MS / 1e3


@pytest.mark.parametrize(
    ("num_candidates", "speedup"), [(1, 1.0), (10, 10 / 2.35), (1000, 1000 / 150.85)]
)
def test_the_seed_model_follows_its_cost_curve(num_candidates: int, speedup: float) -> None:
    assert seed_model_speedup(num_candidates) == pytest.approx(speedup)
