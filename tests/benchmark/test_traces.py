"""The profiling pipeline from end to end, and how stages are read from events."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.autograd.profiler_util import Interval

from pipelines.profile_scoring import main
from torchrec_kvshare.benchmark.traces import COLD, REQUEST, WARM, stage_latencies
from torchrec_kvshare.model.stages import ATTEND, EXPAND, LOOKUP, PREFILL, SCORE

CONFIGS = Path(__file__).parents[2] / "configs"
USERS, ROUNDS = 3, 2


class StageEvent(NamedTuple):
    """The attributes of an event that stage_latencies reads; times in microseconds."""

    name: str
    time_range: Interval


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("profile") / "results"
    sizes = ["history_length=9", "candidates=4", "dim=12", "num_heads=3", "page_size=4"]
    overrides = [f"output={results}", f"users={USERS}", f"rounds={ROUNDS}", *sizes]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        main(compose("profile_scoring", overrides))
    return results


@pytest.mark.parametrize(
    ("engine", "prefills", "other_names"),
    [
        # Only the cold round misses. Without a cache every request is encoded, inside its scoring.
        ("cached", USERS, [LOOKUP, EXPAND, SCORE, ATTEND]),
        ("uncached", USERS * (1 + ROUNDS), [SCORE, ATTEND]),
    ],
)
def test_traces_hold_every_stage_as_often_as_it_took_place(
    folder: Path, engine: str, prefills: int, other_names: list[str]
) -> None:
    trace = json.loads((folder / f"{engine}.trace.json").read_text())
    names = Counter(event["name"] for event in trace["traceEvents"])
    num_requests = USERS * (1 + ROUNDS)
    ours = {name: count for name, count in names.items() if name.startswith("kvshare/")}
    assert ours == {
        COLD: 1,
        WARM: 1,
        REQUEST: num_requests,
        PREFILL: prefills,
        **dict.fromkeys(other_names, num_requests),
    }


@pytest.mark.parametrize(
    ("engine", "cold", "warm"),
    [
        (
            "cached",
            {"lookup", "prefill", "expand", "attend", "rank", "total"},
            {"lookup", "expand", "attend", "rank", "total"},
        ),
        (
            "uncached",
            {"prefill", "attend", "rank", "total"},
            {"prefill", "attend", "rank", "total"},
        ),
    ],
)
def test_tensorboard_has_a_histogram_and_a_median_of_each_stage(
    folder: Path, engine: str, cold: set[str], warm: set[str]
) -> None:
    events = EventAccumulator(str(folder / "tensorboard" / engine)).Reload()
    stages = {f"cold/{stage}" for stage in cold} | {f"warm/{stage}" for stage in warm}
    assert set(events.Tags()["histograms"]) == {f"{stage}_ms" for stage in stages}
    assert set(events.Tags()["scalars"]) == {f"{stage}_median_ms" for stage in stages}
    assert events.Tags()["tensors"] == ["operators/text_summary"]
    [written] = events.Histograms("warm/rank_ms")
    assert written.histogram_value.num == USERS * ROUNDS


def test_stages_are_read_by_name_and_nesting() -> None:
    """One cold miss and one warm hit of a cached engine, times in microseconds."""
    spans = [
        (COLD, 0, 10_000),
        (REQUEST, 100, 9_100),
        (LOOKUP, 200, 300),
        (PREFILL, 300, 4_300),
        (EXPAND, 4_500, 5_000),
        (SCORE, 5_000, 8_000),
        (ATTEND, 5_500, 7_500),
        (WARM, 10_000, 20_000),
        (REQUEST, 11_000, 14_000),
        (LOOKUP, 11_000, 11_250),
        (SCORE, 12_000, 13_500),
        (ATTEND, 12_000, 13_000),
    ]
    events = [StageEvent(name, Interval(start, end)) for name, start, end in spans]
    assert stage_latencies(events) == {  # type: ignore[arg-type]
        "cold": {
            "lookup": [0.1],
            "prefill": [4.0],
            "expand": [0.5],
            "attend": [2.0],
            "rank": [1.0],
            "total": [9.0],
        },
        "warm": {
            "lookup": [0.25],
            "prefill": [],
            "expand": [],
            "attend": [1.0],
            "rank": [0.5],
            "total": [3.0],
        },
    }


def test_prefill_inside_scoring_is_no_part_of_rank() -> None:
    spans = [
        (WARM, 0, 9_000),
        (REQUEST, 0, 9_000),
        (SCORE, 1_000, 9_000),
        (PREFILL, 1_000, 6_000),
        (ATTEND, 6_000, 8_000),
    ]
    events = [StageEvent(name, Interval(start, end)) for name, start, end in spans]
    stages = stage_latencies(events)["warm"]  # type: ignore[arg-type]
    assert (stages["prefill"], stages["attend"], stages["rank"]) == ([5.0], [2.0], [1.0])
