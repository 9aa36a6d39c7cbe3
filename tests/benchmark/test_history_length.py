"""What a longer history is worth: runs that differ in the number of events the model reads."""

import json
from pathlib import Path

import pytest

from tests.pipelines.commands import run_pipeline
from torchrec_kvshare.benchmark.scenarios.history_length import LINE_BY_PATH
from torchrec_kvshare.config import NO_HISTORY
from torchrec_kvshare.history.kinds import KINDS

LENGTHS = [4, 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history_length") / "results"
    run_pipeline(
        "benchmark",
        "scenario=history_length",
        f"output={folder}",
        f"histories={LENGTHS}",
        "budget=smoke",
        "budget.max_users=25",
        "data.num_users=25",
        "data.events_per_user=30",
        "data.num_items=60",
        "dim=8",
        "num_heads=2",
        "threads=1",
    )
    return folder


def test_each_length_is_a_run_that_differs_in_it_alone(folder: Path) -> None:
    configs = [
        json.loads((folder / f"causal_{length}" / "config.json").read_text()) for length in LENGTHS
    ]
    assert [config["model"]["max_history"] for config in configs] == LENGTHS
    for config in configs:
        del config["output"], config["model"]["max_history"], config["model"]["block"]
    assert configs[0] == configs[1]


def test_the_records_are_the_runs_metrics(folder: Path) -> None:
    records = json.loads((folder / "results.json").read_text())["records"]
    for record in records:
        case = record["case"]
        run = "none" if case["path"] == "none" else f"causal_{case['history']}"
        tested = json.loads((folder / run / "metrics.json").read_text())["test"][case["path"]]
        assert record["value"] == tested[record["metric"]]
    kinds = {(record["case"]["path"], record["case"]["history"]) for record in records}
    assert kinds == {(path, length) for path in ("causal", "none") for length in LENGTHS}
    assert len(records) == 4 * len(kinds)


def test_the_metrics_are_drawn_over_the_length(folder: Path) -> None:
    for name in ("auc_by_max_history", "hr10_by_max_history"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_kind_of_encoder_has_a_line() -> None:
    """Runs of a kind without one would be trained, and then not drawn."""
    assert set(LINE_BY_PATH) == {*KINDS, NO_HISTORY}
