"""Training learns, logs its progress, and a stopped run resumes to the same result."""

import json
import logging
import math
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torchrec.models.dlrm import DLRMTrain

from tests.training.worlds import BUDGET, DATA, MODEL, tiny_config
from tests.worlds import fresh_process
from torchrec_kvshare.config import Columns, InteractionsData, TrainConfig
from torchrec_kvshare.data.dataset import Dataset
from torchrec_kvshare.data.splits import TEST, VALID
from torchrec_kvshare.errors import ConfigError, DataError, TrainingError
from torchrec_kvshare.features.schema import HISTORY, load_schema
from torchrec_kvshare.training import checkpoints, loop
from torchrec_kvshare.training.checkpoints import (
    PROGRESS,
    checkpoints_of,
    load_progress,
    load_weights,
    non_finite,
    result_of,
)
from torchrec_kvshare.training.evaluate import evaluate_sampled, model_scorer
from torchrec_kvshare.training.metrics import rank_metrics
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out
from torchrec_kvshare.training.ranks import Ranks, joined_ranks
from torchrec_kvshare.training.run import (
    FREE_KEYS,
    load_data,
    load_trained,
    new_model,
    settings_of,
    train_run,
)
from torchrec_kvshare.training.sharding import ADAGRAD, TableSettings, local_weights

SAMPLED = ("AUC", "GAUC", "NE", "calibration")
METRIC_NAMES = (
    *SAMPLED,
    *(f"{name}@{cutoff}" for name in ("HR", "NDCG", "MRR") for cutoff in (1, 5, 10, 50, 200)),
)
TRIVIAL = "HR@200"  # of some sixty items


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_run(tiny_config(folder))
    return folder


def one_shard(config: TrainConfig) -> Dataset:
    """Return the data set of a run on a log in memory."""
    return load_data(config).read([0])


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every point that TensorBoard shows from a folder's event files."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def scalars(folder: Path) -> dict[str, list[float]]:
    return {tag: [value for _, value in found] for tag, found in points(folder).items()}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every TensorBoard curve but the speed, which differs between runs."""
    found = points(folder / "tensorboard" / "causal")
    return {tag: tagged for tag, tagged in found.items() if tag != "train/examples_per_s"}


def checkpoint(folder: Path, kind: str = "causal") -> dict[str, Any]:
    """Return the last checkpoint: progress, and the tensors of model and optimizer by key."""
    found = checkpoints_of(folder / kind)[-1]
    state: dict[str, Any] = {}
    _load_state_dict(
        state, FileSystemReader(found), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return state | {"progress": load_progress(found)}


def tensors(state: Mapping[str, Any], path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of nested dictionaries by their path."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found |= tensors(value, f"{path}{name}/")
        elif isinstance(value, torch.Tensor):
            found[f"{path}{name}"] = value
    return found


class Clock:
    """A clock that stands still but while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.5

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_points_of_a_writer_replace_those_of_one_opened_in_the_same_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files of one second TensorBoard read the tenth before the ninth and dropped its points."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock.time)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    for number in range(12):
        with loop.open_writer(tmp_path, 0) as writer:
            writer.add_scalar("loss", number, 0)
    assert points(tmp_path) == {"loss": [(0, 11.0)]}


def assert_same_run(folder: Path, expected: Path) -> None:
    """Check that metrics, curves, weights and optimizer states are bit-equal."""
    assert curves(folder) == curves(expected)
    assert (folder / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    found, wanted = checkpoint(folder), checkpoint(expected)
    assert found["progress"] == wanted["progress"]
    assert set(found) == set(wanted)
    ours, theirs = tensors(found), tensors(wanted)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# --- learning


def test_training_lowers_the_loss(finished: Path) -> None:
    losses = scalars(finished / "tensorboard" / "causal")["train/loss"]
    # From 0.63 to 0.39; predicting the share of positives, one in eight, gives 0.377.
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:3]) / 3


