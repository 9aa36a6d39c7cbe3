"""A trace while versions are published, and first requests with a prefetch ahead of them."""

from typing import Any

import pytest

from torchrec_kvshare.benchmark import options
from torchrec_kvshare.benchmark.request_traces import zipf_trace
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.scenarios import publish
from torchrec_kvshare.benchmark.scenarios.ahead import AheadOptions, measure_ahead_of_requests
from torchrec_kvshare.benchmark.scenarios.publish import PublishOptions, measure_publish
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.serving import models

SIZES: dict[str, Any] = {"dim": 8, "num_layers": 1, "num_heads": 2, "page_size": 4}
SMALL = PublishOptions(
    histories=[20], candidates=[3], requests=150, minutes=[1], warm_users=[0, 3], **SIZES
)


def figures_of(records: list[Record]) -> dict[tuple[str, int], dict[str, float]]:
    """Metrics by path and number of users that a version starts with."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for record in records:
        path, warm_users = str(record.case["path"]), int(record.case["warm_users"])
        found.setdefault((path, warm_users), {})[record.metric] = record.value
    return found


def test_a_new_ranking_stage_costs_no_hit_and_other_weights_do() -> None:
    """Publishing any version lost all K/V."""
    figures = figures_of(measure_publish(SMALL))
    never, stage = figures["never", 0], figures["ranking_stage", 0]
    cold, warm = figures["everything", 0], figures["everything", 3]
    trace = zipf_trace(20, 150, 3, SMALL.seed)
    minutes = (trace.requests[-1].time - trace.requests[0].time) // 60
    assert [one["num_versions"] for one in (stage, cold, warm)] == [minutes] * 3
    assert never["num_versions"] == 0.0
    assert 0.5 < never["hit_rate"] == stage["hit_rate"]
    assert stage["hit_rate_loss"] == 0.0
    assert cold["hit_rate"] < warm["hit_rate"] < never["hit_rate"]
    assert cold["hit_rate_loss"] == never["hit_rate"] - cold["hit_rate"]
    assert (cold["warm_up_ms"], stage["warm_up_ms"]) == (0.0, 0.0)
    assert warm["warm_up_ms"] > 0.0
    assert all(0.0 < one["p50_ms"] <= one["p99_ms"] for one in figures.values())


def test_scores_that_the_cache_changes_have_no_hit_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "TOLERANCE", -1.0)
    with pytest.raises(ParityError, match="scores differ by"):
        measure_publish(SMALL)


def test_a_warm_up_leaves_most_of_the_time_to_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took both cores for as long as all hot users needed."""
    now, slept = [0.0], []

    class Slow:
        """An engine whose encodings take two seconds."""

        def prefetch(self, users: list[str]) -> None:
            assert len(users) == 1
            now[0] += 2.0

    monkeypatch.setattr(models.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(models.time, "sleep", slept.append)
    slow: Any = Slow()
    users: Any = ["a", "b", "c"]
    assert models.warm_up(slow, users, models.WARM_SHARE) == 6.0
    assert slept == [6.0] * 3
    slept.clear()
    assert models.warm_up(slow, users, 1.0) == 6.0
    assert sum(slept) == 0.0


def test_prefetched_users_hit_at_their_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MIN_REPEATS", 1)
    small = AheadOptions(
        histories=[9], candidates=[3], requests=12, qps=8, lead_ms=400, repeats=1, **SIZES
    )
    records = measure_ahead_of_requests(small)
    figures = {(str(one.case["path"]), one.metric): one.value for one in records}
    assert figures["without", "hit_rate"] == 0.0
    assert figures["with", "hit_rate"] > 0.5  # A busy machine may be late.
    assert figures["with", "p99_ratio"] == pytest.approx(
        figures["with", "p99_ms"] / figures["without", "p99_ms"]
    )
