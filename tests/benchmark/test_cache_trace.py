"""Traces follow their data, and a replay counts what a cache would do with them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from pipelines.benchmark import main
from tests.data.logs import USERS, Event, drawn_events, in_order, log_of
from torchrec_kvshare.benchmark.request_traces import Trace, draw_events, zipf_trace
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.benchmark.scenarios import cache_trace as trace_benchmark
from torchrec_kvshare.benchmark.scenarios.cache_trace import (
    CacheTraceOptions,
    Replay,
    Setting,
    log_trace,
)
from torchrec_kvshare.config import SyntheticData
from torchrec_kvshare.errors import ConfigError, DataError, ParityError
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import HISTORY, ITEM, TIME, History, Window

CONFIGS = Path(__file__).parents[2] / "configs"
DIM, NUM_LAYERS, NUM_HEADS, PAGE_SIZE = 12, 2, 3, 8
ROW_BYTES = 2 * NUM_LAYERS * DIM * 4
MAX_HISTORY, BLOCK = 20, 5
NUM_REQUESTS, NUM_CANDIDATES = 90, 7
SEED = 3
OPTIONS = CacheTraceOptions(
    data=SyntheticData(num_users=15, events_per_user=30, num_items=40, num_categories=5),
    requests=30,
    histories=[MAX_HISTORY],
    candidates=[NUM_CANDIDATES],
    dim=DIM,
    num_layers=NUM_LAYERS,
    num_heads=NUM_HEADS,
    page_size=PAGE_SIZE,
    seed=SEED,
)
LIBRARIES = ("library_lru", "library_tiny_lfu")
RATES = ("hit_rate", "event_hit_rate", "hits_cross_request", "hits_cross_user")

Json = dict[str, Any]


class Measured(NamedTuple):
    """The scenario measured through its pipeline."""

    records: list[Json]
    folder: Path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("cache_trace") / "results"
    overrides = [
        "scenario=cache_trace",
        f"output={folder}",
        "data.num_users=15",
        "data.events_per_user=30",
        "data.num_items=40",
        "data.num_categories=5",
        f"requests={NUM_REQUESTS}",
        f"histories=[{MAX_HISTORY}]",
        f"candidates=[{NUM_CANDIDATES}]",
        f"dim={DIM}",
        f"num_heads={NUM_HEADS}",
        f"page_size={PAGE_SIZE}",
        f"seed={SEED}",
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("benchmark", overrides)
    main(config)
    return Measured(json.loads((folder / "results.json").read_text())["records"], folder)


Key = tuple[str, str, int, str, int]


def by_case(records: Sequence[Json]) -> dict[Key, dict[str, float]]:
    """Return the hit rates by path, data, capacity, sharing and time to live."""
    found: dict[Key, dict[str, float]] = {}
    for record in records:
        case = record["case"]
        if "encoder" not in case:
            key = tuple(case[k] for k in ("path", "data", "capacity_percent", "share", "ttl_s"))
            figures = found.setdefault(key, {})  # type: ignore[arg-type]
            assert record["metric"] not in figures
            figures[record["metric"]] = record["value"]
    return found


def trace_of(visits: Sequence[tuple[str, int, int]]) -> Trace:
    """Return requests: user, second and number of events; all histories begin alike."""
    zipf = zipf_trace(MAX_HISTORY, 1, NUM_CANDIDATES, SEED)
    [window] = [history.window for history in zipf.schema.histories]
    requests = []
    for user, at, num_events in visits:
        rng = np.random.default_rng(SEED)
        events = draw_events(zipf.schema, window, rng, num_events)
        requests.append(
            replace(zipf.requests[0], user_id=user, time=at, events_by_history={HISTORY: events})
        )
    return Trace("ours", zipf.schema, requests)


def figures_of(visits: Sequence[tuple[str, int, int]], setting: Setting) -> dict[str, float]:
    return Replay(trace_of(visits), PAGE_SIZE, ROW_BYTES).figures(setting)


# --- records


def test_every_data_policy_and_capacity_has_its_figures(measured: Measured) -> None:
    expected = {
        (path, data, capacity, "user", 0)
        for path in ("lru", "tiny_lfu", *LIBRARIES)
        for data in ("synthetic", "zipf")
        for capacity in (5, 10, 25, 50, 100)
    }
    for data in ("synthetic", "zipf"):
        expected |= {(policy, data, 10, "content", 0) for policy in ("lru", "tiny_lfu")}
        expected |= {("lru", data, 10, "user", 300)}
    found = by_case(measured.records)
    assert set(found) == expected
    for (path, *_), figures in found.items():
        if path in LIBRARIES:
            assert set(figures) == {"hit_rate"}
        else:
            others = {metric for metric in figures if not metric.startswith("miss_")}
            assert others == {*RATES, "evictions", "held_bytes", "capacity_bytes"}
    for record in measured.records:
        case = record["case"]
        assert record["scenario"] == "cache_trace"
        assert case["history"] == MAX_HISTORY
        assert case["policy"] == case["path"].removeprefix("library_")


def test_units_say_what_the_figures_are(measured: Measured) -> None:
    units = {record["metric"]: record["unit"] for record in measured.records}
    shares = {metric: unit for metric, unit in units.items() if unit == "x"}
    assert {metric for metric in shares if not metric.startswith("miss_")} == {*RATES}
    assert {metric: unit for metric, unit in units.items() if unit != "x"} == {
        "evictions": "entries",
        "held_bytes": "bytes",
        "capacity_bytes": "bytes",
        "lookup_ms": "ms",
        "encode_ms": "ms",
        "score_ms": "ms",
    }


def test_hits_and_misses_are_all_requests(measured: Measured) -> None:
    for (path, _, _, share, ttl_s), figures in by_case(measured.records).items():
        assert 0.0 <= figures["hit_rate"] <= 1.0
        if path not in LIBRARIES:
            misses = {m: v for m, v in figures.items() if m.startswith("miss_")}
            assert all(
                0.0 <= value <= 1.0 for value in [*misses.values(), *map(figures.get, RATES)]
            )
            assert figures["hit_rate"] + sum(misses.values()) == pytest.approx(1.0)
            by_owner = figures["hits_cross_request"] + figures["hits_cross_user"]
            assert figures["hit_rate"] == pytest.approx(by_owner)
            assert share == "content" or figures["hits_cross_user"] == 0.0
            assert ttl_s or "miss_expired" not in misses


def test_nothing_is_evicted_from_a_cache_with_room_for_all(measured: Measured) -> None:
    found = by_case(measured.records)
    for data in ("synthetic", "zipf"):
        lru, tiny_lfu = (found[policy, data, 100, "user", 0] for policy in ("lru", "tiny_lfu"))
        assert lru == pytest.approx(tiny_lfu)  # A mean of equal numbers has other last bits.
        assert lru["evictions"] == 0.0
        assert "miss_evicted" not in lru
        assert found["lru", data, 25, "user", 0]["evictions"] > 0.0
        assert found["library_lru", data, 100, "user", 0]["hit_rate"] == lru["hit_rate"]


def test_bytes_are_within_the_capacity(measured: Measured) -> None:
    capacities: dict[str, list[float]] = {"synthetic": [], "zipf": []}
    for (path, data, _, share, ttl_s), figures in by_case(measured.records).items():
        if path not in LIBRARIES:
            assert figures["held_bytes"] <= figures["capacity_bytes"]
            assert figures["capacity_bytes"] % (PAGE_SIZE * ROW_BYTES) == 0
        if (path, share, ttl_s) == ("lru", "user", 0):
            capacities[data].append(figures["capacity_bytes"])
    for each in capacities.values():
        assert each == sorted(each)
        assert each[1] == pytest.approx(each[-1] / 10, abs=PAGE_SIZE * ROW_BYTES)


def test_the_library_finds_what_lru_finds(measured: Measured) -> None:
    found = by_case(measured.records)
    for (path, *rest), figures in found.items():
        if path == "library_lru":
            ours = found[("lru", *rest)]["hit_rate"]
            assert ours == pytest.approx(figures["hit_rate"], abs=0.01)


def test_stages_of_the_engine_are_timed_for_each_trace(measured: Measured) -> None:
    timed = [record for record in measured.records if "encoder" in record["case"]]
    assert Counter((record["case"]["data"], record["metric"]) for record in timed) == {
        (data, f"{stage}_ms"): 1
        for data in ("synthetic", "zipf")
        for stage in ("lookup", "encode", "score")
    }
    for record in timed:
        case = record["case"]
        assert record["value"] > 0.0
        assert (case["path"], case["capacity_percent"], case["encoder"]) == ("lru", 10, "causal")
        assert (case["candidates"], case["dim"], case["users"]) == (NUM_CANDIDATES, DIM, 1)


def test_curves_are_drawn(measured: Measured) -> None:
    drawn = {path.name: path for path in measured.folder.glob("*.png")}
    assert set(drawn) == {"hit_rate.png", "event_hit_rate.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())


# --- replay


def test_a_short_life_is_counted_by_hand() -> None:
    """Pages of 8 rows: each of two users has two at most, and the cache holds half of the four."""
    visits = [("a", 0, 8), ("a", 1, 8), ("a", 2, 9), ("b", 3, 16), ("a", 4, 9), ("a", 5, 9)]
    assert figures_of(visits, Setting(50)) == {
        "hit_rate": 2 / 6,
        "event_hit_rate": (8 + 8 + 9) / (8 + 8 + 9 + 16 + 9 + 9),
        "hits_cross_request": 2 / 6,
        "hits_cross_user": 0.0,
        "miss_cold": 3 / 6,  # a comes, a has grown, b comes
        "miss_evicted": 1 / 6,
        "evictions": 2.0,
        "held_bytes": 2 * PAGE_SIZE * ROW_BYTES,
        "capacity_bytes": 2 * PAGE_SIZE * ROW_BYTES,
    }


def test_a_window_that_moves_on_is_a_miss_and_not_growth() -> None:
    visits = [("a", 0, MAX_HISTORY), ("a", 1, MAX_HISTORY + 1), ("a", 2, MAX_HISTORY + 2)]
    figures = figures_of(visits, Setting(100))
    assert (figures["miss_slid"], figures["miss_cold"]) == (1 / 3, 2 / 3)
    num_read = [MAX_HISTORY, MAX_HISTORY + 1 - BLOCK, MAX_HISTORY + 2 - BLOCK]
    assert figures["event_hit_rate"] == num_read[1] / sum(num_read)


def test_trace_time_makes_kv_expire_only_where_it_may() -> None:
    visits = [("a", 1000, 8), ("a", 1300, 8), ("a", 1601, 8)]
    assert figures_of(visits, Setting(100))["hit_rate"] == 2 / 3
    figures = figures_of(visits, Setting(100, ttl_s=300))
    assert (figures["hit_rate"], figures["miss_expired"]) == (1 / 3, 1 / 3)


@pytest.mark.parametrize("policy", ["lru", "tiny_lfu"])
@pytest.mark.parametrize("capacity_percent", [5, 25, 50, 100])
@pytest.mark.parametrize("seed", range(4))
def test_sharing_content_never_lowers_the_hit_rate_of_equal_histories(
    policy: str, capacity_percent: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    visits = [(f"user {rng.zipf(1.3) % 9}", at, 8) for at in range(60)]
    own = figures_of(visits, Setting(capacity_percent, policy))
    shared = figures_of(visits, Setting(capacity_percent, policy, "content"))
    assert shared["hit_rate"] >= own["hit_rate"]
    assert shared["hit_rate"] == 59 / 60  # The first one encodes it for all.
    assert shared["hits_cross_user"] > 0.0 == own["hits_cross_user"]


def test_with_room_for_all_sharing_gains_what_twins_have_in_common() -> None:
    replay = Replay(zipf_trace(MAX_HISTORY, 400, NUM_CANDIDATES, SEED), PAGE_SIZE, ROW_BYTES)
    own, shared = (replay.figures(Setting(100, "lru", share)) for share in ("user", "content"))
    assert shared["hit_rate"] > own["hit_rate"]
    assert shared["event_hit_rate"] > own["event_hit_rate"]


def test_figures_of_several_repeats_are_means() -> None:
    figures = trace_benchmark._means([{"hit_rate": 0.5, "miss_cold": 0.5}, {"hit_rate": 1.0}])
    assert figures == {"hit_rate": 0.75, "miss_cold": 0.25}


def test_an_engine_that_finds_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Replay.figures

    def wrong(replay: Replay, setting: Setting) -> dict[str, float]:
        found = figures(replay, setting)
        return found | {"event_hit_rate": found["event_hit_rate"] + 1e-6}

    monkeypatch.setattr(Replay, "figures", wrong)
    with pytest.raises(ParityError, match=r"an engine on data synthetic found \{'hit_rate': "):
        measure("cache_trace", OPTIONS)


# --- traces


def test_the_zipf_trace_is_the_same_for_one_seed() -> None:
    one, same, other = (zipf_trace(MAX_HISTORY, 50, NUM_CANDIDATES, seed) for seed in (1, 1, 2))
    times = [[request.time for request in trace.requests] for trace in (one, same, other)]
    users = [[request.user_id for request in trace.requests] for trace in (one, same, other)]
    assert times[0] == times[1] == sorted(times[1]) != times[2]
    assert users[0] == users[1] != users[2]


def test_histories_of_the_zipf_trace_grow_every_few_visits() -> None:
    trace = zipf_trace(MAX_HISTORY, 300, NUM_CANDIDATES, SEED)
    visits_by_user: dict[str, list[torch.Tensor]] = {}
    for request in trace.requests:
        events = request.events_by_history[HISTORY]
        assert events.num_events <= MAX_HISTORY
        assert events.first_event % BLOCK == 0
        # Items by their index in the whole history, of which the window has the last.
        items = torch.full((events.first_event + events.num_events,), -1)
        items[events.first_event :] = events.columns[ITEM]
        visits_by_user.setdefault(request.user_id, []).append(items)
    counts = Counter({user: len(visits) for user, visits in visits_by_user.items()})
    [(most_often, count)] = counts.most_common(1)
    assert most_often == "0"
    assert count > 20
    for visits in visits_by_user.values():
        for number, items in enumerate(visits):
            assert items.numel() - visits[0].numel() == number // 5
            seen = items[: visits[0].numel()] >= 0
            assert torch.equal(items[: visits[0].numel()][seen], visits[0][seen])


@pytest.mark.parametrize("seed", range(5))
def test_a_log_is_replayed_over_strictly_earlier_events(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The expected requests are written in the project's format and parsed."""
    events = drawn_events([30, 25, 4], seed)
    log = log_of(events)
    monkeypatch.setattr(trace_benchmark, "load_log", lambda data: log)
    history = History(HISTORY, Window(MAX_HISTORY, BLOCK))
    trace = log_trace(
        SyntheticData(), history, num_requests=1000, num_candidates=NUM_CANDIDATES, seed=SEED
    )
    by_time = sorted(in_order(events), key=lambda event: event.time)
    wanted = []
    for event in by_time[-15:]:  # a fourth of 59, rounded up
        before = [e for e in by_time if e.user == event.user and e.time < event.time]
        if before:
            wanted.append((event.user, event.time, before))
    for request, (user, at, before) in zip(trace.requests, wanted, strict=True):
        assert (request.user_id, request.time) == (user, at)
        spelled = parse_request(raw_of(before, user, at), trace.schema)
        expected, read = spelled.events_by_history[HISTORY], request.events_by_history[HISTORY]
        assert (read.first_event, request.user_row) == (expected.first_event, spelled.user_row)
        assert read.columns.keys() == expected.columns.keys()
        for column, values in expected.columns.items():
            assert torch.equal(read.columns[column], values)
        assert torch.equal(read.floats["dwell"], expected.floats["dwell"])
        for column, bags in expected.bags.items():
            assert torch.equal(read.bags[column].values, bags.values)
            assert torch.equal(read.bags[column].lengths, bags.lengths)
        assert request.num_candidates == NUM_CANDIDATES


