"""What quantised tables do to scores: the scenario on a trained run, and what it refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.commands import TINY, WORLD, run_pipeline
from tests.worlds import version_called
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.benchmark.scenarios.tables import TablesOptions
from torchrec_kvshare.config import SyntheticData
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.requests import make_targeted_requests
from torchrec_kvshare.data.shards import in_memory
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.model.quantised import TABLE_DTYPES, quantise_tables, table_bytes
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.run import load_trained

DATA = SyntheticData(num_users=40, events_per_user=40, num_items=60, num_categories=6)
NUM_REQUESTS, NUM_CANDIDATES, SEED = 30, 50, 5
QUANTISED = TABLE_DTYPES[1:]
METRICS = ["auc_change", "top10_overlap", "max_score_difference", "bytes_ratio"]
Figures = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that takes seconds."""
    output = tmp_path_factory.mktemp("run") / "run"
    run_pipeline("train", *WORLD, *TINY, "budget.baselines=[]", f"output={output}")
    return output


def options_of(run: Path, **change: Any) -> TablesOptions:
    options = TablesOptions(
        run=str(run), data=DATA, requests=NUM_REQUESTS, candidates=[NUM_CANDIDATES], seed=SEED
    )
    return replace(options, **change)


@pytest.fixture(scope="module")
def records(run: Path) -> list[Record]:
    return measure("tables", options_of(run))


@pytest.fixture(scope="module")
def figures(records: list[Record]) -> Figures:
    """By dtype and metric."""
    found: Figures = {}
    for record in records:
        found.setdefault(str(record.case["tables"]), {})[record.metric] = record.value
    return found


def test_every_dtype_has_every_figure(records: list[Record], figures: Figures) -> None:
    assert {dtype: list(of_dtype) for dtype, of_dtype in figures.items()} == {
        "float32": ["auc"],
        **dict.fromkeys(QUANTISED, METRICS),
    }
    for record in records:
        dtype = record.case["tables"]
        assert record.scenario == "tables"
        assert record.case == {
            "path": dtype,
            "tables": dtype,
            "encoder": "causal",
            "candidates": NUM_CANDIDATES,
            "requests": NUM_REQUESTS,
        }
    units = {record.metric: record.unit for record in records}
    assert units == {
        "auc": "auc",
        "auc_change": "auc",
        "top10_overlap": "share",
        "max_score_difference": "probability",
        "bytes_ratio": "x",
    }


def test_int8_tables_keep_the_auc_and_fewer_bits_keep_less(figures: Figures) -> None:
    # Pairs of a target and another candidate whose order changes, of 1,470: two.
    assert abs(figures["int8"]["auc_change"]) <= 3 / (NUM_REQUESTS * (NUM_CANDIDATES - 1))
    worst = [figures[dtype]["max_score_difference"] for dtype in QUANTISED]
    assert 0 < worst[0] < worst[1] < worst[2]
    overlap = [figures[dtype]["top10_overlap"] for dtype in QUANTISED]
    assert 1.0 >= overlap[0] >= overlap[1] >= overlap[2] > 0.5


def test_figures_are_those_of_the_tables_alone(run: Path, figures: Figures) -> None:
    """Computed again in torch."""
    ranker, schema = load_trained(run)
    model = RankingModel(ranker).eval()
    dataset = build_dataset(load_log(DATA), schema.histories)
    drawn, scores = [], {}
    for dtype in ("float32", "int4"):
        engine = Engine(
            quantise_tables(model, dtype), schema, store=None, version=version_called(dtype)
        )
        rows = []
        for raw, target in make_targeted_requests(
            in_memory(dataset), NUM_REQUESTS, NUM_CANDIDATES, SEED
        ):
            rows.append(engine.rank([parse_request(raw, schema)])[0].scores)
            drawn.append(target)
        scores[dtype] = torch.tensor(rows, dtype=torch.float64)  # [Q, N]
    auc, best = {}, {}
    targets = torch.tensor(drawn[:NUM_REQUESTS])[:, None]
    for dtype, rows in scores.items():
        own = rows.gather(1, targets)
        below = (rows < own).sum(1).double() + ((rows == own).sum(1) - 1).double() / 2
        auc[dtype] = float(below.mean()) / (NUM_CANDIDATES - 1)
        best[dtype] = torch.zeros_like(rows).scatter(1, rows.topk(10).indices, 1.0)
    assert figures["float32"]["auc"] == pytest.approx(auc["float32"], abs=1e-12)
    int4 = figures["int4"]
    assert int4["auc_change"] == pytest.approx(auc["int4"] - auc["float32"], abs=1e-12)
    overlap = float((best["float32"] * best["int4"]).sum(1).mean()) / 10
    assert int4["top10_overlap"] == pytest.approx(overlap, abs=1e-12)
    assert int4["max_score_difference"] == float((scores["int4"] - scores["float32"]).abs().max())
    # Otherwise the comparisons above would prove nothing.
    assert int4["auc_change"] != 0
    assert overlap < 1


def test_bytes_are_those_of_all_tables(run: Path, figures: Figures) -> None:
    model = RankingModel(load_trained(run)[0]).eval()
    for dtype in QUANTISED:
        num_bytes = table_bytes(quantise_tables(model, dtype))
        assert figures[dtype]["bytes_ratio"] == pytest.approx(num_bytes / table_bytes(model))


def test_the_pipeline_measures_the_same_again(
    run: Path, records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(
        "benchmark",
        "scenario=tables",
        f"run={run}",
        *(f"data.{key}={value}" for key, value in vars(DATA).items()),
        f"requests={NUM_REQUESTS}",
        f"candidates=[{NUM_CANDIDATES}]",
        f"seed={SEED}",
        f"output={tmp_path / 'results'}",
    )
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    assert written["records"] == [asdict(record) for record in records]
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["encoder", "history", "candidates", "path", "auc", *METRICS]
    assert [row.split()[3] for row in rows[:4]] == list(TABLE_DTYPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": [5, 9]}, r"candidates is \[5, 9\]; it must be one number, at least 2"),
        ({"candidates": [1]}, r"candidates is \[1\]; it must be one number, at least 2"),
        ({"candidates": [500]}, "candidates is 500; the catalogue has 60 items"),
        ({"data": replace(DATA, num_items=20)}, "data synthetic has 20 of the 60 items that the"),
    ],
)
def test_options_that_cannot_work_are_refused(
    run: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure("tables", options_of(run, **change))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no finished run: it has no metrics\.json"):
        measure("tables", options_of(tmp_path))
