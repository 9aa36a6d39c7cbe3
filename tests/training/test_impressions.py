"""Logs of impressions: logged labels instead of sampled negatives, each request with a context."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.worlds import BUDGET, MODEL, tiny_config
from torchrec_kvshare.config import (
    Columns,
    InteractionsData,
    PrepareConfig,
    PreparedData,
    TrainConfig,
)
from torchrec_kvshare.data.prepare import prepare
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.training.run import load_trained, train_run

NUM_ITEMS, SHOWN = 12, 4
SURFACES = ("home", "search")
COLUMNS = Columns(
    user="user", item="item", time="time", action="action", request_attributes=["surface"]
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> InteractionsData:
    """Requests of 30 users: even items are clicked at home, odd ones in a search."""
    rng = np.random.default_rng(11)
    path = tmp_path_factory.mktemp("log") / "impressions.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "time", "action", "surface"])
        for user in range(30):
            for number in range(25):
                surface = SURFACES[int(rng.integers(2))]
                for item in rng.choice(NUM_ITEMS, SHOWN, replace=False).tolist():
                    clicked = (item % 2 == 0) == (surface == "home")
                    action = "click" if clicked else "show"
                    rows.writerow([user, item, 1_700_000_000 + 60 * number, action, surface])
    return InteractionsData(path=str(path), columns=COLUMNS, label="action==click")


def impressions_config(output: Path, data: object, **changes: object) -> TrainConfig:
    """A run on logged labels, whose history is of clicks."""
    sizes = replace(MODEL, histories={"history": ["click"]}, top_mlp=[32, 1])
    budget = replace(BUDGET, epochs=3, baselines=["none", "popularity"])
    return tiny_config(output, data=data, model=sizes, budget=budget, negatives=0, **changes)


@pytest.fixture(scope="module")
def finished(log: InteractionsData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    metrics = train_run(impressions_config(folder, log))
    assert metrics is not None
    # Of all items as many impressions are clicked as are not: only the surface tells.
    assert metrics["causal"]["AUC"] > 0.95
    assert metrics["popularity"]["AUC"] < 0.6
    return folder


def test_a_served_request_gets_the_scores_of_its_context(finished: Path, tmp_path: Path) -> None:
    model, schema = load_trained(finished)
    assert schema.context == ("surface",)
    export_model(RankingModel(model).eval(), schema, tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    raw = {
        "user_id": 3,
        "time": 1_700_009_000,
        "history": {"item_id": [2, 4], "action": ["click"] * 2, "time": [1_700_000_000] * 2},
        "candidates": {"item_id": list(range(NUM_ITEMS))},
    }
    requests = [
        parse_request(raw | {"context": {"surface": [surface]}}, artifact.schema)
        for surface in SURFACES
    ]
    home, search = (answer.scores for answer in new_engine(artifact).rank(requests))
    assert min(home[::2]) > max(home[1::2])
    assert min(search[1::2]) > max(search[::2])


def test_a_prepared_log_has_the_metrics_of_the_log_in_memory(
    log: InteractionsData, finished: Path, tmp_path: Path
) -> None:
    prepare(PrepareConfig(str(tmp_path / "prepared"), log, num_shards=1))
    data = PreparedData(path=str(tmp_path / "prepared"))
    ours = train_run(impressions_config(tmp_path / "run", data))
    assert ours == train_run(impressions_config(finished, log))


def test_a_log_without_label_0_needs_negatives(log: InteractionsData, tmp_path: Path) -> None:
    data = replace(log, label=None)
    with pytest.raises(DataError, match=r"no event with label 0 in .* 1 or more negatives"):
        train_run(impressions_config(tmp_path / "run", data))
