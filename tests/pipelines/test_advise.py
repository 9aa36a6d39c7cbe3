"""Advice: its replays find what an engine finds, and other pipelines take the cache it writes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redis import Redis

from tests.pipelines.commands import WORLD, composed, run_all, run_pipeline
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.config import (
    AdviseConfig,
    CacheConfig,
    DiskConfig,
    HostConfig,
    RemoteConfig,
    checked,
)
from torchrec_kvshare.deploy.redis_server import redis_server
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import Artifact, load_artifact
from torchrec_kvshare.planning.advice import Advice, Advisor
from torchrec_kvshare.planning.replays import Predicted, Replays
from torchrec_kvshare.planning.report import advice_text, write_cache
from torchrec_kvshare.planning.times import Times, measure_times, smoothed
from torchrec_kvshare.planning.trace import Trace, read_trace
from torchrec_kvshare.planning.validation import engine_at, validate

GIVEN = CacheConfig(name="tiered", page_size=8, host=HostConfig(capacity_bytes=2**24))
START = 1_800_000_000  # after every event of the world
GAP_S = 10  # between two requests of the trace
NUM_REQUESTS = 120


@pytest.fixture(scope="module")
def model(artifact: Path) -> Artifact:
    return load_artifact(artifact)


@pytest.fixture(scope="module")
def trace_file(requests_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of a few users again and again, some of whose histories are a few events shorter."""
    rng = np.random.default_rng(5)
    with requests_file.open() as lines:
        raws = [json.loads(line) for line in lines]
    path = tmp_path_factory.mktemp("trace") / "requests.jsonl"
    with path.open("w") as file:
        for number in range(NUM_REQUESTS):
            raw = raws[int(rng.zipf(1.5)) % len(raws)]
            num_events = len(raw["history"]["time"]) - 2 * int(rng.random() < 0.2)
            history = {name: values[:num_events] for name, values in raw["history"].items()}
            raw = raw | {"time": START + GAP_S * number, "history": history}
            file.write(json.dumps(raw) + "\n")
    return path


@pytest.fixture(scope="module")
def trace(model: Artifact, trace_file: Path) -> Trace:
    config = AdviseConfig(artifact="", output="", requests=str(trace_file))
    return read_trace(config, model.schema)


def times_of(shared_ms: float, hit_ms: float, fetch_ms: float = 0.1) -> Times:
    """Times that do not depend on sizes: prefill takes 4 ms, an extension 1 ms."""
    lengths, candidates = np.array([8.0, 16.0, 32.0]), np.array([1.0, 12.0, 50.0])

    def table(value: float) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
        return np.full((3, 3), value)

    shelf = ("host", "float32")
    return Times(
        lengths,
        candidates,
        shared_ms=table(shared_ms),
        miss_ms=table(hit_ms + 4.0),
        hit_ms=table(hit_ms),
        grown_ms=table(hit_ms + 1.0),
        merged_ms=np.full(3, shared_ms),
        lookup_ms=np.full(3, 0.1),
        fetch_ms={shelf: np.full(3, fetch_ms)},
        packet_bytes={shelf: 1000.0 + lengths * 4 * 2 * 2 * 16},
    )