def test_tensorboard_has_loss_speed_and_quality(finished: Path) -> None:
    found = scalars(finished / "tensorboard" / "causal")
    assert set(found) == {
        *("train/loss", "train/examples_per_s"),
        *(f"valid/{name}" for name in SAMPLED),
        *(f"test/{name.replace('@', '_at_')}" for name in METRIC_NAMES if name != TRIVIAL),
    }
    assert all(speed > 0 for speed in found["train/examples_per_s"])
    assert len(found["train/loss"]) == len(found["train/examples_per_s"]) > 60
    assert {len(found[f"valid/{name}"]) for name in SAMPLED} == {BUDGET.epochs}


def session_groups(folder: Path) -> dict[str, Any]:
    """Return the rows of TensorBoard's HPARAMS tab by their names, which are the folders'."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = MultiplexerDataProvider(runs, str(folder))
    shown = Context(TBContext(data_provider=provider, logdir=str(folder)))
    asked = api_pb2.ListSessionGroupsRequest(
        slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS]
    )
    answer = list_session_groups.Handler(RequestContext(), shown, "0", asked).run()
    return {group.name: group for group in answer.session_groups}


def test_tensorboard_compares_the_models_of_a_run_with_their_settings(tmp_path: Path) -> None:
    """Test metrics were curves of one point, one for each model, beside the models' folders."""
    budget = replace(BUDGET, epochs=1, eval_users=5, baselines=["none", "popularity"])
    few = replace(DATA, num_users=16)
    config = tiny_config(tmp_path / "run", data=few, budget=budget, clip_norm=0.5)
    metrics = train_run(config)
    groups = session_groups(tmp_path / "run" / "tensorboard")
    assert sorted(groups) == ["causal", "none", "popularity"]
    for name, group in groups.items():
        settings = group.hparams
        assert settings["model.history"].string_value == name
        assert settings["clip_norm"].number_value == 0.5
        assert settings["budget.epochs"].number_value == 1
        assert settings["model.top_mlp"].string_value == "[16, 1]"
        assert settings["data"].string_value == "synthetic"
        assert not {*FREE_KEYS, "ema_decay"} & {*settings}
        found = {one.name.tag: one.value for one in group.metric_values}
        assert found == pytest.approx(
            {
                f"test/{tag.replace('@', '_at_')}": value
                for tag, value in metrics[name].items()
                if isinstance(value, float)
            }
        )
    folders = [path for path in (tmp_path / "run" / "tensorboard").rglob("*") if path.is_dir()]
    assert sorted(path.name for path in folders) == sorted(groups)
    found = points(tmp_path / "run" / "tensorboard" / "none")
    assert found["test/AUC"][0][0] == len(found["train/loss"])


def test_a_run_is_reproducible_and_its_seed_matters(finished: Path, tmp_path: Path) -> None:
    train_run(tiny_config(tmp_path / "again"))
    assert_same_run(tmp_path / "again", finished)
    train_run(tiny_config(tmp_path / "other", seed=1))
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert other != json.loads((finished / "metrics.json").read_text())


def test_how_often_checkpoints_are_written_does_not_matter(finished: Path, tmp_path: Path) -> None:
    metrics = train_run(tiny_config(tmp_path / "run", checkpoint_seconds=0.0))
    assert metrics == json.loads((finished / "metrics.json").read_text())["test"]


def test_a_baseline_does_not_change_the_model(finished: Path, tmp_path: Path) -> None:
    budget = replace(BUDGET, baselines=["none", "popularity"])
    metrics = train_run(tiny_config(tmp_path / "run", budget=budget))
    assert list(metrics) == ["causal", "none", "popularity"]
    assert {tuple(values) for values in metrics.values()} == {(*METRIC_NAMES, "undefined")}
    assert {tuple(values["undefined"]) for values in metrics.values()} == {(TRIVIAL,)}
    alone = json.loads((finished / "metrics.json").read_text())
    assert metrics["causal"] == alone["test"]["causal"]


def test_the_trained_model_is_loaded_without_its_data(finished: Path) -> None:
    model, schema = load_trained(finished)
    shards = load_data(tiny_config(finished))
    assert schema.to_json() == shards.schema.to_json()
    assert not model.training
    for name, tensor in checkpoint(finished)["model"].items():
        assert torch.equal(model.state_dict()[name.removeprefix("model.")], tensor)


