"""Managed ids: rows go to frequent ids while the model trains, and stay theirs afterwards."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.once import shared_folder
from tests.training.managed_program import (
    DATA,
    IDS,
    NUM_STEPS,
    ROW_WISE,
    SAVED_AT,
    managed_shards,
    managed_trainer,
    maps_of,
    train_steps,
)
from tests.training.on_ranks import Case, find, points, run_on_ranks
from tests.training.worlds import BUDGET, tiny_config
from torchrec_kvshare.config import IdConfig, TrainConfig
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import unknown_ids
from torchrec_kvshare.features.schema import (
    ITEM,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    USER,
    Managed,
    Vocabulary,
)
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.managed import keys_of
from torchrec_kvshare.training.ranks import joined_ranks
from torchrec_kvshare.training.run import load_trained, train_run
from torchrec_kvshare.training.selection import Best
from torchrec_kvshare.training.sharding import ADAGRAD, TableSettings

# Losses of ranks, whose sums have another order: as in ``test_ranks``.
RUN_TOLERANCE = 1e-6
COLUMN_WISE = TableSettings(ADAGRAD, 0.05, {"*": ["column_wise"]})
SUM_TOLERANCE = 1e-4  # of the sum of a tensor's weights; the largest has 1,000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return managed_shards(tmp_path_factory.mktemp("unused"))


def values_of(trainer: Trainer, key: str, step: int = 0) -> tuple[Tensor, Tensor]:
    """The ids of a key in a training batch, before and after they are remapped."""
    batch = trainer.stream.batch(trainer.stream.epoch(0).chosen[step], 0, 0)
    mapped = trainer.managed.remapped(batch)
    return tuple(one.sparse_features[key].values() for one in (batch, mapped))  # type: ignore


# --- while training


def test_rows_go_to_ids_that_come_and_all_others_are_unknown(
    shards: Shards, tmp_path: Path
) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = managed_trainer(shards, tmp_path, ranks)
        train_steps(trainer, 0, 2)
        _, mapped = values_of(trainer, "candidates.item_id")
        assert set(mapped.tolist()) == {UNKNOWN_ROW}
        train_steps(trainer, 2, NUM_STEPS)
        for column, key in ((ITEM, "history.item_id"), (ITEM, "candidates.item_id"), (USER, USER)):
            num_rows = IDS[column].num_rows
            codes, rows = values_of(trainer, key, NUM_STEPS)
            assert rows.max() < num_rows + NUM_RESERVED_ROWS
            assert UNKNOWN_ROW in rows
            row_by_code = dict(zip(codes.tolist(), rows.tolist(), strict=True))
            known = [row for row in row_by_code.values() if row >= NUM_RESERVED_ROWS]
            assert 0 < len(known) == len(set(known))
        # One map for all tables of a column.
        one, other = (
            dict(zip(*map(Tensor.tolist, values_of(trainer, f"{group}.item_id")), strict=True))
            for group in ("history", "candidates")
        )
        shared = one.keys() & other.keys()
        assert len(shared) > 10
        assert {code: one[code] for code in shared} == {code: other[code] for code in shared}


def test_reserved_rows_stay_and_a_batch_is_not_changed(shards: Shards, tmp_path: Path) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = managed_trainer(shards, tmp_path, ranks)
        train_steps(trainer, 0, 6)
        batch = trainer.stream.batch(trainer.stream.epoch(0).chosen[0], 0, 0)
        values = batch.sparse_features.values()
        first = sum(batch.sparse_features.length_per_key()[:1])
        values[:first] = torch.arange(first) % 2
        before = values.clone()
        mapped = trainer.managed.remapped(batch).sparse_features
        assert torch.equal(values, before)
        assert torch.equal(mapped.values()[:first], before[:first])
        times = "history.time"
        assert torch.equal(mapped[times].values(), batch.sparse_features[times].values())
        assert mapped.inverse_indices() is batch.sparse_features.inverse_indices()


@pytest.mark.parametrize("tables", [ROW_WISE, COLUMN_WISE], ids=["row_wise", "column_wise"])
def test_a_row_that_changes_hands_starts_anew(
    shards: Shards, tmp_path: Path, tables: TableSettings
) -> None:
    """In all tables of its column, with the optimizer's state; other rows are not touched."""
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = managed_trainer(shards, tmp_path, ranks, tables=tables)
        train_steps(trainer, 0, 8)
        weights, states = tables_of(trainer)
        chosen = trainer.stream.epoch(0).chosen[8]
        batch = trainer.stream.batch(chosen, 0, 0)
        evicted = trainer.managed.observe(batch, step=8)
        assert set(evicted) == {ITEM, "items.category"}
        rows = torch.from_numpy(evicted[ITEM])
        assert 0 < len(rows) < IDS[ITEM].num_rows
        assert trainer.managed.num_evicted[ITEM] == len(rows)
        others = torch.tensor([n for n in range(IDS[ITEM].num_rows + 2) if n not in rows])
        # The same again, by way of a step that trains nothing.
        again = managed_trainer(shards, tmp_path / "again", ranks, tables=tables)
        train_steps(again, 0, 8)
        again._remapped(batch)
        after_weights, after_states = tables_of(again)
        for name, before in weights.items():
            changed = (after_weights[name] != before).any(dim=1)
            if "item_id" in name:
                assert changed[rows].all(), name
                assert not changed[others].any(), name
                # Drawn as all tables are: normal, with a variance of 1 / dim.
                assert 0.5 / 16 < after_weights[name][rows].square().mean() < 2 / 16
                assert (states[name][rows] > 0).any()
                assert (after_states[name][rows] == 0).all()
                assert torch.equal(after_states[name][others], states[name][others])
            elif "category" not in name:
                assert not changed.any(), name
        items = [after_weights[name][rows] for name in weights if "item_id" in name]
        assert not torch.equal(items[0], items[1])


