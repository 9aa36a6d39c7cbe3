"""A run goes on from another; if the ranking stage alone is trained, K/V of the other stays."""

import csv
import dataclasses
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.folders import write_folder
from tests.encoder_worlds import make_caches
from tests.training.on_ranks import (
    run_config,
    trainer_of,
)
from tests.training.worlds import BUDGET, MODEL, tiny_config
from tests.worlds import assert_same_scores
from torchrec_kvshare.cache.identity import version_of
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import (
    RANKING_STAGE,
    Columns,
    IdConfig,
    InteractionsData,
    PreparedData,
    TrainConfig,
)
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.requests import make_requests
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.errors import ConfigError, DataError, KVShareError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import ITEM, USER
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training import loop
from torchrec_kvshare.training.checkpoints import checkpoints_of, result_of
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.ranks import joined_ranks
from torchrec_kvshare.training.run import load_data, load_trained, train_run
from torchrec_kvshare.training.sharding import TableSettings, local_weights

NUM_OLD, NUM_NEW = 500, 200  # events
ONE_EPOCH = replace(BUDGET, epochs=1, eval_users=5)
TOWER = (".histories.poolings.", ".token_embeddings.embeddings.token_")


def write_log(path: Path, num_events: int) -> InteractionsData:
    """Events of 10 users and 20 items; of the newer ones, of one user and ten items more."""
    chance = random.Random(3)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "time", "kind", "stars"])
        for number in range(num_events):
            is_new = number >= NUM_OLD
            user, item = chance.randrange(10 + is_new), chance.randrange(20 + 10 * is_new)
            time, stars = 1_700_000_000 + 60 * number, chance.randint(1, 5)
            writer.writerow([f"u{user}", f"i{item}", time, f"k{item % 4}", stars])
    columns = Columns(
        user="user", item="item", time="time", item_attributes=["kind"], user_attributes=[]
    )
    return InteractionsData(path=str(path), columns=columns)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run on the older events."""
    folder = tmp_path_factory.mktemp("old")
    data = write_log(folder / "log.csv", NUM_OLD)
    config = tiny_config(folder / "run", data=data, budget=replace(BUDGET, epochs=2, eval_users=5))
    train_run(config)
    return config


@pytest.fixture(scope="module")
def newer(old: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of the ranking stage of ``old`` on all events."""
    folder = tmp_path_factory.mktemp("newer")
    config = stage_config(old, folder / "run", write_log(folder / "log.csv", NUM_OLD + NUM_NEW))
    train_run(config)
    return config


def stage_config(old: TrainConfig, output: Path, data: Any, **changes: Any) -> TrainConfig:
    defaults = {"budget": ONE_EPOCH, "init_from": old.output, "trainable": RANKING_STAGE}
    return replace(old, output=str(output), data=data, **defaults | changes)


def state_of(run: Path | str) -> dict[str, Tensor]:
    return load_trained(Path(run))[0].state_dict()


def is_of_tower(name: str) -> bool:
    return any(part in name for part in TOWER)