def test_the_schema_survives_being_written(finished: Path) -> None:
    schema = load_data(tiny_config(finished)).schema
    assert load_schema(finished).to_json() == schema.to_json()


def test_weights_do_not_fit_another_model(finished: Path) -> None:
    _, schema = load_trained(finished)
    wider = new_model(schema, replace(MODEL, dim=32), "causal", 0)
    with pytest.raises(TrainingError, match="does not fit the model: "):
        load_weights(DLRMTrain(wider), result_of(finished / "causal"))


def test_a_step_changes_the_table_rows_of_its_batch_alone(tmp_path: Path) -> None:
    """AdamW wrote every row of every table at each step: 1.06 s with a million items."""
    with joined_ranks(torch.device("cpu")) as ranks:
        check_changed_rows(tmp_path, ranks)


def check_changed_rows(tmp_path: Path, ranks: Ranks) -> None:
    shards = load_data(tiny_config(tmp_path))
    model = new_model(shards.schema, MODEL, "causal", 0)
    settings = loop.TrainSettings(
        epochs=1,
        learning_rate=1e-2,
        tables=TableSettings(ADAGRAD, learning_rate=1e-2),
        weight_decay=0.0,
        batch_targets=8,
        negatives=2,
        seed=0,
        checkpoint_seconds=1e9,
    )
    trainer = loop.Trainer(model, shards, settings, tmp_path, ranks)
    batches = trainer.stream.epoch(0)
    trainer.step(trainer.stream.batch(batches.chosen[0], 0, 0))
    before = {k: v.clone() for k, v in local_weights(trainer.sharded.state_dict()).items()}
    batch = trainer.stream.batch(batches.chosen[1], 0, 0)
    trainer.step(batch)
    features = batch.sparse_features
    keys = ["candidates.item_id", f"{HISTORY}.item_id"]
    met_by_table = {
        "candidate_bags.embedding_bags.bag_item_id.weight": keys[:1],
        "token_embeddings.embeddings.token_item_id.weight": keys,
        "user_bags.embedding_bags.bag_user_id.weight": ["user_id"],
    }
    for suffix, met_keys in met_by_table.items():
        name = next(name for name in before if name.removesuffix("[0]").endswith(suffix))
        after = local_weights(trainer.sharded.state_dict())[name]
        changed = (before[name] != after).any(1).nonzero().flatten()
        met = torch.cat([features[key].values() for key in met_keys]).unique()
        assert 0 < len(changed) < len(before[name])
        assert np.isin(changed, met).all()


def test_learning_rates_end_at_zero(tmp_path: Path) -> None:
    """They rose again at the end if later epochs had more batches than the first."""
    shards = load_data(tiny_config(tmp_path))
    model = new_model(shards.schema, MODEL, "causal", 0)
    with joined_ranks(torch.device("cpu")) as ranks:
        folders = tmp_path / "run", tmp_path / "tensorboard"
        trainer = loop.train(model, shards, settings_of(tiny_config(tmp_path)), *folders, ranks)
    assert trainer.progress.step == trainer.num_steps
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(rates) > 1
    # Of the last of 69 steps: 3e-3 for dense parameters and 2e-2 for tables at the first one.
    assert all(0.0 < rate < 2e-5 for rate in rates)


