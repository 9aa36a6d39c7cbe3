"""Tiers return what was put, records name their case, and an artifact gets its break-even."""

import logging
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis

from tests.worlds import SCHEMA, make_dlrm
from torchrec_kvshare.benchmark import timing
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.benchmark.scenarios import tiers as tiers_benchmark
from torchrec_kvshare.benchmark.scenarios.tiers import TiersOptions
from torchrec_kvshare.cache.break_even import break_even_events
from torchrec_kvshare.cache.record import KVRecord
from torchrec_kvshare.cache.tiers import Found, HostTier
from torchrec_kvshare.config import CacheConfig, DiskConfig, HostConfig
from torchrec_kvshare.deploy.redis_server import redis_server
from torchrec_kvshare.errors import ConfigError, ParityError, TierError
from torchrec_kvshare.export.artifact import add_measured, read_artifact
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.ranking import RankingModel

DIM, NUM_LAYERS, NUM_HEADS, PAGE_SIZE = 12, 2, 3, 8
ROW_BYTES = 2 * NUM_LAYERS * DIM * 4
HISTORY, LONG_HISTORY = 40, 72  # events
SEED = 3
LENGTHS = {16, 32, HISTORY, 64, LONG_HISTORY}
WINDOW, SHORT = 14, 7  # events of the artifact's window, and of a history that it holds
# The remote tier needs a server; the others are measured without it too.
HAS_REDIS = shutil.which("redis-server") is not None
SHELVES = {
    (tier, codec)
    for tier in (("host", "disk", "remote") if HAS_REDIS else ("host", "disk"))
    for codec in ("float32", "int8")
}

Calls = Mapping[str, Callable[[], object]]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Short turns: no test here checks times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUND_MS", 0.01)
        yield


@pytest.fixture
def no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)


