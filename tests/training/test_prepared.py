"""A run on a prepared log is the run on the same log in memory, and is as resumable."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.datasets.utils import Batch

from tests.data.folders import write_folder
from tests.data.logs import Event, all_events, log_of
from tests.training.on_ranks import points
from tests.training.worlds import BUDGET, DATA, MODEL, tiny_config
from tests.worlds import make_dlrm
from torchrec_kvshare.config import PreparedData, TrainConfig
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.shards import Shards, in_memory, open_prepared
from torchrec_kvshare.data.splits import TEST, VALID
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.schema import ITEM, candidate_key
from torchrec_kvshare.training import loop
from torchrec_kvshare.training.checkpoints import checkpoints_of, load_progress
from torchrec_kvshare.training.evaluate import (
    Scorer,
    evaluate_sampled,
    model_scorer,
    popularity_scorer,
)
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out
from torchrec_kvshare.training.ranks import device_of
from torchrec_kvshare.training.run import (
    histories_of,
    load_data,
    load_trained,
    provenance_of,
    train_run,
)

# Targets are scored in batches of a shard: two float32 paths, as ``tests.worlds.PATH_TOLERANCE``.
# AUC and NE of the same scores but for rounding; worst found: 0.0 and 3e-8.
METRIC_TOLERANCE = 1e-6


def world() -> InteractionLog:
    return load_log(DATA)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The world of ``tiny_config`` in folders of one, three and four shards."""
    base = tmp_path_factory.mktemp("folders")
    return {number: write_folder(world(), base / f"{number}", number) for number in (1, 3, 4)}


def prepared_config(folder: Path, output: Path, **changes: Any) -> TrainConfig:
    """A run of one epoch on a prepared folder."""
    defaults = {"budget": replace(BUDGET, epochs=1)}
    return tiny_config(output, data=PreparedData(path=str(folder)), **defaults | changes)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point but the speed."""
    found = points(run / "tensorboard" / "causal") | points(run / "tensorboard")
    return {tag: tagged for tag, tagged in found.items() if tag != "train/examples_per_s"}


@pytest.fixture(scope="module")
def finished(
    folders: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path]:
    """A run on three shards that nothing interrupted, in groups of two shards."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = prepared_config(folders[3], output)
    train_run(config)
    return config, output


# --- the same run