# --- a run that was stopped


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop a run in the middle of its ``at``-th checkpoint, with half of a file written."""
    num_saves = 0

    def save(state: dict[str, Any], checkpoint_id: Path) -> None:
        nonlocal num_saves
        num_saves += 1
        real_save(state, checkpoint_id=checkpoint_id)
        if num_saves == at:
            path = next(checkpoint_id.glob("*.distcp"))
            written = path.read_bytes()
            path.write_bytes(written[: len(written) // 2])
            raise KeyboardInterrupt

    real_save = checkpoints.dcp.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.dcp, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train_run(config)


def torn(folder: Path) -> list[Path]:
    """Return checkpoints that were not written to their end."""
    return list((folder / "causal").glob(".*.new"))


def test_a_checkpoint_is_never_torn(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", checkpoint_seconds=0.0)
    # In the first epoch; at its end, after its validation; in the second epoch.
    for at in (8, 16, 10):
        interrupted(config, monkeypatch, at)
        assert len(torn(tmp_path / "run")) == 1
        checkpoint(tmp_path / "run")
        assert not (tmp_path / "run" / "metrics.json").exists()
    train_run(config)
    assert_same_run(tmp_path / "run", finished)
    assert torn(tmp_path / "run") == []


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", checkpoint_seconds=0.0)
    interrupted(config, monkeypatch, 1)
    assert checkpoints_of(tmp_path / "run" / "causal") == []
    train_run(config)
    assert_same_run(tmp_path / "run", finished)


def files_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Return content and modification time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_returns_its_metrics_and_is_never_overwritten(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was evaluated again, and its schema, config and metrics were rewritten."""
    before = files_of(finished)
    with caplog.at_level(logging.INFO):
        metrics = train_run(tiny_config(finished))
    assert metrics == json.loads((finished / "metrics.json").read_text())["test"]
    assert "is finished: nothing is trained or written" in caplog.text
    assert files_of(finished) == before


RUN_CONFIG = """
import json, os, signal, sys
import torch
from torchrec_kvshare.config import Budget, EvaluationConfig, ModelConfig, SyntheticData
from torchrec_kvshare.config import TrainConfig
from torchrec_kvshare.training.run import train_run
values = json.loads(sys.argv[1])
kinds = {"data": SyntheticData, "model": ModelConfig, "budget": Budget}
kinds["evaluation"] = EvaluationConfig
torch.set_num_threads(1)
"""
TRAIN = """
train_run(TrainConfig(**{k: kinds[k](**v) if k in kinds else v for k, v in values.items()}))
"""


def num_steps_of(folder: Path) -> int:
    """Return the step of the last checkpoint, 0 if there is none."""
    return max((int(path.name) for path in checkpoints_of(folder)), default=0)


def killed_in_process(config: TrainConfig, patch: str) -> int:
    """Run a config in a process that a patch kills; return its exit status."""
    process = fresh_process(
        RUN_CONFIG + patch + TRAIN, json.dumps(asdict(config)), OMP_NUM_THREADS="1"
    )
    process.communicate()
    return process.returncode


@pytest.fixture
def killed(tmp_path: Path) -> TrainConfig:
    """A run whose process was killed by SIGKILL after some twenty batches."""
    config = tiny_config(tmp_path / "run", checkpoint_seconds=0.0)
    process = fresh_process(RUN_CONFIG + TRAIN, json.dumps(asdict(config)))
    folder = tmp_path / "run" / "causal"
    while process.poll() is None and num_steps_of(folder) < 20:
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return config


