"""Ranks learn together what one process learns, stop together, and resume after a kill."""

import json
import time
from pathlib import Path

import pytest
import torch

from tests.data.folders import write_folder
from tests.once import shared_folder
from tests.training.on_ranks import (
    LOSS_TOLERANCE,
    PROTOCOL,
    Case,
    find,
    points,
    run_config,
    run_on_ranks,
    torchrun,
)
from tests.training.ranks_program import stage_config, train_bounded, train_with_gaps
from tests.training.worlds import DATA
from torchrec_kvshare.cache.identity import version_of
from torchrec_kvshare.config import LEAVE_ONE_OUT, PreparedData
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.splits import split_rule
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.training.checkpoints import checkpoints_of, load_progress
from torchrec_kvshare.training.ranks import joined_ranks
from torchrec_kvshare.training.run import Metrics, load_data, load_trained, train_run

# Relative to a tensor's largest gradient; rows are summed rank by rank. Worst of the five kinds on
# two and three ranks: 1.9e-6.
GRADIENT_TOLERANCE = 1e-5
# Losses of all 46 steps, where rounding of earlier steps adds up, and NE. Worst: 1.2e-7.
RUN_TOLERANCE = 1e-6
# Two candidates whose logits differ by rounding may change places: one such pair among those of a
# positive and a negative changes the AUC by 5.4e-6.
AUC_TOLERANCE = 2e-5
WORLD_SIZES = (2, 3)


class Together:
    """What so many ranks told, and the folder in which they trained."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size = world_size
        self.ranks = run_on_ranks("ranks_program", folder, *WORLD_SIZES)[world_size]
        self.run = folder / f"{world_size} ranks" / "run"

    def cases(self, **wanted: object) -> list[Case]:
        """The case of each rank that has these values."""
        return [find(cases, **wanted) for cases in self.ranks]


@pytest.fixture(scope="module", params=WORLD_SIZES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(request.param, shared_folder(tmp_path_factory, "together"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_run(run_config(folder))
    return folder


def losses(run: Path, kind: str) -> list[float]:
    steps = points(run / "tensorboard" / kind)["train/loss"]
    assert [step for step, _ in steps] == list(range(len(steps)))
    return [loss for _, loss in steps]


def assert_same_metrics(found: Metrics, expected: Metrics) -> None:
    assert list(found) == list(expected)
    for kind, values in expected.items():
        assert list(found[kind]) == list(values)
        for name, value in values.items():
            tolerance = AUC_TOLERANCE if "AUC" in name else RUN_TOLERANCE
            if isinstance(value, float):
                value = pytest.approx(value, abs=tolerance, rel=0)
            assert found[kind][name] == value, name


# --- what is learned


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_unequal_numbers_of_candidates_have_the_gradients_of_one_process(
    together: Together, kind: str
) -> None:
    """DistributedDataParallel takes the mean over ranks, as if all had as many candidates."""
    cases = together.cases(case="gradients", kind=kind, users=7)
    assert len({case["candidates"] for case in cases}) > 1
    for case in cases:
        assert case["loss"] <= LOSS_TOLERANCE
        assert case["tables"] <= GRADIENT_TOLERANCE
        assert case["dense"] <= GRADIENT_TOLERANCE


def test_ranks_without_windows_do_not_change_the_gradients(together: Together) -> None:
    """Without a batch such a rank left the collectives of the others waiting."""
    first, *others = together.cases(case="gradients", users=1)
    assert first["candidates"] > 0
    assert all(case["candidates"] == 0 for case in others)
    for case in (first, *others):
        assert case["loss"] <= LOSS_TOLERANCE
        assert case["tables"] <= GRADIENT_TOLERANCE
        assert case["dense"] <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("kind", ["causal", "none"])
def test_a_run_on_ranks_has_the_losses_of_one_process(
    together: Together, alone: Path, kind: str
) -> None:
    expected = losses(alone, kind)
    found = losses(together.run, kind)
    assert len(expected) > 40
    assert found == pytest.approx(expected, abs=RUN_TOLERANCE, rel=0)
    # Every rank was without windows in some batches.
    assert all(0 < case["padded"] < case["batches"] for case in together.cases(case="run"))


@pytest.fixture(scope="module")
def alone_on_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on the same six shards."""
    base = tmp_path_factory.mktemp("shards")
    rule = split_rule(LEAVE_ONE_OUT)
    data = PreparedData(path=str(write_folder(load_log(DATA), base / "prepared", 6, rule)))
    train_run(run_config(base / "run", data=data, shuffle_shards=3, **PROTOCOL))
    return base / "run"


def test_a_run_on_shards_has_the_losses_and_metrics_of_one_process(
    together: Together, alone_on_shards: Path
) -> None:
    run = together.run.with_name("prepared run")
    for kind in ("causal", "none"):
        expected = losses(alone_on_shards, kind)
        assert losses(run, kind) == pytest.approx(expected, abs=RUN_TOLERANCE, rel=0)
    metrics, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (run, alone_on_shards)
    )
    assert_same_metrics(metrics["test"], expected["test"])
    assert metrics["data"] == expected["data"]
    assert list(metrics["by_history_length"]) == ["causal", "none", "popularity"]
    for kind, by_bucket in expected["by_history_length"].items():
        assert_same_metrics(metrics["by_history_length"][kind], by_bucket)
    for rank, case in enumerate(together.cases(case="prepared")):
        assert case["held"] == list(range(rank, 6, together.world_size))