TIMES = times_of(shared_ms=5.0, hit_ms=1.0)
WINDOW_BYTES = 4 * 2 * 2 * 16 * 32  # float32 keys and values of two layers, 16 wide, 32 events
ROOMY = CacheConfig("memory", page_size=8, ttl_s=1e5, idle_ttl_s=1e5)
SMALL = replace(ROOMY, capacity_bytes=4 * WINDOW_BYTES)
CACHES = {
    "room for all": ROOMY,
    "room for four windows": SMALL,
    "a short life": replace(ROOMY, ttl_s=65.0),
    "short histories left out": replace(ROOMY, min_events=30),
    "a host tier below": replace(SMALL, name="tiered", host=GIVEN.host),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_replay_finds_for_each_request_what_an_engine_finds(
    name: str, model: Artifact, trace: Trace
) -> None:
    cache = CACHES[name]
    predicted = Replays(model, trace, TIMES, cache.page_size).predict(cache)
    found = list(engine_uses(model, trace, cache))
    assert predicted.uses == found
    assert predicted.hit_rate == sum(use.status == "hit" for use in found) / len(found)
    assert 0.0 < predicted.hit_rate < 1.0
    reasons = {use.reason for use in found}
    assert ("evicted" in reasons) == (name == "room for four windows")
    assert ("expired" in reasons) == (name == "a short life")
    assert ("too_short" in reasons) == (name == "short histories left out")
    assert any(use.tier == "host" for use in found) == (name == "a host tier below")


def engine_uses(model: Artifact, trace: Trace, cache: CacheConfig) -> Iterator[CacheUse]:
    engine, clock = engine_at(model, cache)
    for request in trace.requests:
        clock.now = float(request.time)
        yield engine.rank([request])[0].cache
        assert engine.store is not None
        if engine.store.stack is not None:
            engine.store.stack.drain(5.0)
    engine.close()


def test_the_advised_cache_has_the_hit_rate_that_was_predicted(
    model: Artifact, trace: Trace
) -> None:
    advice = advised(model, trace, TIMES)
    measured = validate(advice, model, trace)
    assert measured.hit_rate == advice.predicted.hit_rate > 0.3
    assert measured.event_hit_rate == advice.predicted.event_hit_rate


def advised(model: Artifact, trace: Trace, times: Times, given: CacheConfig = GIVEN) -> Advice:
    return Advisor(model, trace, times, given, max_ttl_s=86_400.0).advise()


def test_a_request_takes_what_its_replay_says_it_needs(model: Artifact, trace: Trace) -> None:
    replays = Replays(model, trace, times_of(shared_ms=5.0, hit_ms=1.0, fetch_ms=0.25), 8)
    predicted = replays.predict(CACHES["a host tier below"])
    for use, latency_ms in zip(predicted.uses, predicted.request_ms, strict=True):
        fetch_ms = 0.25 if use.tier == "host" else 0.0
        if use.status == "hit":
            assert latency_ms == pytest.approx(1.0 + fetch_ms)
        elif use.status == "miss":
            assert latency_ms == pytest.approx(5.0)
        else:
            assert use.status == "partial"
            assert 2.0 <= latency_ms - fetch_ms <= 5.0
    assert {use.status for use in predicted.uses} == {"hit", "partial", "miss"}


def test_times_are_interpolated_between_sizes_and_flat_beyond() -> None:
    table = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [7.0, 8.0, 9.0]])
    lengths = np.array([8.0, 12.0, 32.0, 100.0, 1.0])
    candidates = np.array([1.0, 6.5, 50.0, 1000.0, 0.0])
    assert TIMES.at(table, lengths, candidates).tolist() == [1.0, 2.5, 9.0, 9.0, 1.0]


def test_one_slow_moment_hardly_moves_a_smoothed_table() -> None:
    lengths, candidates = np.array([32.0, 64.0, 128.0, 256.0]), np.array([1.0, 10.0, 100.0, 500.0])
    true = 1.0 + 0.01 * lengths[:, None] + 0.002 * candidates + 2e-5 * np.outer(lengths, candidates)
    assert smoothed(true, lengths, candidates) == pytest.approx(true)
    slow = true.copy()
    slow[1, 2] *= 3.0
    assert smoothed(slow, lengths, candidates)[1, 2] < 1.5 * true[1, 2]


def test_what_costs_more_than_it_saves_is_not_advised(model: Artifact, trace: Trace) -> None:
    """A hit that is as slow as a request without a cache: the miss before it was for nothing."""
    advice = advised(model, trace, times_of(shared_ms=5.0, hit_ms=5.0))
    assert (advice.scope, advice.cache.name) == ("request_shared", "off")
    assert advice.predicted.p50_ms == 5.0
    assert [choice.value for choice in advice.choices if choice.setting == "scope"] == [
        "request_shared"
    ]
    assert validate(advice, model, trace).hit_rate == 0.0