def test_a_killed_run_resumes_to_the_same_result(
    finished: Path, killed: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(killed.output)
    done = checkpoint(folder)["progress"]
    assert not (folder / "metrics.json").exists()
    assert done["epoch"] < BUDGET.epochs
    num_steps = 0
    real_step = loop.Trainer.step

    def step(self: loop.Trainer, batch: Any, **given: Any) -> float:
        nonlocal num_steps
        num_steps += 1
        return real_step(self, batch, **given)

    monkeypatch.setattr(loop.Trainer, "step", step)
    train_run(killed)
    total = len(scalars(finished / "tensorboard" / "causal")["train/loss"])
    assert num_steps == total - done["step"]
    assert_same_run(folder, finished)


def test_every_batch_and_every_epoch_is_one_point(finished: Path) -> None:
    """Epochs differ by a batch, but steps were counted as if they did not: some came twice.

    Validations had a step count of their own, so that a killed run dropped none or all of them.
    """
    found = points(finished / "tensorboard" / "causal")
    steps = [step for step, _ in found["train/loss"]]
    assert steps == list(range(checkpoint(finished)["progress"]["step"]))
    for name in ("NE", "AUC", "GAUC"):
        assert len({step for step, _ in found[f"valid/{name}"]}) == BUDGET.epochs
        assert found[f"valid/{name}"][-1][0] == steps[-1]


@pytest.mark.parametrize("at", ["before the checkpoint", "after the checkpoint"])
def test_a_run_killed_at_a_validation_neither_repeats_nor_loses_it(
    finished: Path, tmp_path: Path, at: str
) -> None:
    """The checkpoint was written before the validation: a run killed in between never had it."""
    config = tiny_config(tmp_path / "run")
    died_of = killed_in_process(
        config,
        f"""
from torchrec_kvshare.training.loop import Trainer
real_save = Trainer._save
def save(self, writer):
    if self.progress.epoch == 2 and {at == "before the checkpoint"}:
        writer.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real_save(self, writer)
    if self.progress.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save = save
""",
    )
    assert died_of == -signal.SIGKILL
    expected_epoch = 1 if at == "before the checkpoint" else 2
    assert checkpoint(tmp_path / "run")["progress"]["epoch"] == expected_epoch
    train_run(config)
    assert curves(tmp_path / "run") == curves(finished)


def test_a_run_killed_during_its_test_logs_its_test_metrics_once(
    finished: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run")
    died_of = killed_in_process(
        config,
        """
from torchrec_kvshare.training import run
real_write = run._write
def write(path, text):
    if path.name == "metrics.json":
        os.kill(os.getpid(), signal.SIGKILL)
    real_write(path, text)
run._write = write
""",
    )
    assert died_of == -signal.SIGKILL
    assert not (tmp_path / "run" / "metrics.json").exists()
    train_run(config)
    assert_same_run(tmp_path / "run", finished)


# --- a run with all options


ROBUST = {
    "data": replace(DATA, num_users=16),
    "budget": replace(BUDGET, epochs=4, eval_users=5),
    # Rates so high that GAUC is best after the first epoch; with states it still rises.
    "learning_rate": 3e-2,
    "table_learning_rate": 0.4,
    "model": replace(MODEL, user_state=False),
    "warmup_steps": 3,
    "clip_norm": 0.5,
    "table_clip": 1e-2,
    "precision": "bfloat16",
    "ema_decay": 0.9,
    "keep_best": "GAUC",
    "patience": 2,
}


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all options that stopped before its last epoch."""
    folder = tmp_path_factory.mktemp("robust") / "run"
    train_run(tiny_config(folder, **ROBUST))
    return folder


def test_training_stops_when_its_patience_is_over_and_keeps_the_best_epoch(robust: Path) -> None:
    shown = points(robust / "tensorboard" / "causal")
    assert {f"valid/{name}" for name in ("AUC", "GAUC", "NE")} <= set(shown)
    watched = shown["valid/GAUC"]
    assert len(watched) == 3 < ROBUST["budget"].epochs
    # 0.638, 0.621 and 0.608.
    assert watched[0][1] > max(value for _, value in watched[1:])
    first, last = watched[0][0] + 1, watched[-1][0] + 1
    assert [int(path.name) for path in checkpoints_of(robust / "causal")] == [first, last]
    best = checkpoint(robust)["progress"]["best"]
    assert (best["epoch"], best["step"]) == (0, first)
    assert best["value"] == pytest.approx(watched[0][1], rel=1e-6)  # TensorBoard has float32.


def test_the_best_epoch_is_tested_and_exported(robust: Path) -> None:
    model, _ = load_trained(robust)
    shards = load_data(tiny_config(robust, **ROBUST))
    tested = json.loads((robust / "metrics.json").read_text())["test"]["causal"]
    assert evaluate_sampled(model_scorer(model), shards, TEST, 7).items() <= tested.items()
    found = evaluate_sampled(model_scorer(model), shards, VALID, 7)["GAUC"]
    assert found == checkpoint(robust)["progress"]["best"]["value"]


def test_the_epoch_that_ranks_best_is_kept(tmp_path: Path) -> None:
    changes = {"keep_best": "NDCG@10", "learning_rate": 3e-2, "table_learning_rate": 0.4}
    config = tiny_config(tmp_path, budget=replace(BUDGET, epochs=3, eval_users=None), **changes)
    train_run(config)
    watched = [value for _, value in points(tmp_path / "tensorboard" / "causal")["valid/NDCG@10"]]
    best = checkpoint(tmp_path)["progress"]["best"]
    assert best["epoch"] == watched.index(max(watched)) < len(watched) == 3
    model, _ = load_trained(tmp_path)
    shards, settings = load_data(config), RankingSettings()
    ranked = rank_held_out(model_scorer(model), shards, settings, split=VALID)
    found = rank_metrics(ranked.position.tolist(), ranked.num_items).values
    assert found["NDCG@10"] == pytest.approx(best["value"], rel=1e-6)


def test_a_run_with_all_options_resumes_to_the_same_result(
    robust: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", checkpoint_seconds=0.0, **ROBUST)
    # In the warm-up; after the best epoch; in the last checkpoint of all.
    for at in (2, 11, 19):
        interrupted(config, monkeypatch, at)
    train_run(config)
    assert_same_run(tmp_path / "run", robust)
    assert set(checkpoint(robust)) == {"progress", "model", "optimizer", "raw"}
    assert [path.name for path in checkpoints_of(tmp_path / "run" / "causal")] == [
        path.name for path in checkpoints_of(robust / "causal")
    ]


def test_a_run_killed_after_it_stopped_early_trains_no_more(
    robust: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far a run came is in its checkpoint, but that it had stopped is not."""
    run = Path(shutil.copytree(robust, tmp_path / "run"))
    (run / "metrics.json").unlink()
    monkeypatch.setattr(loop.Trainer, "step", None)
    train_run(tiny_config(run, **ROBUST))
    assert_same_run(run, robust)


# --- a run that diverges


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    """``learning_rate=1e6`` ended with exit status 0 and an NE of NaN."""
    config = tiny_config(tmp_path / "run", learning_rate=1e30, table_learning_rate=1e30)
    with pytest.raises(TrainingError) as error:
        train_run(config)
    assert re.match(
        r"causal, epoch 1, batch \d+: .*; learning_rate is [\d.e+]+ there, table_learning_rate "
        rf"[\d.e+]+\. Last finite checkpoint, kept in {tmp_path}/run/causal: (none|epoch 1, batch)",
        str(error.value),
    )
    assert not (tmp_path / "run" / "metrics.json").exists()
    if checkpoints_of(tmp_path / "run" / "causal"):
        assert non_finite(checkpoint(tmp_path / "run")["model"]) == ""


def test_the_checkpoint_before_a_weight_that_is_not_finite_stays(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint with NaN weights was written."""
    real_step = loop.Trainer.step

    def step(self: loop.Trainer, batch: Any, **given: Any) -> float:
        loss = real_step(self, batch, **given)
        if self.progress.step == 9:
            with torch.no_grad():
                next(self.ranker.over_arch.parameters()).fill_(math.nan)
        return loss

    config = tiny_config(tmp_path / "run", checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step)
        with pytest.raises(TrainingError, match=r"batch 11: .* values of model\.over_arch\."):
            train_run(config)
    kept = checkpoint(tmp_path / "run")
    assert kept["progress"] == {"epoch": 0, "batch": 9, "step": 9, "best": None}
    assert non_finite(kept["model"]) == ""
    losses = scalars(tmp_path / "run" / "tensorboard" / "causal")["train/loss"]
    assert all(math.isfinite(loss) for loss in losses)
    # Without the broken step the run resumes to the same result.
    train_run(config)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    finished: Path, tmp_path: Path, value: float
) -> None:
    """A NaN row passed export and ended scoring."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    state = checkpoint(run)
    name = next(name for name in state["model"] if name.endswith("item_id.weight"))
    state["model"][name][3, 1] = value
    found = checkpoints_of(run / "causal")[-1]
    progress = (found / PROGRESS).read_text()
    shutil.rmtree(found)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"model": state["model"]}, checkpoint_id=found, no_dist=True)
    (found / PROGRESS).write_text(progress)
    count = state["model"][name].numel()
    with pytest.raises(TrainingError, match=rf"1 of the {count} values of {re.escape(name)} are"):
        load_trained(run)


def test_scores_that_are_not_finite_are_no_metrics(tmp_path: Path) -> None:
    """AUCs and hit rates were NaN, or 1."""
    shards = load_data(tiny_config(tmp_path))
    model = new_model(shards.schema, MODEL, "causal", 0)
    with torch.no_grad():
        next(model.over_arch.parameters()).fill_(math.nan)
    for evaluation in (
        partial(evaluate_sampled, model_scorer(model), shards, TEST, 2),
        partial(rank_held_out, model_scorer(model), shards, RankingSettings(max_users=3)),
    ):
        with pytest.raises(TrainingError, match="scores that are not finite: it has diverged"):
            evaluation()


# --- a run and its data

COLUMNS = "user_id,item_id,time,kind,price"


def rows_of_a_log() -> list[str]:
    """Seven users of some twenty events, some at one time; items 1 to 12."""
    chance = random.Random(3)
    rows = []
    for user in range(7):
        for index in range(18 + user):
            item = chance.randint(1, 12)
            rows.append(f"{user},{item},{1000 + index // 2},k{item % 3},{item}.5")
    chance.shuffle(rows)
    return rows


def log_config(folder: Path, output: Path, rows: list[str]) -> TrainConfig:
    """Write a CSV file of rows into a folder; return the config of a run on it."""
    path = folder / "log.csv"
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    columns = Columns(item_attributes=["kind"], item_floats=["price"])
    budget = replace(BUDGET, epochs=1)
    return tiny_config(
        output, data=InteractionsData(path=str(path), columns=columns), budget=budget
    )


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run on a CSV log."""
    folder = tmp_path_factory.mktemp("logged")
    config = log_config(folder, folder / "run", rows_of_a_log())
    train_run(config)
    return config


def test_rows_in_another_order_are_the_same_run(logged: TrainConfig, tmp_path: Path) -> None:
    """The AUC fell from .82 to .49 when a log's rows were sorted: ids got other table rows."""
    expected = Path(logged.output)
    again = log_config(tmp_path, tmp_path / "run", sorted(rows_of_a_log()))
    train_run(again)
    assert (tmp_path / "run" / "schema.json").read_bytes() == (
        expected / "schema.json"
    ).read_bytes()
    assert_same_run(tmp_path / "run", expected)


def test_a_finished_run_takes_its_rows_in_another_order(logged: TrainConfig) -> None:
    run = Path(logged.output)
    before = files_of(run)
    metrics = train_run(log_config(run.parent, run, sorted(rows_of_a_log())))
    assert metrics == json.loads((run / "metrics.json").read_text())["test"]
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda rows: [*rows, "new,3,1000,k0,3.5"], "1 user more, 1 event more, "),
        (lambda rows: rows[:-4], "4 events fewer, 4 positive events fewer, other events"),
        (lambda rows: [row.replace(",k1,", ",k9,") for row in rows], "other kind of items, other"),
        (lambda rows: [row.replace("11.5", "11.6") for row in rows], "other price of items; "),
    ],
)
def test_other_data_is_refused_by_name_before_anything_is_written(
    logged: TrainConfig, changed: Callable[[list[str]], list[str]], message: str
) -> None:
    """One new user overwrote the schema of a finished run, which then could not be exported."""
    run = Path(logged.output)
    before = files_of(run)
    config = log_config(run.parent, run, changed(rows_of_a_log()))
    with pytest.raises(DataError, match=f"the data of the run in {run} has changed: {message}"):
        train_run(config)
    assert files_of(run) == before
    load_trained(run)


