"""The live view of the page (rate, quantiles, last misses), and metrics in TensorBoard."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.serving.metrics import LiveView, ServerMetrics

MISS = CacheUse("miss", "cold", 0, 7, "none")


def test_the_rate_is_of_the_last_seconds() -> None:
    now = [100.0]
    view = LiveView(clock=lambda: now[0])
    for _ in range(40):
        now[0] += 0.5
        view.end("ok", 3.0)
    assert view.to_json()["qps"] == pytest.approx(2.0, rel=0.1)
    now[0] += 60.0
    assert view.to_json()["qps"] == 0.0
    assert view.to_json()["uptime_s"] == 80.0


def test_a_server_that_just_started_shows_no_rate_of_ten_seconds() -> None:
    now = [0.0]
    view = LiveView(clock=lambda: now[0])
    for _ in range(10):
        view.end("ok", 1.0)
    now[0] = 2.0
    assert view.to_json()["qps"] == 5.0


def test_latencies_are_of_answered_requests() -> None:
    view = LiveView()
    assert view.to_json()["latency_ms"] == {"p50": None, "p90": None, "p99": None}
    for latency_ms in range(1, 102):
        view.end("ok", float(latency_ms))
    view.end("deadline", 5000.0)
    assert view.to_json()["latency_ms"] == {"p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert view.to_json()["requests"]["deadline"] == 1


def test_the_newest_misses_come_first_and_old_ones_are_dropped() -> None:
    view = LiveView()
    for number in range(30):
        view.miss("kvshare", number, MISS)
    misses = view.to_json()["misses"]
    assert [miss["request_id"] for miss in misses] == list(range(29, 9, -1))
    assert misses[0]["reason"] == "cold"
    assert misses[0]["computed_events"] == 7


def test_tensorboard_gets_what_prometheus_gets(tmp_path: Path) -> None:
    cache = CacheMetrics()
    metrics = ServerMetrics(cache)
    cache.count("lookups", 3, tier="pages", outcome="hit")
    metrics.count("requests", "shop", "grpc", "ok", amount=5)
    metrics.observe("request_seconds", 0.25, "shop", "grpc")
    with SummaryWriter(str(tmp_path)) as writer:
        metrics.write(writer, step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    values = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    assert values["kvshare_requests_total/shop/grpc/ok"].value == 5.0
    assert values["kvshare_request_seconds_sum/shop/grpc"].value == 0.25
    assert values["kvshare_cache_lookups_total/pages/hit"].value == 3.0
    assert {value.step for value in values.values()} == {7}
    assert not [tag for tag in values if "_bucket" in tag or "_created" in tag]