def assert_stage_alone_differs(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    assert set(found) == set(before)
    same = {name for name, weight in found.items() if torch.equal(weight, before[name])}
    integers = {name for name, weight in found.items() if not weight.is_floating_point()}
    assert same - integers == {name for name in found if is_of_tower(name)} - integers


# --- what stays, and what it is good for


def test_kv_of_the_old_version_is_a_hit_for_a_ranking_stage_of_newer_events(
    old: TrainConfig, newer: TrainConfig, tmp_path: Path
) -> None:
    """Every version that the trainer could make discarded all K/V of the one before it."""
    engines = []
    for name, config in (("old", old), ("new", newer)):
        model, schema = load_trained(Path(config.output))
        export_model(RankingModel(model).eval(), schema, tmp_path / name)
        artifact = load_artifact(tmp_path / name)
        engines.append((artifact, schema))
    (before, _), (after, schema) = engines
    assert after.manifest.kv == before.manifest.kv
    assert after.manifest.model_digest != before.manifest.model_digest
    assert after.manifest.tables_digest != before.manifest.tables_digest
    model, _ = load_trained(Path(old.output))
    store = KVStore(make_caches(RankingModel(model).eval(), [60]))
    raws = make_requests(load_data(newer), count=30, num_candidates=5, seed=1)
    by_user = {raw["user_id"]: raw for raw in raws}
    requests = [parse_request(raw, schema) for raw in by_user.values()]
    assert len(requests) > 5
    first = Engine(before.model, schema, store, version=before.manifest.version).rank(requests)
    engine = Engine(after.model, schema, store, version=after.manifest.version)
    answers = engine.rank(requests)
    assert {one.cache.status for one in answers} == {"hit"}
    uncached = Engine(after.model, schema, None, version=after.manifest.version).rank(requests)
    assert_same_scores(answers, uncached)
    differences = [
        abs(one - other)
        for new, kept in zip(answers, first, strict=True)
        for one, other in zip(new.ranking_scores, kept.ranking_scores, strict=True)
    ]
    assert max(differences) > 1e-3


def test_towers_and_their_tables_keep_every_bit_and_all_else_is_trained(
    old: TrainConfig, newer: TrainConfig
) -> None:
    assert_stage_alone_differs(state_of(newer.output), state_of(old.output))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoder_keeps_its_kv(kind: str, tmp_path: Path) -> None:
    """With decay, averages, clipping and bfloat16, none of which may reach what is frozen."""
    changes: dict[str, Any] = {
        "model": replace(MODEL, history=kind, merge=4, recent=8, table_dim=12),
        "budget": replace(ONE_EPOCH, max_users=12),
    }
    first = tiny_config(tmp_path / "first", **changes)
    train_run(first)
    options: dict[str, Any] = {
        "weight_decay": 0.5,
        "ema_decay": 0.9,
        "clip_norm": 0.1,
        "table_clip": 0.01,
        "precision": "bfloat16",
        "keep_best": "AUC",
        "table_optimizer": "adagrad",
        "seed": 4,
    }
    train_run(stage_config(first, tmp_path / "second", first.data, **changes, **options))
    found, before = (load_trained(tmp_path / name) for name in ("second", "first"))
    assert_stage_alone_differs(found[0].state_dict(), before[0].state_dict())
    versions = [version_of(RankingModel(model).eval(), schema) for model, schema in (found, before)]
    assert versions[0].kv == versions[1].kv
    assert versions[0].model != versions[1].model


@pytest.mark.parametrize("user_state", [True, False])
def test_a_ranking_stage_is_trained_without_a_next_event_loss(
    user_state: bool, tmp_path: Path
) -> None:
    """Without states no token table is trained, so that none of them gets a gradient."""
    changes: dict[str, Any] = {
        "model": replace(MODEL, user_state=user_state),
        "budget": replace(ONE_EPOCH, max_users=12),
        "next_event": 0.0,
    }
    first = tiny_config(tmp_path / "first", **changes)
    train_run(first)
    train_run(stage_config(first, tmp_path / "second", first.data, **changes))
    assert_stage_alone_differs(state_of(tmp_path / "second"), state_of(tmp_path / "first"))


def test_all_of_a_run_that_goes_on_is_trained_from_the_weights_of_the_other(
    old: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Tensor]] = []
    real_run = Trainer.run

    def run(trainer: Trainer, writer: Any) -> None:
        weights = local_weights(trainer.sharded.state_dict())
        started.append({name: weight.clone() for name, weight in weights.items()})
        real_run(trainer, writer)

    monkeypatch.setattr(Trainer, "run", run)
    train_run(stage_config(old, tmp_path / "run", old.data, trainable="all", seed=5))
    before, after = state_of(old.output), state_of(tmp_path / "run")
    begun = {
        name.removeprefix("model.").removesuffix("[0]"): one for name, one in started[0].items()
    }
    assert set(begun) == set(before)
    assert all(torch.equal(begun[name], weight) for name, weight in before.items())
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name for name in changed if is_of_tower(name)}
    assert {name for name in changed if not is_of_tower(name)}