def test_other_data_is_refused_by_a_run_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = log_config(tmp_path, tmp_path / "run", rows_of_a_log())
    interrupted(replace(config, checkpoint_seconds=0.0), monkeypatch, 2)
    before = files_of(tmp_path / "run")
    fewer = log_config(tmp_path, tmp_path / "run", rows_of_a_log()[1:])
    with pytest.raises(DataError, match="has changed: 1 event fewer"):
        train_run(replace(fewer, checkpoint_seconds=0.0))
    assert files_of(tmp_path / "run") == before


def test_a_catalogue_of_one_item_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows = [f"u,7,{1000 + index},k0,1.5" for index in range(9)]
    config = log_config(tmp_path, tmp_path / "run", rows)
    with pytest.raises(DataError, match="one item in the training split, 7; negatives need anoth"):
        train_run(config)
    assert not (tmp_path / "run").exists()


def test_a_log_without_positive_events_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """Its NE was 4e11, with exit status 0."""
    config = log_config(tmp_path, tmp_path / "run", rows_of_a_log())
    config.data.label = "price>=100"
    with pytest.raises(DataError, match="positive"):
        train_run(config)
    assert not (tmp_path / "run").exists()


def test_a_smoke_run_takes_users_that_can_be_tested(tmp_path: Path) -> None:
    """A log whose first sixty users had one event each had nothing to test on."""
    tail = [f"-{user},{user % 12 + 1},999,k0,1.5" for user in range(1, 80)]
    config = log_config(tmp_path, tmp_path / "run", [*tail, *rows_of_a_log()])
    dataset = one_shard(replace(config, budget=replace(BUDGET, max_users=5)))
    assert dataset.log.users.ids == ["0", "1", "2", "3", "4"]
    assert len(np.unique(dataset.event_user[dataset.split == TEST])) == 5