def test_one_shard_is_trained_as_the_log_in_memory(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    """Losses, metrics, schema and digest are equal to the bit."""
    budget = replace(BUDGET, epochs=2, baselines=["none", "popularity"], eval_users=9)
    train_run(tiny_config(tmp_path / "memory", budget=budget))
    train_run(prepared_config(folders[1], tmp_path / "prepared", budget=budget, workers=2))
    assert curves(tmp_path / "prepared") == curves(tmp_path / "memory")
    assert len(curves(tmp_path / "memory")["train/loss"]) > 40
    for name in ("metrics.json", "schema.json", "data.json"):
        assert (tmp_path / "prepared" / name).read_bytes() == (
            tmp_path / "memory" / name
        ).read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_run(
    finished: tuple[TrainConfig, Path], tmp_path: Path, workers: int
) -> None:
    config, expected = finished
    train_run(replace(config, output=str(tmp_path / "run"), workers=workers, prefetch=3))
    assert curves(tmp_path / "run") == curves(expected)
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    assert metrics == (expected / "metrics.json").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_in_an_epoch_resumes_to_the_same_batches(
    finished: tuple[TrainConfig, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    config, expected = finished
    config = replace(config, output=str(tmp_path / "run"), checkpoint_seconds=0.0)
    real_step = loop.Trainer.step

    def step(self: loop.Trainer, batch: Batch, **given: Any) -> float:
        if self.progress.step == 13:
            raise KeyboardInterrupt
        return real_step(self, batch, **given)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train_run(replace(config, workers=workers))
    done = load_progress(checkpoints_of(tmp_path / "run" / "causal")[-1])
    assert done == {"epoch": 0, "batch": 13, "step": 13, "best": None}
    # Other workers, as on a machine of another size.
    train_run(replace(config, workers=2 - workers))
    assert curves(tmp_path / "run") == curves(expected)
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    assert metrics == (expected / "metrics.json").read_bytes()


def test_losses_of_shards_fall_as_those_of_the_log_in_memory(
    finished: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    """The order of the windows differs, and with it every loss but not what is learned."""
    _, run = finished
    train_run(tiny_config(tmp_path / "run", budget=replace(BUDGET, epochs=1)))
    ours, theirs = (
        [value for _, value in curves(folder)["train/loss"]] for folder in (run, tmp_path / "run")
    )
    assert ours != theirs
    assert sum(ours[-8:]) / 8 == pytest.approx(sum(theirs[-8:]) / 8, abs=0.05)


def test_fewer_users_are_trained_as_in_memory(folders: dict[int, Path], tmp_path: Path) -> None:
    budget = replace(BUDGET, epochs=1, max_users=7)
    train_run(tiny_config(tmp_path / "memory", budget=budget))
    train_run(prepared_config(folders[4], tmp_path / "prepared", budget=budget))
    for name in ("metrics.json", "schema.json", "data.json"):
        assert (tmp_path / "prepared" / name).read_bytes() == (
            tmp_path / "memory" / name
        ).read_bytes()


# --- evaluation


def both(folders: dict[int, Path], number: int) -> tuple[Shards, Shards]:
    """The log in memory, and in a number of shards."""
    config = tiny_config(Path("unused"))
    return load_data(config), open_prepared(folders[number], histories_of(config.model))


def by_item(batch: Batch) -> torch.Tensor:
    """Scores that do not depend on what else is scored."""
    return torch.sin(batch.sparse_features[candidate_key(ITEM)].values().float()).unsqueeze(1)


def positions_of(score: Scorer, shards: Shards, settings: RankingSettings) -> list[int]:
    return rank_held_out(score, shards, settings).position.tolist()


@pytest.mark.parametrize("number", [3, 4])
def test_metrics_do_not_depend_on_the_shards(folders: dict[int, Path], number: int) -> None:
    whole, shards = both(folders, number)
    for split in (VALID, TEST):
        found = evaluate_sampled(by_item, shards, split, 3)
        assert found == evaluate_sampled(by_item, whole, split, 3)
    for settings in (
        *(RankingSettings(max_users=max_users) for max_users in (None, 7, 1000)),
        RankingSettings(num_candidates=20),
        RankingSettings(num_candidates=20, exclude_seen=False),
    ):
        positions = positions_of(by_item, shards, settings)
        assert positions == positions_of(by_item, whole, settings)
        assert 0 < sum(position < 10 for position in positions) < len(positions)
    one, other = popularity_scorer(shards, 3), popularity_scorer(whole, 3)
    assert evaluate_sampled(one, shards, TEST, 3) == evaluate_sampled(other, whole, TEST, 3)


def test_metrics_of_a_model_do_not_depend_on_the_shards(folders: dict[int, Path]) -> None:
    whole, shards = both(folders, 4)
    score = model_scorer(make_dlrm(2, whole.schema))
    found = evaluate_sampled(score, shards, TEST, 3)
    expected = evaluate_sampled(score, whole, TEST, 3)
    assert found == pytest.approx(expected, abs=METRIC_TOLERANCE, rel=0)
    settings = RankingSettings(max_users=11)
    assert positions_of(score, shards, settings) == positions_of(score, whole, settings)


def test_shards_without_targets_are_passed_over(tmp_path: Path) -> None:
    """A user with one event has nothing to validate or test on; here these fill whole shards."""
    rows = [Event("-1", f"{100 + index % 9}", 1000 + index) for index in range(30)]
    rows += [Event(str(user), "101", 1000) for user in range(5)]
    histories = all_events(8, 4)
    whole = in_memory(build_dataset(log_of(rows), histories))
    shards = open_prepared(write_folder(log_of(rows), tmp_path / "folder", 3), histories)
    assert [int((dataset.split == TEST).sum()) for dataset in shards] == [3, 0, 0]
    found = evaluate_sampled(by_item, shards, TEST, 2)
    assert found == evaluate_sampled(by_item, whole, TEST, 2)
    assert found["AUC"] is not None
    everyone = RankingSettings()
    assert positions_of(by_item, shards, everyone) == positions_of(by_item, whole, everyone)


# --- a run and its data


def test_a_run_knows_where_it_comes_from(finished: tuple[TrainConfig, Path]) -> None:
    config, run = finished
    assert provenance_of(run)["data"] == "prepared"
    assert json.loads((run / "config.json").read_text())["data"]["path"] == config.data.path
    model, schema = load_trained(run)
    assert schema.to_json() == load_data(config).schema.to_json()
    assert not model.training


def test_a_finished_run_is_not_trained_again_on_another_machine(
    finished: tuple[TrainConfig, Path],
) -> None:
    config, run = finished
    metrics = train_run(replace(config, workers=3, prefetch=5, device="cpu", threads=None))
    assert metrics == json.loads((run / "metrics.json").read_text())["test"]
    with pytest.raises(ConfigError, match=r"these differ: \['shuffle_shards'\]"):
        train_run(replace(config, shuffle_shards=3))


def test_a_folder_that_was_prepared_from_other_data_is_refused(
    finished: tuple[TrainConfig, Path], folders: dict[int, Path]
) -> None:
    config, run = finished
    kept = folders[3].with_name("kept")
    folders[3].rename(kept)
    try:
        write_folder(load_log(replace(DATA, seed=3)), folders[3], 3)
        with pytest.raises(DataError, match=f"the data of the run in {run} has changed: "):
            train_run(config)
    finally:
        shutil.rmtree(folders[3])
        kept.rename(folders[3])


def test_a_folder_that_was_prepared_with_another_split_is_refused_before_anything_is_written(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    config = prepared_config(folders[3], tmp_path / "run", split="leave_one_out")
    for max_users in (None, 7):
        budget = replace(config.budget, max_users=max_users)
        with pytest.raises(ConfigError, match="was prepared with split=time_share, and split=leav"):
            train_run(replace(config, budget=budget))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_positive_events_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    log = world()
    folder = write_folder(
        replace(log, labels={"": np.zeros_like(log.labels[""])}), tmp_path / "folder", 2
    )
    with pytest.raises(DataError, match="prepared has no positive event in the training split"):
        train_run(prepared_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- the device


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device is cuda, .* finds 0 that torch can use: dev"):
        device_of("cuda")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 2 of this machine finds 2"):
        device_of("auto")


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is cuda"):
        train_run(tiny_config(tmp_path / "run", device="cuda", model=MODEL))
    assert not (tmp_path / "run").exists()