def test_each_setting_is_advised_with_its_alternative_and_why_not(
    model: Artifact, trace: Trace
) -> None:
    advice = advised(model, trace, TIMES)
    settings = [choice.setting for choice in advice.choices]
    assert settings == [
        *("scope", "ttl_s, idle_ttl_s", "capacity_bytes", "watermark", "policy", "tier host"),
        "min_events",
    ]
    assert all(all(choice) for choice in advice.choices)
    assert advice.scope == "cross_request"
    assert advice.mean_ms_by_scope["cross_request"] < advice.mean_ms_by_scope["request_shared"]
    # All gaps are below the twenty minutes that the trace has.
    assert advice.cache.ttl_s <= 1800.0


def test_a_host_tier_is_advised_where_the_pages_are_too_small(
    model: Artifact, trace: Trace
) -> None:
    tight = replace(GIVEN, capacity_bytes=17 * WINDOW_BYTES)  # One window beside what is in flight.
    advice = advised(model, trace, TIMES, tight)
    assert advice.cache.name == "tiered"
    assert advice.cache.host.capacity_bytes > 0
    [host] = [choice for choice in advice.choices if choice.setting == "tier host"]
    assert host.value == "yes, float32"
    assert "missed because of evictions" in host.why_not
    [codec] = [choice for choice in advice.choices if choice.setting == "host.codec"]
    assert "was not measured on model" in codec.why_not
    slow = advised(model, trace, times_of(shared_ms=9.0, hit_ms=1.0, fetch_ms=8.0), tight)
    assert slow.cache.name == "memory"


def test_the_written_cache_is_a_config_that_fits(
    model: Artifact, trace: Trace, tmp_path: Path
) -> None:
    advice = advised(model, trace, TIMES)
    path = write_cache(tmp_path, advice, trace)
    assert path == tmp_path / "cache" / "advised.yaml"
    overrides = ("artifact=a", "requests=b", "output=c", "cache=advised")
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    config = composed("score", *overrides, searched)
    assert checked_cache(config.cache) == advice.cache


def checked_cache(cache: object) -> CacheConfig:
    from omegaconf import OmegaConf

    filled = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CacheConfig), cache))
    assert isinstance(filled, CacheConfig)
    return filled


def test_the_text_has_the_rules_of_thumb_beside_what_was_measured(
    model: Artifact, trace: Trace
) -> None:
    advice = advised(model, trace, TIMES)
    measured = validate(advice, model, trace)
    text = advice_text(advice, trace, TIMES, threads=1, budget_ms=10.0, measured=measured)
    assert "| 32 | 12 | 60.0 ms | 5.0 ms | 1.0 ms | request_shared, hit | 5.00 × |" in text
    assert "| 8 | 1 | 5.0 ms | 5.0 ms | 1.0 ms | merged, request_shared, hit |" in text
    assert "share: large gain, cache: large gain" in text
    assert "L > 512 events: large gain; N > 50 candidates: recommended" in text
    assert f"hit rate {measured.hit_rate:.3f}" in text


def test_advice_runs_as_a_command_and_other_commands_take_its_cache(
    artifact: Path, trace_file: Path, tmp_path: Path
) -> None:
    given = f"artifact={artifact} requests={trace_file}"
    advised_by, scored, shown, cluster, without = run_all(
        tmp_path,
        [
            f"advise {given} count=60 validate=true threads=1 output=advice",
            f"score --config-dir=advice cache=advised {given} threads=1 output=answers.jsonl",
            f"serve --config-dir=advice cache=advised artifact={artifact} --cfg job",
            f"serve_cluster --config-dir=advice cache=advised artifact={artifact} run=false",
            f"serve cache=advised artifact={artifact}",
        ],
    )
    assert advised_by.status == 0, advised_by.stderr
    assert "use it: python -m pipelines.serve --config-dir=advice cache=advised" in (
        advised_by.stdout
    )
    folder = tmp_path / "advice"
    results = json.loads((folder / "results.json").read_text())
    figures = {
        (record["case"]["path"], record["metric"]): record["value"] for record in results["records"]
    }
    for metric in ("traffic_hit_rate", "traffic_event_hit_rate"):
        assert figures["predicted", metric] == figures["measured", metric]
    assert figures["measured", "p50_ms"] > 0.0
    assert (folder / "advice.md").read_text().startswith("60 requests of ")
    assert (folder / "event_hit_rate.png").read_bytes().startswith(b"\x89PNG")
    assert scored.status == 0, scored.stderr
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == NUM_REQUESTS
    assert shown.status == 0, shown.stderr
    assert "capacity_bytes" in shown.stdout
    # The replicas got the option with the cache's name instead, and with it that option's values.
    assert cluster.status == 0, cluster.stderr
    assert f"--config-dir={folder}" in cluster.stdout
    assert " cache=advised " in cluster.stdout
    assert without.status == 2
    assert without.stderr == (
        "error: cache is 'advised'; one of ['memory', 'off', 'tiered'] is allowed\n"
    )


