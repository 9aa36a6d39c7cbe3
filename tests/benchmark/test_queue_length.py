"""``queue_length`` and ``memory`` from end to end, at small sizes."""

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.benchmark import main
from torchrec_kvshare.benchmark.paths import assert_parity
from torchrec_kvshare.benchmark.plots import write_plots
from torchrec_kvshare.benchmark.results import Case, Record, figures_table
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.benchmark.scenarios.memory import MemoryOptions
from torchrec_kvshare.benchmark.scenarios.queue_length import QueueLengthOptions
from torchrec_kvshare.errors import MissingExtraError, ParityError

HISTORIES, LONG_HISTORY = [7, 16], 33  # events
CANDIDATES = [1, 3, 10]
DIM, NUM_LAYERS, NUM_HEADS, PAGE_SIZE = 12, 2, 3, 8
UNIT_BY_METRIC = {
    "latency_ms": "ms",
    "requests_per_s": "1/s",
    "speedup_vs_uncached": "x",
    "speedup_vs_request_shared": "x",
    "seed_model_speedup": "x",
    "fusion_cost_ratio": "x",
    "chunk_rows": "rows",
    "peak_bytes": "bytes",
    "kv_bytes_held": "bytes",
    "repeated_kv_bytes": "bytes",
}
CONFIGS = Path(__file__).parents[2] / "configs"
PATHS = {"uncached_merged", "request_shared", "cross_request_hit"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Results folder of a scenario, measured once."""
    folders: dict[str, Path] = {}

    def measured(scenario: str) -> Path:
        if scenario not in folders:
            folders[scenario] = tmp_path_factory.mktemp(scenario) / "results"
            overrides = [
                f"output={folders[scenario]}",
                f"scenario={scenario}",
                f"histories={HISTORIES}",
                f"long_histories=[{LONG_HISTORY}]",
                f"candidates={CANDIDATES}",
                "merged_max_candidates=3",
                "merged_chunk_rows=[16,64]",
                f"dim={DIM}",
                f"num_heads={NUM_HEADS}",
                f"page_size={PAGE_SIZE}",
            ]
            with (
                initialize_config_dir(str(CONFIGS), version_base="1.3"),
                pytest.MonkeyPatch.context() as patch,
            ):
                patch.setattr(sys, "argv", ["benchmark", *overrides])
                main(compose("benchmark", overrides))
        return folders[scenario]

    return measured


def read(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def values(records: list[dict[str, Any]], metric: str) -> dict[tuple[str, int, int], float]:
    """Return figures by path, history and candidates (0 for a figure of all queues)."""
    return {
        (r["case"]["path"], r["case"]["history"], r["case"].get("candidates", 0)): r["value"]
        for r in records
        if r["metric"] == metric
    }


@pytest.mark.parametrize("scenario", ["queue_length", "memory"])
def test_results_follow_the_one_format(run: Callable[[str], Path], scenario: str) -> None:
    results = read(run(scenario))
    assert set(results) == {"torch", "threads", "cpu", "command", "seed", "records"}
    assert results["torch"] == torch.__version__
    assert results["threads"] == torch.get_num_threads()
    assert results["cpu"]
    assert results["command"].startswith("python -m pipelines.benchmark ")
    assert f"scenario={scenario}" in results["command"]
    assert results["seed"] == 0
    for record in results["records"]:
        assert set(record) == {"scenario", "case", "metric", "value", "unit"}
        assert record["scenario"] == scenario
        assert record["unit"] == UNIT_BY_METRIC[record["metric"]]
        case = record["case"]
        assert case["history"] in [*HISTORIES, LONG_HISTORY]
        assert (case["encoder"], case["users"]) == ("causal", 1)
        assert (case["dim"], case["layers"], case["heads"]) == (DIM, NUM_LAYERS, NUM_HEADS)
        assert case["tokens"] == 1


def test_every_path_is_measured_where_the_options_say(run: Callable[[str], Path]) -> None:
    latencies = values(read(run("queue_length"))["records"], "latency_ms")
    shared = {
        (path, history, queue)
        for path in ("request_shared", "cross_request_hit")
        for history in [*HISTORIES, LONG_HISTORY]
        for queue in CANDIDATES
    }
    # merged_max_candidates is 3, and long histories are not measured without sharing.
    merged = {("uncached_merged", history, queue) for history in HISTORIES for queue in (1, 3)}
    assert set(latencies) == shared | merged
    assert min(latencies.values()) > 0


def test_ratios_are_those_of_the_latencies(run: Callable[[str], Path]) -> None:
    records = read(run("queue_length"))["records"]
    latencies = values(records, "latency_ms")
    speedups = values(records, "speedup_vs_uncached")
    assert {path for path, _, _ in speedups} == {"request_shared", "cross_request_hit"}
    for (path, history, queue), speedup in speedups.items():
        merged = latencies["uncached_merged", history, queue]
        assert speedup == pytest.approx(merged / latencies[path, history, queue])
    for (path, history, queue), rate in values(records, "requests_per_s").items():
        assert rate == pytest.approx(1000 / latencies[path, history, queue])
    for (path, history, queue), ratio in values(records, "speedup_vs_request_shared").items():
        shared = latencies["request_shared", history, queue]
        assert ratio == pytest.approx(shared / latencies[path, history, queue])
    seed_model = values(records, "seed_model_speedup")
    assert {history for _, history, _ in seed_model} == set(HISTORIES)
    assert seed_model["seed_model", 7, 10] == pytest.approx(10 / (0.85 + 0.15 * 10))


def test_every_history_has_one_fusion_cost_ratio(run: Callable[[str], Path]) -> None:
    ratios = values(read(run("queue_length"))["records"], "fusion_cost_ratio")
    assert set(ratios) == {("request_shared", h, 0) for h in [*HISTORIES, LONG_HISTORY]}


def test_the_fastest_chunk_is_one_of_the_choices(run: Callable[[str], Path]) -> None:
    chunks = values(read(run("queue_length"))["records"], "chunk_rows")
    assert set(chunks) == {("uncached_merged", history, 0) for history in HISTORIES}
    assert set(chunks.values()) <= {16, 64}


def test_kv_held_is_the_same_for_every_number_of_candidates(run: Callable[[str], Path]) -> None:
    held = values(read(run("memory"))["records"], "kv_bytes_held")
    page_bytes = NUM_LAYERS * 2 * PAGE_SIZE * DIM * 4
    assert held == {
        ("cross_request_hit", history, queue): num_pages * page_bytes
        for history, num_pages in [(7, 1), (16, 2), (LONG_HISTORY, 5)]
        for queue in CANDIDATES
    }


def test_repeated_kv_grows_with_the_candidates(run: Callable[[str], Path]) -> None:
    repeated = values(read(run("memory"))["records"], "repeated_kv_bytes")
    for (_, history, queue), value in repeated.items():
        assert value == (queue - 1) * history * NUM_LAYERS * 2 * DIM * 4


def test_peaks_of_all_paths_are_counted(run: Callable[[str], Path]) -> None:
    peaks = values(read(run("memory"))["records"], "peak_bytes")
    assert {path for path, _, _ in peaks} == PATHS
    for history in HISTORIES:
        # request_shared makes the K/V of the history; a hit does not.
        kv_bytes = history * NUM_LAYERS * 2 * DIM * 4
        assert peaks["request_shared", history, 1] >= kv_bytes
        assert peaks["cross_request_hit", history, 1] < peaks["request_shared", history, 1]
        assert peaks["uncached_merged", history, 3] > peaks["uncached_merged", history, 1]


def test_peaks_do_not_vary_from_run_to_run(run: Callable[[str], Path]) -> None:
    options = MemoryOptions(
        histories=HISTORIES,
        long_histories=[LONG_HISTORY],
        candidates=CANDIDATES,
        merged_max_candidates=3,
        merged_chunk_rows=[64],
        dim=DIM,
        num_heads=NUM_HEADS,
        page_size=PAGE_SIZE,
    )
    again = [r for r in measure("memory", options) if r.metric == "peak_bytes"]
    peaks = values(read(run("memory"))["records"], "peak_bytes")
    for record in again:
        path, history = str(record.case["path"]), int(record.case["history"])
        if path != "uncached_merged":  # Its fastest chunk varies.
            assert record.value == peaks[path, history, int(record.case["candidates"])]


@pytest.mark.parametrize(
    ("scenario", "pictures"),
    [("queue_length", {"latency.png", "speedup.png"}), ("memory", {"memory.png"})],
)
def test_pictures_are_drawn(run: Callable[[str], Path], scenario: str, pictures: set[str]) -> None:
    drawn = {path.name: path for path in run(scenario).glob("*.png")}
    assert set(drawn) == pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())


@pytest.mark.parametrize("scenario", ["queue_length", "memory"])
def test_tensorboard_has_every_figure(run: Callable[[str], Path], scenario: str) -> None:
    events = EventAccumulator(str(run(scenario) / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == [f"{scenario}/text_summary"]
    for record in read(run(scenario))["records"]:
        case = record["case"]
        tag = f"{scenario}/causal/history_{case['history']}/{record['metric']}/{case['path']}"
        points = {point.step: point.value for point in events.Scalars(tag)}
        assert points[case.get("candidates", 0)] == pytest.approx(record["value"], rel=1e-6)


def test_an_unknown_scenario_is_named_with_the_known_ones() -> None:
    with (
        initialize_config_dir(str(CONFIGS), version_base="1.3"),
        pytest.raises(HydraException, match=r"Could not find 'scenario/speed'[\s\S]*queue_length"),
    ):
        compose("benchmark", ["scenario=speed"])


def test_one_number_of_candidates_has_no_fusion_cost_ratio() -> None:
    options = QueueLengthOptions(
        histories=[5],
        long_histories=[],
        candidates=[2],
        merged_chunk_rows=[64],
        dim=DIM,
        num_heads=NUM_HEADS,
        page_size=PAGE_SIZE,
    )
    records = measure("queue_length", options)
    assert "fusion_cost_ratio" not in {record.metric for record in records}


def test_paths_that_differ_are_not_compared() -> None:
    logits = torch.zeros(3)
    with pytest.raises(ParityError, match=r"cross_request_hit logits differ by 0\.5"):
        assert_parity({"request_shared": logits, "cross_request_hit": logits + 0.5})
    with pytest.raises(ParityError, match="nan"):
        assert_parity({"request_shared": logits, "cross_request_hit": logits / 0})


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = builtins.__import__

    def without_matplotlib(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MissingExtraError, match=r"drawing plots needs the extra \[plots\]"):
        write_plots(tmp_path, [], {})


def test_the_table_has_a_dash_where_nothing_was_measured() -> None:
    case: Case = {"encoder": "hstu", "history": 8}
    records = [
        Record("s", case | {"path": "a", "candidates": 1}, "latency_ms", 0.1236, unit="ms"),
        Record("s", case | {"path": "b", "candidates": 2}, "latency_ms", 12345.6, unit="ms"),
        Record("s", case | {"path": "b", "candidates": 2}, "speedup", 1.5, unit="x"),
        Record("s", case | {"path": "b"}, "slope", -0.25, unit="x"),
        Record("s", {"path": "peak"}, "slope", 2.0, unit="x"),
    ]
    assert [line.split() for line in figures_table(records).splitlines()] == [
        ["encoder", "history", "candidates", "path", "latency_ms", "speedup", "slope"],
        ["hstu", "8", "1", "a", "0.1236", "-", "-"],
        ["hstu", "8", "2", "b", "12,346", "1.5", "-"],
        ["hstu", "8", "all", "b", "-", "-", "-0.25"],
        ["-", "-", "all", "peak", "-", "-", "2"],
    ]


def test_the_table_has_a_line_for_every_encoder_and_its_columns_are_flush() -> None:
    records = [
        Record("s", {"path": "a", "encoder": encoder, "history": 100}, "latency_ms", 1.0, unit="ms")
        for encoder in ("causal", "longer")
    ]
    lines = figures_table(records).splitlines()
    assert [line.split()[0] for line in lines] == ["encoder", "causal", "longer"]
    assert {len(line) for line in lines} == {len(lines[0])}