def tables_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of each table's weights and of its optimizer's sums."""
    weights, states = {}, {}
    optimizers = trainer.sharded.fused_optimizer.state_dict()["state"]
    for name, value in trainer.sharded.state_dict().items():
        if name in optimizers:
            [state] = optimizers[name].values()
            for found, whole in ((weights, value), (states, state)):
                shards = [shard.tensor for shard in whole.local_shards()]
                found[name] = torch.cat(shards, dim=-1) if len(shards) > 1 else shards[0].clone()
    return weights, states


def test_keys_of_a_column_are_those_of_its_tables(shards: Shards) -> None:
    schema = shards.schema
    assert keys_of(schema, USER) == [USER]
    groups = ("history", "candidates", "shared", "vectors")
    assert keys_of(schema, ITEM) == [f"{group}.item_id" for group in groups]
    assert keys_of(schema, "events.action") == ["history.action"]
    assert keys_of(schema, "items.category") == [f"{group}.category" for group in groups]
    assert keys_of(schema, "context.category") == ["context.category"]


# --- ranks and checkpoints


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    told = run_on_ranks("managed_program", shared_folder(tmp_path_factory, "managed"), 2, 1)
    two, one = told[2], told[1]
    return {
        "first of two": find(two[0], case="trained"),
        "second of two": find(two[1], case="trained"),
        "alone": find(one[0], case="trained"),
        "resumed": find(one[0], case="resumed"),
    }


@pytest.mark.parametrize("who", ["first of two", "second of two"])
def test_ranks_have_the_map_and_the_losses_of_one_process(told: dict[str, Case], who: str) -> None:
    alone, found = told["alone"], told[who]
    assert found["maps"] == alone["maps"]
    assert found["num_evicted"] == alone["num_evicted"] > 0
    assert found["losses"] == pytest.approx(alone["losses"], abs=RUN_TOLERANCE, rel=0)
    assert found["sums"] == pytest.approx(alone["sums"], abs=SUM_TOLERANCE, rel=0)


def test_one_process_resumes_what_two_ranks_saved(told: dict[str, Case]) -> None:
    alone, found = told["alone"], told["resumed"]
    assert found["maps"] == alone["maps"]
    losses = alone["losses"][SAVED_AT:]
    assert found["losses"] == pytest.approx(losses, abs=RUN_TOLERANCE, rel=0)


def test_a_resumed_trainer_goes_on_as_if_nothing_had_happened(
    shards: Shards, tmp_path: Path
) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = managed_trainer(shards, tmp_path, ranks)
        train_steps(trainer, 0, SAVED_AT)
        trainer._save(None)
        expected = train_steps(trainer, SAVED_AT, NUM_STEPS)
        resumed = managed_trainer(shards, tmp_path, ranks, seed=7)
        resumed.resume()
        assert train_steps(resumed, SAVED_AT, NUM_STEPS) == expected
        assert maps_of(resumed) == maps_of(trainer)


# --- after training


def test_the_map_of_the_best_epoch_is_part_of_the_result(shards: Shards, tmp_path: Path) -> None:
    """Rows of the last map would be read from the best epoch's tables."""
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = managed_trainer(shards, tmp_path, ranks)
        train_steps(trainer, 0, 5)
        step = trainer.progress.step
        trainer.progress.best = Best(value=0.9, epoch=0, step=step)
        trainer._save(None)
        expected = maps_of(trainer)
        train_steps(trainer, 5, 13)
        trainer._save(None)
        assert trainer.progress.step > step
        assert maps_of(trainer) != expected
        trainer._take_result()
        assert maps_of(trainer) == expected