def test_the_log_says_how_the_data_was_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(1)
    rows = [f"u,{1 + i % 4},{1000 + min(i, 2)},k0,1.5" for i in range(40)]
    chance.shuffle(rows)
    rows += ["vv,77,5000,k0,1.5"]
    with caplog.at_level(logging.INFO):
        load_data(log_config(tmp_path, tmp_path / "run", rows))
    assert (
        "training split 2 events of 2 users, validation split 1 events of 1 users, test split 38 "
        "events of 1 users" in caplog.text
    )
    assert (
        "38 of 41 events of the log are at one moment, 1970-01-01T00:16:42Z: 38 in the test split"
        in caplog.text
    )
    # Of the four items of the test split training met only the first, in 9 of 38 events.
    assert "user_id 0.0%, item_id 76.3%, items.kind 0.0%" in caplog.text
    assert "92.7% of the events tie with another one" in caplog.text
    assert "% of the test split's sampled negatives are positives of their user" in caplog.text


# --- one folder, one run


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 7}, "seed"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"negatives": 3}, "negatives"),
        ({"model": replace(MODEL, block=4)}, "model"),
        ({"data": replace(DATA, seed=1)}, "data"),
        ({"budget": replace(BUDGET, epochs=9)}, "budget"),
    ],
)
def test_another_config_in_the_same_folder_is_refused_by_key(
    finished: Path, changes: dict[str, Any], key: str
) -> None:
    before = files_of(finished)
    with pytest.raises(ConfigError, match=rf"run of another config; these differ: \['{key}"):
        train_run(tiny_config(finished, **changes))
    assert files_of(finished) == before