def test_a_run_starts_from_a_checkpoint(old: TrainConfig, tmp_path: Path) -> None:
    checkpoint = result_of(Path(old.output) / "causal")
    by_run = stage_config(old, tmp_path / "by run", old.data)
    by_checkpoint = replace(
        by_run, output=str(tmp_path / "by checkpoint"), init_from=str(checkpoint)
    )
    assert train_run(by_run) == train_run(by_checkpoint)
    found, expected = state_of(by_checkpoint.output), state_of(by_run.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_baselines_start_anew_and_are_trained_whole(old: TrainConfig, tmp_path: Path) -> None:
    budget = replace(ONE_EPOCH, baselines=["none", "pooled"])
    metrics = train_run(stage_config(old, tmp_path / "stage", old.data, budget=budget))
    alone = train_run(replace(old, output=str(tmp_path / "anew"), budget=budget))
    assert metrics is not None
    assert alone is not None
    for kind in budget.baselines:
        assert metrics[kind] == alone[kind]
    assert metrics["causal"] != alone["causal"]


# --- what it costs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return load_data(run_config(tmp_path_factory.mktemp("unused")))


def test_nothing_is_computed_backward_through_towers_and_no_state_is_kept_for_them(
    shards: Shards, tmp_path: Path
) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainers = {
            trainable: trainer_of("causal", shards, tmp_path / trainable, ranks, **changes)
            for trainable, changes in {
                "all": {"trainable": "all"},
                RANKING_STAGE: {
                    "trainable": RANKING_STAGE,
                    "tables": TableSettings("adagrad", 0.05),
                },
            }.items()
        }
        ops: dict[str, set[str]] = {}
        for trainable, trainer in trainers.items():
            batch = trainer.stream.batch(trainer.stream.epoch(0).chosen[0], 0, 0)
            with torch.profiler.profile() as profile:
                trainer.step(batch)
            ops[trainable] = {event.key for event in profile.key_averages()}
    backward = {name for name in ops["all"] if "attention_backward" in name}
    assert len(backward) >= 2  # of the history and of the candidates
    assert not {name for name in ops[RANKING_STAGE] if "attention_backward" in name}
    trainer = trainers[RANKING_STAGE]
    state = trainer.optimizer.state_dict()["state"]
    with_state = {name.partition(".")[2] for name, of_one in state.items() if of_one}
    names = set(trainer.sharded.state_dict())
    trained = {name for name in names if not is_of_tower(name)}
    assert with_state == {name for name in trained if "indices" not in name}


def test_frozen_towers_drop_nothing_out(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In train mode the ranking stage would learn from what no server gives it.

    Validation put all into eval mode, so that the first epoch alone would have shown it.
    """
    modes: list[tuple[bool, bool]] = []
    real_step = Trainer.step

    def step(trainer: Trainer, *args: Any, **given: Any) -> float:
        modules = dict(trainer.ranker.named_modules())
        towers = {module.training for name, module in modules.items() if ".tower" in name}
        modes.append((towers == {True}, trainer.ranker.training))
        return real_step(trainer, *args, **given)

    monkeypatch.setattr(Trainer, "step", step)
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer_of("causal", shards, tmp_path, ranks, trainable=RANKING_STAGE).run(None)
    assert len(modes) > 20
    assert set(modes) == {(False, True)}


# --- ids


def test_ids_have_the_rows_of_the_run_that_it_starts_from(
    old: TrainConfig, newer: TrainConfig
) -> None:
    (_, before), (_, after) = (load_trained(Path(one.output)) for one in (old, newer))
    assert after.to_json() == before.to_json()
    ids = [f"i{item}" for item in range(30)]
    rows = after.vocabulary_by_column[ITEM].rows_of_ids(ids).tolist()
    assert rows == before.vocabulary_by_column[ITEM].rows_of_ids(ids).tolist()
    unknown = json.loads((Path(newer.output) / "metrics.json").read_text())["unknown_ids"]
    log = load_data(replace(newer, init_from=None, trainable="all")).shared.known_ids
    assert unknown == {
        column: len([raw for raw in ids if raw not in known])
        for column, ids, known in (
            (ITEM, log[ITEM], load_data(old).shared.known_ids[ITEM]),
            (USER, log[USER], load_data(old).shared.known_ids[USER]),
            ("items.kind", log["items.kind"], load_data(old).shared.known_ids["items.kind"]),
        )
    }
    assert unknown[ITEM] > 5
    assert unknown["items.kind"] == 0


def test_a_prepared_log_goes_on_as_the_log_in_memory(
    old: TrainConfig, newer: TrainConfig, tmp_path: Path
) -> None:
    folder = write_folder(load_log(newer.data), tmp_path / "folder", 1)
    config = replace(newer, output=str(tmp_path / "run"), data=PreparedData(path=str(folder)))
    train_run(config)
    found, expected = (
        json.loads((Path(one.output) / "metrics.json").read_text()) for one in (config, newer)
    )
    assert found["unknown_ids"] == expected["unknown_ids"]
    assert found["test"] == expected["test"]


def test_a_log_of_other_columns_is_refused(old: TrainConfig, tmp_path: Path) -> None:
    columns = replace(old.data.columns, user_attributes=["stars"])
    config = stage_config(old, tmp_path / "run", replace(old.data, columns=columns))
    said = r"context of the log are \('stars',\); the schema that it is to be encoded with has \(\)"
    with pytest.raises(DataError, match=said):
        train_run(config)
    assert not (tmp_path / "run").exists()


# --- resuming and refusals


def test_a_killed_run_of_the_ranking_stage_resumes_to_the_same_result(
    old: TrainConfig, newer: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(newer, output=str(tmp_path / "run"), checkpoint_seconds=0.0)
    num_steps = 0
    real_step = loop.Trainer.step

    def step(trainer: Trainer, *args: Any, **given: Any) -> float:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise KeyboardInterrupt
        return real_step(trainer, *args, **given)

    monkeypatch.setattr(loop.Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_run(config)
    assert checkpoints_of(tmp_path / "run" / "causal")
    monkeypatch.undo()
    train_run(config)
    found, expected = state_of(config.output), state_of(newer.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"another config; these differ: \['trainable'\]"):
        train_run(replace(config, trainable="all"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_from": None}, "but init_from is null: the towers would stay as they were drawn"),
        ({"init_from": "nowhere"}, "nowhere, which is no finished run, with a metrics.json, and"),
        ({"model": {"history": "none"}}, "with history=none the ranking stage is the whole model"),
        ({"model": {"dim": 32}}, "a run of another model: model.dim is 32, there 16"),
        ({"model": {"dropout": 0.3}}, "model.dropout is 0.3, there 0.1"),
        ({"model": {"history": "hstu"}}, "model.history is 'hstu', there 'causal'"),
        ({"ids": {"item_id": IdConfig("hashed", 9)}}, "ids has the columns .'item_id'.; with init"),
    ],
)
def test_a_start_that_cannot_work_is_refused_before_anything_is_written(
    old: TrainConfig, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if isinstance(model := changes.get("model"), dict):
        changes = changes | {"model": replace(old.model, **model)}
    with pytest.raises(ConfigError, match=said):
        train_run(stage_config(old, tmp_path / "run", old.data, **changes))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_a_start_is_refused(old: TrainConfig, tmp_path: Path) -> None:
    run = shutil.copytree(old.output, tmp_path / "old")
    checkpoint = result_of(run / "causal")
    other = shutil.copytree(checkpoint, run / "none" / checkpoint.name)
    config = stage_config(old, tmp_path / "run", old.data)
    with pytest.raises(ConfigError, match=r"a checkpoint of none; one of causal is allowed"):
        train_run(replace(config, init_from=str(other)))
    values = json.loads((run / "config.json").read_text())
    values["ids"] = {"item_id": dataclasses.asdict(IdConfig("managed", 9))}
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"a run with managed ids, \['item_id'\], whose rows"):
        train_run(replace(config, init_from=str(checkpoint)))
    (run / "config.json").unlink()
    with pytest.raises(KVShareError, match=r"has no config\.json and schema\.json of a run"):
        train_run(replace(config, init_from=str(checkpoint)))
    assert not (tmp_path / "run").exists()