@pytest.fixture(scope="module")
def records(small: None) -> list[Record]:
    return measure("tiers", options_of(HISTORY, long_histories=[LONG_HISTORY]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "artifact"
    export_model(RankingModel(make_dlrm(0)).eval(), SCHEMA, folder)
    return folder


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy, as figures are written into it."""
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


def options_of(*histories: int, **more: Any) -> TiersOptions:
    return TiersOptions(
        histories=[*histories],
        dim=DIM,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        page_size=PAGE_SIZE,
        seed=SEED,
        **{"long_histories": []} | more,
    )


def values(records: list[Record], metric: str) -> dict[tuple[Any, Any, Any], float]:
    """Figures by tier, codec and history."""
    found = {}
    for record in records:
        if record.metric == metric:
            key = tuple(record.case.get(name) for name in ("tier", "codec", "history"))
            assert key not in found
            found[key] = record.value
    return found  # type: ignore[return-value]


# --- records


def test_every_tier_codec_and_length_has_its_figures(records: list[Record]) -> None:
    units = {record.metric: record.unit for record in records}
    assert units == {
        "fetch_ms": "ms",
        "put_ms": "ms",
        "prefill_ms": "ms",
        "fetch_to_prefill": "x",
        "bytes": "bytes",
        "break_even_events": "events",
    }
    cells = {(*shelf, length) for shelf in SHELVES for length in LENGTHS}
    for metric in ("fetch_ms", "put_ms", "fetch_to_prefill", "bytes"):
        assert set(values(records, metric)) == cells
    assert set(values(records, "prefill_ms")) == {(None, None, length) for length in LENGTHS}
    assert set(values(records, "break_even_events")) == {(*shelf, None) for shelf in SHELVES}


def test_records_have_the_sizes_of_the_model(records: list[Record]) -> None:
    for record in records:
        case = record.case
        assert record.scenario == "tiers"
        assert (case["encoder"], case["dim"], case["layers"]) == ("causal", DIM, NUM_LAYERS)
        path = "prefill" if "tier" not in case else f"{case['tier']}_{case['codec']}"
        assert case["path"] == path


def test_ratios_are_those_of_the_times(records: list[Record]) -> None:
    fetch_ms, prefill_ms = values(records, "fetch_ms"), values(records, "prefill_ms")
    for (tier, codec, length), ratio in values(records, "fetch_to_prefill").items():
        expected = fetch_ms[tier, codec, length] / prefill_ms[None, None, length]
        assert ratio == pytest.approx(expected)
    ratios = values(records, "fetch_to_prefill")
    for (tier, codec, _), least in values(records, "break_even_events").items():
        of_shelf = {length: ratios[tier, codec, length] for length in LENGTHS}
        assert least == break_even_events(of_shelf)


def test_a_packet_has_the_bytes_of_its_rows_and_a_header(records: list[Record]) -> None:
    num_bytes = values(records, "bytes")
    for (tier, codec, length), value in num_bytes.items():
        assert value == num_bytes["host", codec, length]
        if codec == "float32":
            header = value - length * ROW_BYTES
            assert 0 < header < 1000
            assert value / 4 < num_bytes[tier, "int8", length] < value


def test_every_kind_of_encoder_is_measured(no_redis: None) -> None:
    records = measure("tiers", options_of(16, encoders=[*KINDS]))
    found = {record.case["encoder"] for record in records if record.metric == "fetch_to_prefill"}
    assert found == set(KINDS)


def test_without_a_server_the_log_says_so(no_redis: None, caplog: pytest.LogCaptureFixture) -> None:
    records = measure("tiers", options_of(5))
    assert {record.case.get("tier") for record in records} == {None, "host", "disk"}
    assert "redis-server is not on PATH: the remote tier is not measured" in caplog.text


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="histories and long_histories are empty"):
        measure("tiers", options_of())


# --- what makes a figure worth nothing


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_kv_that_is_not_what_was_put_is_found_out(
    monkeypatch: pytest.MonkeyPatch, no_redis: None, codec: str
) -> None:
    unpack = tiers_benchmark.unpack

    def wrong(*arguments: Any, **options: Any) -> KVRecord:
        record = unpack(*arguments, **options)
        if arguments[3].name == codec:
            last = record.kv.view(-1)[-1]
            # The smallest change of a float32; for int8 more than half a step.
            last.copy_(torch.nextafter(last, last + 1) if codec == "float32" else last + 0.1)
        return record

    monkeypatch.setattr(tiers_benchmark, "unpack", wrong)
    with pytest.raises(
        ParityError, match=f"K/V of 16 events from host_{codec} is not what was put"
    ):
        measure("tiers", options_of(HISTORY, long_histories=[LONG_HISTORY]))


def test_kv_that_a_tier_lost_is_named(monkeypatch: pytest.MonkeyPatch, no_redis: None) -> None:
    monkeypatch.setattr(HostTier, "get", lambda tier, keys: [Found(None, ()) for _ in keys])
    with pytest.raises(TierError, match="tier host lost K/V of 16 events"):
        measure("tiers", options_of(HISTORY, long_histories=[LONG_HISTORY]))


# --- break-even


def fake_medians(calls: Calls, repeats: int) -> dict[str, float]:
    """Prefill takes 2 ms; the host 3, the disk 1 for the window and 3 for less; int8 1."""
    assert repeats == 5
    [kv] = calls["prefill"]()  # type: ignore[misc]
    disk_ms = 1.0 if kv.size(1) == WINDOW else 3.0
    ms = {"prefill": 2.0, "fetch host_float32": 3.0, "fetch disk_float32": disk_ms}
    return {path: ms.get(path, 1.0) for path in calls}


def test_an_engine_reads_the_break_even_of_its_artifact(
    monkeypatch: pytest.MonkeyPatch, no_redis: None, artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiers_benchmark, "interleaved_medians", fake_medians)
    add_measured(artifact, break_even_events={"disk": 99, "remote": 77})
    records = measure("tiers", options_of(SHORT, artifact=str(artifact)))
    assert values(records, "break_even_events") == {
        ("host", "float32", None): WINDOW + 1,
        ("disk", "float32", None): WINDOW,
        ("host", "int8", None): SHORT,
        ("disk", "int8", None): SHORT,
    }
    manifest, _ = read_artifact(artifact)
    # The remote tier was not measured, so its figure stays.
    assert manifest.break_even_events == {"host": WINDOW + 1, "disk": WINDOW, "remote": 77}
    host, disk = HostConfig(capacity_bytes=10_000), DiskConfig(folder=str(tmp_path / "disk"))
    cache = CacheConfig(name="tiered", capacity_bytes=100_000, host=host, disk=disk)
    engine = new_engine(load_artifact(artifact), cache)
    assert engine.store is not None
    assert engine.store.stack is not None
    least = {level.tier.name: level.min_events for level in engine.store.stack.levels}
    engine.store.stack.close()
    assert least == {"host": WINDOW + 1, "disk": WINDOW}


def test_of_an_artifact_its_own_sizes_are_measured_up_to_its_window(
    no_redis: None, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = TiersOptions(
        histories=[SHORT, HISTORY],
        long_histories=[LONG_HISTORY],
        artifact=str(artifact),
        encoders=["hstu"],
        dim=64,
        page_size=PAGE_SIZE,
    )
    records = measure("tiers", options)
    for record in records:
        case = record.case
        assert (case["encoder"], case["dim"], case["heads"], case["layers"]) == ("causal", 12, 3, 2)
    assert {length for _, _, length in values(records, "fetch_ms")} == {SHORT, WINDOW}
    assert f"histories of [{HISTORY}, {LONG_HISTORY}] events are not measured" in caplog.text


# --- the server


@pytest.mark.skipif(not HAS_REDIS, reason="there is no redis-server")
def test_the_server_keeps_nothing_and_ends_with_the_block(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        assert server is not None
        with Redis.from_url(server.url) as client:
            client.set("key", b"value")
            assert client.config_get("save") == {"save": ""}
            assert client.config_get("appendonly") == {"appendonly": "no"}
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["redis.log"]


def test_a_server_that_does_not_start_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: "/bin/false")
    with (
        pytest.raises(TierError, match=r"redis-server does not answer .* exit status: 1"),
        redis_server(tmp_path),
    ):
        pass