def test_too_few_bytes_for_a_request_beside_a_user_are_refused(
    model: Artifact, trace: Trace
) -> None:
    with pytest.raises(ConfigError, match=r"cache.capacity_bytes is 10000; one full window"):
        advised(model, trace, TIMES, replace(GIVEN, capacity_bytes=10_000))


def test_every_configured_tier_is_measured_and_left_as_it_was(
    model: Artifact, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as server:
        assert server is not None
        (tmp_path / "disk").mkdir(mode=0o700)
        cache = replace(
            GIVEN,
            disk=DiskConfig(folder=str(tmp_path / "disk")),
            remote=RemoteConfig(url=server.url),
        )
        codecs = {name: ["float32", "int8"] for name in ("host", "disk", "remote")}
        times = measure_times(model, cache, codecs, [8, 32], [1, 9], repeats=2, seed=1)
        # Of forgotten users only the times are left.
        client = Redis.from_url(server.url)
        assert sum(client.memory_usage(key) for key in client.scan_iter()) < 2000
        client.close()
    assert not list((tmp_path / "disk").iterdir())
    for table in (times.shared_ms, times.miss_ms, times.hit_ms, times.grown_ms):
        assert table.shape == (2, 2)
        assert (table > 0.0).all()
    assert times.fetch_ms.keys() == {(t, c) for t in codecs for c in ("float32", "int8")}
    for shelf, milliseconds in times.fetch_ms.items():
        assert (milliseconds > 0.0).all()
        assert times.packet_bytes[shelf][0] < times.packet_bytes[shelf][1]
    assert (times.merged_ms > 0.0).all()
    assert (times.lookup_ms > 0.0).all()


# --- traffic


def test_traffic_is_made_of_the_last_fourth_of_a_log(model: Artifact) -> None:
    config = checked(
        composed("advise", "artifact=a", "data=synthetic", *WORLD, "count=50", "candidates=9"),
        AdviseConfig,
    )
    trace = read_trace(config, model.schema)
    assert len(trace.requests) == 50
    assert {request.num_candidates for request in trace.requests} == {9}
    moments = [request.time for request in trace.requests]
    assert moments == sorted(moments)
    assert all(request.newest < request.time for request in trace.requests)


def test_a_bad_line_is_counted_and_left_out(
    model: Artifact, trace_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("{}\n" + trace_file.read_text())
    trace = read_trace(AdviseConfig(artifact="", output="", requests=str(path)), model.schema)
    assert (len(trace.requests), trace.num_refused) == (NUM_REQUESTS, 1)
    assert trace.why_refused == "the request has no 'time'; it has []"


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (None, r"requests=FILE or data=NAME is needed, one of them; none is given"),
        ("nothing.jsonl", r"requests is 'nothing.jsonl'; there is no such file"),
        ("bad.jsonl", r"bad.jsonl has no request that the model can score; the first of 2 fails: "),
        ("empty.jsonl", r"empty.jsonl has no request that the model can score; it is empty"),
    ],
)
def test_traffic_that_cannot_be_read_is_named(
    requests: str | None,
    message: str,
    model: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\nnothing\n")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=message):
        read_trace(AdviseConfig(artifact="", output="", requests=requests), model.schema)


def test_without_traffic_nothing_is_measured(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"requests=FILE or data=NAME is needed"):
        run_pipeline("advise", f"artifact={artifact}", f"output={tmp_path / 'advice'}")
    assert not (tmp_path / "advice").exists()


def test_predictions_of_no_cache_have_no_hits(model: Artifact, trace: Trace) -> None:
    shared: Predicted = Replays(model, trace, TIMES, 8).predict_shared()
    assert (shared.hit_rate, shared.mean_ms) == (0.0, 5.0)
