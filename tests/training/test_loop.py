"""Training: it learns, it says how it goes, and a stopped run ends as if it had not been."""

import json
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.core.worlds import fresh_process
from tests.training.worlds import BUDGET, DATA, MODEL, tiny_config
from torchrec_kvshare.config import TrainConfig
from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.training import loop
from torchrec_kvshare.training.loop import CHECKPOINT, load_weights
from torchrec_kvshare.training.run import load_dataset, load_trained, new_model, train_run

METRIC_NAMES = ("AUC", "GAUC", "NE", "HR@10", "NDCG@10")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_run(tiny_config(folder))
    return folder


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def checkpoint(folder: Path, kind: str = "causal") -> dict[str, Any]:
    return torch.load(folder / kind / CHECKPOINT, weights_only=True)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Bit by bit: metrics, weights, and what the optimiser remembers."""
    assert (folder / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    found, wanted = checkpoint(folder), checkpoint(expected)
    assert found["progress"] == wanted["progress"]
    assert list(found["model"]) == list(wanted["model"])
    for name, tensor in wanted["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    for place, state in wanted["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(found["optimizer"]["state"][place][name], value)


# --- learning


def test_training_lowers_the_loss(finished: Path) -> None:
    losses = scalars(finished / "tensorboard" / "causal")["train/loss"]
    # From 0.63 to 0.39; the share of positives alone, one in eight, makes 0.377.
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:3]) / 3


def test_tensorboard_has_loss_speed_and_quality(finished: Path) -> None:
    found = scalars(finished / "tensorboard" / "causal")
    assert set(found) == {
        *("train/loss", "train/examples_per_s"),
        *("valid/NE", "valid/AUC", "valid/GAUC"),
    }
    assert all(speed > 0 for speed in found["train/examples_per_s"])
    assert len(found["train/loss"]) == len(found["train/examples_per_s"]) > 60
    assert {len(found[f"valid/{name}"]) for name in ("NE", "AUC", "GAUC")} == {BUDGET.epochs}
    tests = scalars(finished / "tensorboard")
    assert set(tests) == {f"test_{name.replace('@', '_at_')}/causal" for name in METRIC_NAMES}


def test_a_run_is_reproducible_and_its_seed_matters(finished: Path, tmp_path: Path) -> None:
    train_run(tiny_config(tmp_path / "again"))
    assert_same_run(tmp_path / "again", finished)
    train_run(tiny_config(tmp_path / "other", seed=1))
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert other != json.loads((finished / "metrics.json").read_text())


def test_how_often_checkpoints_are_written_does_not_matter(finished: Path, tmp_path: Path) -> None:
    metrics = train_run(tiny_config(tmp_path / "run", checkpoint_seconds=1e9))
    assert {"test": metrics} == json.loads((finished / "metrics.json").read_text())


def test_a_baseline_does_not_change_the_model(finished: Path, tmp_path: Path) -> None:
    budget = replace(BUDGET, baselines=True)
    metrics = train_run(tiny_config(tmp_path / "run", budget=budget))
    assert list(metrics) == ["causal", "none", "popularity"]
    assert {tuple(values) for values in metrics.values()} == {METRIC_NAMES}
    alone = json.loads((finished / "metrics.json").read_text())
    assert metrics["causal"] == alone["test"]["causal"]


def test_the_trained_model_is_loaded_without_its_data(finished: Path) -> None:
    model, schema = load_trained(finished)
    dataset = load_dataset(tiny_config(finished))
    assert schema.to_json() == dataset.schema.to_json()
    assert not model.training
    for name, tensor in checkpoint(finished)["model"].items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_schema_survives_being_written(finished: Path) -> None:
    written = json.loads((finished / "schema.json").read_text())
    assert FeatureSchema.from_json(written).to_json() == written


def test_weights_do_not_fit_another_model(finished: Path) -> None:
    _, schema = load_trained(finished)
    wider = new_model(schema, replace(MODEL, dim=32), "causal", 0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(wider, finished / "causal")


# --- a run that was stopped


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop a run in the middle of writing its checkpoint, with half of it on the disk."""
    num_saves = 0

    def save(state: dict[str, Any], path: Path) -> None:
        nonlocal num_saves
        num_saves += 1
        real_save(state, path)
        if num_saves == at:
            written = path.read_bytes()
            path.write_bytes(written[: len(written) // 2])
            raise KeyboardInterrupt

    real_save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(loop.torch, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train_run(config)


def test_a_checkpoint_is_never_torn(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    # In the first epoch; at its end, after batch 23; in the second epoch.
    for at in (8, 16, 10):
        interrupted(config, monkeypatch, at)
        assert (tmp_path / "run" / "causal" / f"{CHECKPOINT}.new").exists()
        checkpoint(tmp_path / "run")
        assert not (tmp_path / "run" / "metrics.json").exists()
    train_run(config)
    assert_same_run(tmp_path / "run", finished)
    assert not (tmp_path / "run" / "causal" / f"{CHECKPOINT}.new").exists()


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    interrupted(config, monkeypatch, 1)
    assert not (tmp_path / "run" / "causal" / CHECKPOINT).exists()
    train_run(config)
    assert_same_run(tmp_path / "run", finished)


def test_a_finished_run_is_only_measured_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint(finished), (finished / "metrics.json").read_bytes()
    monkeypatch.setattr(loop._Trainer, "_step", None)
    train_run(tiny_config(finished))
    assert (finished / "metrics.json").read_bytes() == before[1]
    assert checkpoint(finished)["progress"] == before[0]["progress"]


@pytest.fixture
def killed(tmp_path: Path) -> TrainConfig:
    """A run in a process of its own that died of SIGKILL after some twenty batches."""
    config = tiny_config(tmp_path / "run")
    program = """
import json, sys
import torch
from torchrec_kvshare.config import Budget, ModelConfig, SyntheticData, TrainConfig
from torchrec_kvshare.training.run import train_run
values = json.loads(sys.argv[1])
kinds = {"data": SyntheticData, "model": ModelConfig, "budget": Budget}
torch.set_num_threads(1)
train_run(TrainConfig(**{k: kinds[k](**v) if k in kinds else v for k, v in values.items()}))
"""
    process = fresh_process(program, json.dumps(asdict(config)), OMP_NUM_THREADS="1")
    path = tmp_path / "run" / "causal" / CHECKPOINT
    while process.poll() is None and (
        not path.exists() or checkpoint(tmp_path / "run")["progress"]["batch"] < 20
    ):
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return config


def test_a_killed_run_ends_as_if_it_had_not_been(
    finished: Path, killed: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(killed.output)
    done = checkpoint(folder)["progress"]
    assert not (folder / "metrics.json").exists()
    assert done["epoch"] < BUDGET.epochs
    num_steps = 0
    real_step = loop._Trainer._step

    def step(self: loop._Trainer, batch: Any) -> float:
        nonlocal num_steps
        num_steps += 1
        return real_step(self, batch)

    monkeypatch.setattr(loop._Trainer, "_step", step)
    train_run(killed)
    total = len(scalars(finished / "tensorboard" / "causal")["train/loss"])
    batches = total // BUDGET.epochs
    assert num_steps == total - done["epoch"] * batches - done["batch"]
    assert_same_run(folder, finished)


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
    files = [path for path in finished.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(ConfigError, match=rf"run of another config; these differ: \['{key}"):
        train_run(tiny_config(finished, **changes))
    assert {path: path.read_bytes() for path in files} == before


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


def test_fewer_users_are_the_first_ones(tmp_path: Path) -> None:
    whole = load_dataset(tiny_config(tmp_path))
    some = load_dataset(tiny_config(tmp_path, budget=replace(BUDGET, max_users=7)))
    kept = slice(0, int(whole.user_offsets[7]))
    assert some.time.tolist() == whole.time[kept].tolist()
    assert some.item.tolist() == whole.item[kept].tolist()
    assert some.split.tolist() == whole.split[kept].tolist()
    assert len(some.known_items) < len(whole.known_items)


def test_an_unfinished_run_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no finished run: it has no metrics\.json"):
        load_trained(tmp_path)