def test_threads_do_not_make_it_another_run(finished: Path) -> None:
    train_run(tiny_config(finished, threads=None))


def test_an_unknown_encoder_is_refused(tmp_path: Path) -> None:
    model = replace(MODEL, history="lstm")
    with pytest.raises(
        ConfigError, match=r"model.history is 'lstm'; one of \('causal', .*'longer', 'none'\)"
    ):
        train_run(tiny_config(tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


def test_users_too_short_to_test_on_are_refused(tmp_path: Path) -> None:
    data = replace(DATA, events_per_user=1, num_users=2)
    with pytest.raises(DataError, match="synthetic has no event in the test split"):
        train_run(tiny_config(tmp_path / "run", data=data))


def test_fewer_users_are_the_first_of_those_that_can_be_tested(tmp_path: Path) -> None:
    whole = one_shard(tiny_config(tmp_path))
    some = one_shard(tiny_config(tmp_path, budget=replace(BUDGET, max_users=7)))
    kept = slice(0, int(whole.user_offsets[7]))
    assert some.log.users.ids == [str(user) for user in range(7)]
    assert some.time.tolist() == whole.time[kept].tolist()
    assert some.split.tolist() == whole.split[kept].tolist()
    assert len(some.known_items) < len(whole.known_items)


def test_an_unfinished_run_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no finished run: it has no metrics\.json"):
        load_trained(tmp_path)
