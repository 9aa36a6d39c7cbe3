"""A run whose ids are hashed: trained, resumed, exported and served like any other."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.worlds import BUDGET, tiny_config
from torchrec_kvshare.cache.identity import version_of
from torchrec_kvshare.config import IdConfig, TrainConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.draw import draw_ragged_raws
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import (
    ITEM,
    NUM_RESERVED_ROWS,
    USER,
    Hashed,
)
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.run import load_trained, train_run

IDS = {
    "item_id": IdConfig("hashed", num_rows=31, salt=5),
    "user_id": IdConfig("hashed", num_rows=10_000),
    "category": IdConfig("hashed", num_rows=3),
}


def config_of(folder: Path, **ids: IdConfig) -> TrainConfig:
    budget = replace(BUDGET, epochs=1, baselines=["none", "popularity"])
    return tiny_config(folder, budget=budget, ids=ids)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashed") / "run"
    train_run(config_of(folder, **IDS))
    return folder


def test_a_run_says_how_many_ids_share_a_row(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    colliding = json.loads((finished / "metrics.json").read_text())["colliding_ids"]
    assert set(colliding) == {ITEM, USER, "items.category"}
    # Of some 60 items in 31 rows few are alone; so are nearly all 40 users.
    assert colliding[ITEM] > 30
    assert colliding[USER] <= 2
    with caplog.at_level(logging.INFO):
        train_run(config_of(finished, **IDS))
    assert f"item_id is hashed, so no id of it is unknown: {colliding[ITEM]} of the" in caplog.text
    assert "is finished" in caplog.text


def test_tables_have_the_rows_that_were_asked_for(finished: Path) -> None:
    model, schema = load_trained(finished)
    assert isinstance(schema.vocabulary_by_column[ITEM], Hashed)
    rows = {name: len(table) for name, table in model.named_parameters() if "_id.weight" in name}
    assert {name.rsplit(".", 2)[1]: count for name, count in rows.items()} == {
        "bag_user_id": 10_000 + NUM_RESERVED_ROWS,
        "bag_item_id": 31 + NUM_RESERVED_ROWS,
        "token_item_id": 31 + NUM_RESERVED_ROWS,
        "vector_item_id": 31 + NUM_RESERVED_ROWS,
    }


def test_another_salt_is_another_run(finished: Path) -> None:
    others = IDS | {"item_id": IdConfig("hashed", num_rows=31, salt=6)}
    with pytest.raises(ConfigError, match=r"another config; these differ: \['ids'\]"):
        train_run(config_of(finished, **others))


@pytest.mark.parametrize("tables", ["float32", "int8"])
def test_an_artifact_scores_raw_ids_as_the_model_does(
    finished: Path, tmp_path: Path, tables: str
) -> None:
    model, schema = load_trained(finished)
    ranking = RankingModel(model).eval()
    manifest = export_model(ranking, schema, tmp_path / "artifact", tables=tables)
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.schema.to_json() == schema.to_json()
    engine = new_engine(artifact)
    raws = draw_ragged_raws(schema, seed=3)
    raws[1]["candidates"][ITEM][0] = "an item that no file lists"
    requests = [parse_request(raw, artifact.schema) for raw in raws]
    cold, warm = engine.rank(requests), engine.rank(requests)
    assert [one.cache.status for one in warm[1:]] == ["hit"] * (len(raws) - 1)
    eager = Engine(ranking, schema, None, version=manifest.version)
    tolerance = 1e-6 if tables == "float32" else 0.05
    for one, again, expected in zip(cold, warm, eager.rank(requests), strict=True):
        for scores in (one.scores, again.scores):
            wanted = torch.tensor(expected.scores)
            torch.testing.assert_close(torch.tensor(scores), wanted, rtol=0, atol=tolerance)


def test_keys_of_cached_histories_change_with_the_salt(finished: Path) -> None:
    model, schema = load_trained(finished)
    salted = schema.vocabulary_by_column | {ITEM: Hashed(31, salt=6)}
    other = replace(schema, vocabulary_by_column=salted)
    ranking = RankingModel(model).eval()
    assert version_of(ranking, other).model != version_of(ranking, schema).model


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (IdConfig("hashed"), "ids.item_id.num_rows is missing; hashed ids need it"),
        (IdConfig(num_rows=5), "ids.item_id.num_rows is 5; a vocabulary has a row for each"),
        (IdConfig(salt=5), "ids.item_id.salt is 5; vocabulary ids have none"),
    ],
)
def test_numbers_that_are_missing_or_of_no_use_are_refused(
    tmp_path: Path, ids: IdConfig, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train_run(config_of(tmp_path / "run", item_id=ids))
    assert not (tmp_path / "run").exists()


def test_columns_that_the_data_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ids has the columns \['brand'\]; \['action', "):
        train_run(config_of(tmp_path / "run", brand=IdConfig("hashed", num_rows=5)))
    assert not (tmp_path / "run").exists()