def config_of(folder: Path, **changes: object) -> TrainConfig:
    whole = {"ids": IDS, "data": DATA, "budget": replace(BUDGET, baselines=["none", "popularity"])}
    return tiny_config(folder, **(whole | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_run(config_of(folder))
    return folder


def test_tensorboard_shows_how_many_ids_lost_their_rows(finished: Path) -> None:
    found = points(finished / "tensorboard" / "causal")
    steps = [step for step, _ in found["evicted_ids/item_id"]]
    assert steps == list(range(2, len(found["train/loss"]), 3))
    assert found["evicted_ids/item_id"][0] == (2, 0.0)
    assert sum(count for _, count in found["evicted_ids/item_id"]) > 5


def test_a_finished_run_knows_the_ids_that_have_rows(finished: Path) -> None:
    _, schema = load_trained(finished)
    for column, name in ((ITEM, ITEM), (USER, USER), ("items.category", "category")):
        vocabulary = schema.vocabulary_by_column[column]
        assert isinstance(vocabulary, Vocabulary)
        assert vocabulary.codes.size == IDS[name].num_rows
        assert vocabulary.num_table_rows == IDS[name].num_rows + NUM_RESERVED_ROWS
        assert len(set(vocabulary.rows(vocabulary.examples))) == len(vocabulary.examples)
        assert len(vocabulary.examples) == vocabulary.codes.size
        assert vocabulary.row("never met") == UNKNOWN_ROW


def test_the_frozen_map_is_that_of_training(
    shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = managed_trainer(shards, tmp_path, ranks)
        train_steps(trainer, 0, NUM_STEPS)
        with caplog.at_level(logging.INFO):
            frozen = trainer.managed.frozen(shards.schema, shards.shared.known_ids)
        assert "item_id is managed: 90 ids have a row, of the" in caplog.text
        for column, key in ((ITEM, "history.item_id"), (USER, USER)):
            codes, rows = values_of(trainer, key, step=1)
            is_id = codes >= NUM_RESERVED_ROWS
            asked = (codes[is_id] - NUM_RESERVED_ROWS).numpy()
            ours = frozen.vocabulary_by_column[column].rows_of_codes(asked)
            assert np.array_equal(ours, rows[is_id].numpy())
            assert {*ours.tolist()} > {UNKNOWN_ROW}
        for column in ("events.action", "context.none"):
            ours, theirs = (one.vocabulary_by_column.get(column) for one in (frozen, shards.schema))
            assert ours is theirs


def test_an_artifact_scores_as_the_model_and_counts_unknown_ids(
    finished: Path, shards: Shards, tmp_path: Path
) -> None:
    model, schema = load_trained(finished)
    ranking = RankingModel(model).eval()
    manifest = export_model(ranking, schema, tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    items = artifact.schema.vocabulary_by_column[ITEM]
    unknown = [one for one in shards.shared.known_ids[ITEM] if items.row(one) == UNKNOWN_ROW]
    known = list(items.examples)
    assert len(unknown) > 5
    raw = {
        "user_id": "nobody",
        "time": 2_000_000_000,
        "context": {column: [] for column in schema.context},
        "history": {
            "item_id": [*known[:5], unknown[0]],
            "action": ["view"] * 6,
            "category": [[]] * 6,
            "time": [1_999_999_990 + number for number in range(6)],
        },
        "candidates": {
            "item_id": [*known[3:9], *unknown[:2]],
            "category": [["0"]] * 8,
            **{column: [1.0] * 8 for column in schema.item_floats},
        },
    }
    request = parse_request(raw, artifact.schema)
    counted = unknown_ids(request)
    assert counted["history.item_id"] == 1
    assert counted["candidates.item_id"] == 2
    [answer] = new_engine(artifact).rank([request])
    [expected] = Engine(ranking, schema, None, version=manifest.version).rank([request])
    assert answer.scores == pytest.approx(expected.scores, abs=1e-6)
    # Unknown candidates share a row; what has a row of its own has a score of its own.
    assert answer.scores[6] == answer.scores[7]
    assert len({*answer.scores[:7]}) == 7


def test_a_killed_run_ends_as_one_that_was_not(finished: Path, tmp_path: Path) -> None:
    """Its last checkpoints are gone: it trains the last epoch again."""
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    (again / "metrics.json").unlink()
    (again / "ids.npy").unlink()
    shutil.rmtree(again / "none")
    train_run(config_of(again))
    for name in ("metrics.json", "schema.json", "ids.npy"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_rows_of_a_column_are_needed(tmp_path: Path) -> None:
    ids = {"item_id": IdConfig("managed")}
    with pytest.raises(ConfigError, match=r"ids.item_id.num_rows is missing; managed ids need it"):
        train_run(config_of(tmp_path / "run", ids=ids))


def test_metrics_of_popularity_are_those_of_a_vocabulary(finished: Path, tmp_path: Path) -> None:
    """It counts ids, which the managed map must not merge."""
    other = tmp_path / "run"
    budget = replace(BUDGET, baselines=["none", "popularity"], epochs=1)
    train_run(config_of(other, ids={}, budget=budget))
    found, expected = (
        json.loads((run / "metrics.json").read_text())["test"]["popularity"]
        for run in (finished, other)
    )
    assert found == expected


def test_a_managed_map_is_not_written_as_a_vocabulary() -> None:
    assert Managed(5, 2).to_json() == {"kind": "managed", "num_rows": 5, "eviction_steps": 2}