def test_a_run_on_ranks_has_the_metrics_of_one_process(together: Together, alone: Path) -> None:
    expected = json.loads((alone / "metrics.json").read_text())["test"]
    written = json.loads((together.run / "metrics.json").read_text())["test"]
    assert list(expected) == ["causal", "none", "popularity"]
    assert_same_metrics(written, expected)
    # The first rank returns what it wrote.
    others = [None] * (together.world_size - 1)
    assert [case["metrics"] for case in together.cases(case="run")] == [written, *others]


def test_validation_on_ranks_is_that_of_one_process(together: Together, alone: Path) -> None:
    expected = points(alone / "tensorboard" / "causal")
    found = points(together.run / "tensorboard" / "causal")
    assert set(found) == set(expected)
    for name in ("valid/AUC", "valid/GAUC", "valid/NE"):
        assert [step for step, _ in found[name]] == [step for step, _ in expected[name]]
        values = [value for _, value in expected[name]]
        tolerance = AUC_TOLERANCE if "AUC" in name else RUN_TOLERANCE
        assert [v for _, v in found[name]] == pytest.approx(values, abs=tolerance, rel=0)


def test_bounded_gradients_averages_and_the_best_epoch_are_those_of_one_process(
    together: Together, tmp_path: Path
) -> None:
    """The norm is that of the ranks' mean gradients, and tables limit what they share."""
    shards = load_data(run_config(tmp_path))
    with joined_ranks(torch.device("cpu")) as ranks:
        expected = train_bounded(shards, tmp_path, ranks)
    for case in together.cases(case="bounded"):
        for name, values in expected.items():
            assert case[name] == pytest.approx(values, abs=RUN_TOLERANCE, rel=0), name


def test_ranks_go_on_with_a_ranking_stage_as_one_process_does_from_the_run_of_ranks(
    together: Together, tmp_path: Path
) -> None:
    train_run(stage_config(together.run, tmp_path / "stage"))
    stage = together.run.with_name("stage")
    expected = losses(tmp_path / "stage", "causal")
    assert losses(stage, "causal") == pytest.approx(expected, abs=RUN_TOLERANCE, rel=0)
    before, after = (load_trained(run) for run in (together.run, stage))
    versions = [version_of(RankingModel(model).eval(), schema) for model, schema in (before, after)]
    assert versions[0].kv == versions[1].kv
    assert versions[0].model != versions[1].model


def test_labels_that_are_missing_for_a_task_are_missed_on_ranks_as_in_one_process(
    together: Together, tmp_path: Path
) -> None:
    """Ranks have unequal numbers of labels: means over these would not be those of one process."""
    shards = load_data(run_config(tmp_path))
    with joined_ranks(torch.device("cpu")) as ranks:
        expected = train_with_gaps(shards, tmp_path, ranks)
    for case in together.cases(case="gaps"):
        assert case["losses"] == pytest.approx(expected["losses"], abs=LOSS_TOLERANCE, rel=0)
        assert case["valid"] == pytest.approx(expected["valid"], abs=AUC_TOLERANCE, rel=0)
        assert set(case["valid"]) > {"AUC/like", "NE/love"}


# --- how ranks end


@pytest.mark.parametrize("padding", [False, True])
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_ranks(
    together: Together, padding: bool
) -> None:
    """The loss of a rank that only padded was left out: its NaN went into all dense weights."""
    for case in together.cases(case="nan in a batch", padding=padding):
        assert "the loss is nan" in case["message"]
        assert "Last finite checkpoint" in case["message"]
        assert case["steps"] == case["broken_step"]
        assert case["changed"] == 0.0


def test_a_weight_that_is_not_finite_on_one_rank_ends_all_ranks(together: Together) -> None:
    """Only the rank that holds the shard sees it, and the others would have waited for it."""
    cases = together.cases(case="nan in a shard")
    assert cases[-1]["has_rows"]
    assert len({case["message"] for case in cases}) == 1
    assert "1 of the" in cases[0]["message"]
    assert "token_item_id.weight[0] are not finite" in cases[0]["message"]


# --- a rank that is killed


class Killed:
    """A run under torchrun whose rank 1 was killed, then started again and killed once more."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        program = ["-m", "tests.training.restarts_program", str(self.run)]
        began = time.monotonic()
        self.first = torchrun("--max-restarts=0", *program, "1", "9")
        self.first_seconds = time.monotonic() - began
        self.first_steps = load_progress(checkpoints_of(self.run / "causal")[-1])["step"]
        self.had_metrics = (self.run / "metrics.json").exists()
        # The first rank, so that the one that writes is killed too, in the second epoch.
        self.second = torchrun("--max-restarts=1", *program, "0", "25")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("killed"))


def test_a_killed_rank_ends_the_job_soon(killed: Killed) -> None:
    assert killed.first.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.first.stderr
    # Two ranks start, train 9 batches and end within some 15 s; gloo alone would wait 30 minutes.
    assert killed.first_seconds < 120
    assert killed.first_steps == 8
    assert not killed.had_metrics


def test_a_restarted_job_resumes_to_the_result_of_an_undisturbed_one(
    killed: Killed, alone: Path
) -> None:
    """AdamW's moments were not resumed: TorchRec's optimizers load only state they already have."""
    assert killed.second.returncode == 0, killed.second.stderr[-4000:]
    assert {path.name for path in killed.run.parent.iterdir()} == {
        "run",
        "killed-1-at-9",
        "killed-0-at-25",
    }
    for kind in ("causal", "none"):
        expected = losses(alone, kind)
        assert losses(killed.run, kind) == pytest.approx(expected, abs=RUN_TOLERANCE, rel=0)
        assert [path.name for path in (killed.run / kind).iterdir()] == [f"{len(expected):010d}"]
    metrics = json.loads((alone / "metrics.json").read_text())["test"]
    found = json.loads((killed.run / "metrics.json").read_text())["test"]
    assert_same_metrics(found, metrics)
