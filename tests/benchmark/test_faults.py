"""Latency under faults: every state is measured, and no answer goes unchecked."""

import shutil

import pytest

from torchrec_kvshare.benchmark.scenarios import faults as faults_benchmark
from torchrec_kvshare.benchmark.scenarios.faults import FaultsOptions, measure_faults
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.scoring.engine import Answer, Engine

OPTIONS = FaultsOptions(
    histories=[9], candidates=[4], dim=8, num_layers=1, num_heads=2, page_size=4
)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_benchmark, "TURN_S", 0.1)
    monkeypatch.setattr(faults_benchmark, "NUM_USERS", 7)
    monkeypatch.setattr(faults_benchmark, "NUM_CLIENTS", 3)


def test_every_state_of_the_store_is_measured() -> None:
    records = measure_faults(OPTIONS)
    value_by_state = {
        (record.case["path"], record.metric): record.value
        for record in records
        if record.case["tier"] == "remote"
    }
    assert len(value_by_state) == len(records) == 3 * 5
    for state in ("healthy", "frozen", "dead"):
        assert value_by_state[state, "requests"] > 0
        assert 0.0 < value_by_state[state, "p50_ms"] <= value_by_state[state, "p99_ms"]
        assert value_by_state[state, "max_score_difference"] <= faults_benchmark.TOLERANCE
    healthy = value_by_state["healthy", "p99_ms"]
    expected = value_by_state["frozen", "p99_ms"] / (50.0 + 2.0 * healthy)
    assert value_by_state["frozen", "p99_to_bound"] == pytest.approx(expected)


def test_a_wrong_score_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Engine.rank

    def wrong(engine: Engine, requests: list) -> list[Answer]:  # type: ignore[type-arg]
        answers = rank(engine, requests)
        if engine.store is not None:
            answers[0].scores[0] += 1e-3
        return answers

    monkeypatch.setattr(Engine, "rank", wrong)
    with pytest.raises(ParityError, match=r"differs by 0\.00"):
        measure_faults(OPTIONS)


def test_without_a_server_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="needs redis-server on PATH"):
        measure_faults(OPTIONS)