def raw_of(events: list[Event], user: str, at: int) -> Json:
    """Return a raw request without candidates."""
    log = log_of(events)
    items = [log.items.ids[code] for code in log.items.codes]
    genres = [list(log.item_attributes["genres"][code]) for code in log.items.codes]
    history = {TIME: [e.time for e in events], ITEM: items, "genres": genres}
    history["action"] = [event.action for event in events]
    history["mood"] = [event.mood or None for event in events]
    history["dwell"] = [event.dwell for event in events]
    return {
        "user_id": user,
        TIME: at,
        "context": {"country": [], "age": 0, "battery": 0},
        "history": history,
        "candidates": {ITEM: [], "genres": [], "price": []},
    }


def test_a_trace_is_as_long_as_asked_and_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(drawn_events([40, 40, 40], 0))
    monkeypatch.setattr(trace_benchmark, "load_log", lambda data: log)
    history = History(HISTORY, Window(MAX_HISTORY, BLOCK))
    whole = log_trace(
        SyntheticData(), history, num_requests=1000, num_candidates=NUM_CANDIDATES, seed=SEED
    )
    first = log_trace(
        SyntheticData(), history, num_requests=11, num_candidates=NUM_CANDIDATES, seed=SEED
    )
    assert len(whole.requests) == 30
    assert [r.time for r in first.requests] == [r.time for r in whole.requests[:11]]


def test_data_without_a_second_visit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of([Event(user, "100", place) for place, user in enumerate(USERS)])
    monkeypatch.setattr(trace_benchmark, "load_log", lambda data: log)
    with pytest.raises(DataError, match="no event of the last fourth of data synthetic has an"):
        measure("cache_trace", OPTIONS)


def test_without_a_window_nothing_is_replayed() -> None:
    with pytest.raises(ConfigError, match=r"histories is \[\]; its first number is the window"):
        measure("cache_trace", replace(OPTIONS, histories=[]))
