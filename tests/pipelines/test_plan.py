"""A plan: its bytes are those of the cache, its prices follow from its hit rates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.pipelines.commands import composed, run_pipeline
from torchrec_kvshare.cache.kv_cache import PAGES
from torchrec_kvshare.config import CacheConfig, PlanConfig, PlannedTier, TrafficConfig, checked
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.planning.plan import make_plan, plan_text
from torchrec_kvshare.planning.sizes import given_shape, shape_of

CONFIG = PlanConfig(
    output="never_written",
    traffic=TrafficConfig(users=300_000),
    hit_rates=[0.8, 0.9, 0.99],
    growth=[600_000],
    ttl_s=3600.0,
    idle_ttl_s=3600.0,
    prefill_ms=6.0,
    score_ms=2.0,
    disk=PlannedTier("int8", fetch_ms=0.5, gib_hour=1.0),
    requests=20_000,
)


def test_a_plan_answers_with_both_hit_rates_and_says_what_is_out_of_reach() -> None:
    plan = make_plan(CONFIG)
    reached, low, high = plan.points
    assert reached.is_reachable
    assert reached.che == pytest.approx(0.8, abs=1e-3)
    assert reached.simulated == pytest.approx(reached.che, abs=0.02)
    assert not low.is_reachable
    assert not high.is_reachable
    assert 0.8 < high.che < 0.9
    assert {need.wanted for need in plan.needs} == {0.0, 0.8}
    text = plan_text(plan, CONFIG)
    assert f"out of reach: at most {high.che:.3f} before K/V expires" in text
    assert plan.rule in text


def test_cores_machines_and_prices_follow_from_the_hit_rate_by_hand() -> None:
    plan = make_plan(CONFIG)
    [none, *needs] = plan.needs
    [disk] = [need for need in needs if need.tier == "disk"]
    requests_per_s = 300_000 * 2 * 5 / 86_400 * 3
    assert none.ms_per_request == 8.0
    assert disk.ms_per_request == pytest.approx(2.0 + 0.8 * 0.5 + 0.2 * 6.0)
    assert disk.cores == pytest.approx(requests_per_s * disk.ms_per_request / 1e3)
    assert disk.num_bytes == pytest.approx(plan.points[0].num_held * plan.bytes_by_tier["disk"])
    price = disk.cores * 0.04 + disk.num_bytes / 2**30 * 1.0
    assert disk.price_per_hour == pytest.approx(price)
    assert (none.machines, disk.machines) == (1, 1)


def test_twice_the_users_need_twice_the_bytes_where_all_come_equally_often() -> None:
    even = replace(CONFIG, traffic=TrafficConfig(users=300_000, zipf=0.0), hit_rates=[0.8])
    plan = make_plan(even)
    by_tier = {need.tier: need for need in plan.needs if need.wanted}
    for need in plan.growth:
        assert need.population == 600_000
        assert need.num_bytes == pytest.approx(2 * by_tier[need.tier].num_bytes, rel=1e-3)


def test_memory_of_a_machine_decides_where_it_is_short_and_only_in_a_process() -> None:
    small = replace(CONFIG, hit_rates=[0.8], machine=replace(CONFIG.machine, memory_gib=0.001))
    needs = {need.tier: need for need in make_plan(small).needs if need.wanted}
    assert needs[PAGES].machines > 10
    assert needs["remote"].machines == 1


def test_bytes_of_an_artifact_are_those_that_its_cache_holds(
    artifact: Path, requests_file: Path
) -> None:
    loaded = load_artifact(artifact)
    engine = new_engine(loaded, CacheConfig())
    shape = shape_of(artifact, None)
    with requests_file.open() as lines:
        request = parse_request(json.loads(next(lines)), loaded.schema)
    engine.rank([request])
    assert engine.store is not None
    held_bytes = engine.store.metrics.snapshot().value("held_bytes", tier=PAGES)
    assert held_bytes == shape.user_bytes(PAGES, "float32", request.num_events, 32)


def test_packets_are_smaller_in_fewer_bits_and_pages_have_one_codec() -> None:
    shape = given_shape(dim=64, num_layers=2, num_heads=4, max_history=128)
    wide, narrow = (shape.user_bytes("disk", c, 128, 32) for c in ("float32", "int8"))
    assert 0.25 < narrow / wide < 0.3
    assert shape.user_bytes(PAGES, "float32", 97, 32) == shape.user_bytes(PAGES, "float32", 128, 32)
    with pytest.raises(ConfigError, match="codec of tier pages is 'int8'; attention reads float32"):
        shape.user_bytes(PAGES, "int8", 128, 32)


def test_without_times_the_plan_says_whose_they_are() -> None:
    plan = make_plan(replace(CONFIG, prefill_ms=None, score_ms=None, hit_rates=[0.8]))
    assert plan.prefill_ms > 0.0
    assert plan.score_ms > 0.0
    text = plan_text(plan, replace(CONFIG, prefill_ms=None))
    assert "this machine's roofline, a lower bound" in text
    assert "roofline" not in plan_text(plan, CONFIG)


def test_the_pipeline_writes_records_plots_and_text(
    tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"artifact={artifact}", "traffic.users=5000", "growth=[10000]", "hit_rates=[0.8]")
    run_pipeline("plan", *given, "requests=5000", "threads=1", f"output={tmp_path / 'plan'}")
    results = json.loads((tmp_path / "plan" / "results.json").read_text())
    metrics = {record["metric"] for record in results["records"]}
    assert metrics == {
        *("hit_rate", "bytes", "requests_per_core_s", "cores", "machines", "price_per_hour")
    }
    assert (tmp_path / "plan" / "hit_rate.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plan" / "requests_per_core_s.png").exists()
    assert list((tmp_path / "plan" / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert "10,000" in printed
    assert f"wrote {tmp_path / 'plan'}" in printed


def test_the_file_and_the_dataclass_have_the_same_defaults() -> None:
    config = checked(composed("plan", "output=x"), PlanConfig)
    assert config.traffic == TrafficConfig()
    assert config.growth == PlanConfig(output="x").growth
