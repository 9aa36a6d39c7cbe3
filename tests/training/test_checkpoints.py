"""A checkpoint of any number of ranks is read by any other, by a plain module and by the export."""

import json
from pathlib import Path

import pytest
import torch

from tests.once import shared_folder
from tests.training.checkpoints_program import (
    KIND,
    OTHER_SEED,
    RANKING_STAGE_ALONE,
    SAVED_AT,
    SETTINGS,
    resume,
    steps,
)
from tests.training.on_ranks import (
    Case,
    find,
    logits_of,
    plain_model,
    run_config,
    run_on_ranks,
    trainer_of,
)
from tests.worlds import PROBABILITY_TOLERANCE
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.draw import draw_ragged_requests
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.checkpoints import (
    PROGRESS,
    checkpoints_of,
    load_progress,
    load_weights,
    result_of,
)
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.objective import Objective
from torchrec_kvshare.training.ranks import joined_ranks
from torchrec_kvshare.training.run import load_data

# The same weights on other ranks: logits of all were equal. The next four losses differed by 8.4e-8
# at most, which is the rounding of sums in another order.
TOLERANCE = 1e-6


class Saved:
    """What two ranks saved, and what these and three others got back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_world_size = run_on_ranks("checkpoints_program", folder, 2, 3)

    def cases(self, world_size: int, **wanted: object) -> list[Case]:
        return [find(cases, **wanted) for cases in self.by_world_size[world_size]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(shared_folder(tmp_path_factory, "saved"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return load_data(run_config(tmp_path_factory.mktemp("unused")))


def assert_resumed(found: Case, expected: Case) -> None:
    """Check the logits at the checkpoint, the losses after it, and that these are other weights."""
    assert found["step"] == SAVED_AT
    assert found["logits"] == pytest.approx(expected["logits"], abs=TOLERANCE, rel=0)
    assert found["before"] != pytest.approx(expected["logits"], abs=0.1, rel=0)
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_checkpoint_of_two_ranks_goes_on_at_two_and_at_three(
    saved: Saved, name: str, world_size: int
) -> None:
    """AdamW began anew, and SGD's empty state could not be read: only one rank had written it."""
    (expected, _) = saved.cases(2, case="saved", name=name)
    for found in saved.cases(world_size, case="resumed", name=name):
        assert_resumed(found, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(
    saved: Saved, shards: Shards, name: str
) -> None:
    (expected, _) = saved.cases(2, case="saved", name=name)
    with joined_ranks(torch.device("cpu")) as ranks:
        assert_resumed(resume(name, shards, saved.folder, ranks), expected)


def test_ranks_train_the_ranking_stage_and_change_no_bit_of_the_towers(
    saved: Saved, shards: Shards
) -> None:
    """Tables of towers and of vectors are in one collection, on the same ranks."""
    for case in saved.cases(2, case="saved", name=RANKING_STAGE_ALONE):
        assert {key for key in case["same"] if "indices" not in key} == {
            key
            for key in plain_model(KIND, shards).state_dict()
            if ".histories.poolings." in key or ".token_embeddings.embeddings.token_" in key
        }


@pytest.fixture
def loaded(saved: Saved, shards: Shards) -> Objective:
    """A plain module of other weights, with those of the checkpoint of two ranks loaded."""
    plain = plain_model(KIND, shards, OTHER_SEED)
    load_weights(plain, result_of(saved.folder / "rowwise_adagrad"))
    return plain


def test_the_plain_module_loads_a_checkpoint_of_ranks(
    saved: Saved, shards: Shards, loaded: Objective
) -> None:
    cases = saved.cases(2, case="saved", name="rowwise_adagrad")
    assert all(case["same_keys"] for case in cases)
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = trainer_of(KIND, shards, saved.folder / "unused", ranks)
    batch = trainer.stream.batch(trainer.stream.epoch(1).chosen[0], 1, 0)
    found = logits_of(loaded.model, batch).tolist()
    assert found == pytest.approx(cases[0]["logits"], abs=TOLERANCE, rel=0)


def test_a_checkpoint_of_ranks_is_exported(
    shards: Shards, loaded: Objective, tmp_path: Path
) -> None:
    ranking = RankingModel(loaded.model).eval()
    export_model(ranking, shards.schema, tmp_path / "artifact")
    requests = draw_ragged_requests(shards.schema, 3)
    expected = Engine(ranking, shards.schema, store=None).rank(requests)
    found = new_engine(load_artifact(tmp_path / "artifact")).rank(requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=PROBABILITY_TOLERANCE, rel=0)


# --- folders


def saved_at(trainer: Trainer, *steps_to_save: int) -> None:
    """Save checkpoints that differ in one weight, the step's number."""
    bias = trainer.ranker.over_arch.model[1].bias
    steps(trainer, 0, 1)  # AdamW makes its state.
    for step in steps_to_save:
        with torch.no_grad():
            bias.fill_(step)
        trainer.progress.step = step
        trainer._save(None)


def steps_in(folder: Path) -> list[int]:
    return [load_progress(path)["step"] for path in checkpoints_of(folder)]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_are_to_be_kept(
    shards: Shards, tmp_path: Path, keep: int
) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = trainer_of(KIND, shards, tmp_path, ranks, keep_checkpoints=keep)
        saved_at(trainer, 2, 9, 10, 100)
    assert steps_in(tmp_path) == [2, 9, 10, 100][-keep:]
    assert len(list(tmp_path.iterdir())) == keep


def test_a_torn_checkpoint_is_not_read(shards: Shards, tmp_path: Path) -> None:
    """A folder is torn without its progress, or with the name it has while it is written."""
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = trainer_of(KIND, shards, tmp_path, ranks, keep_checkpoints=5)
        saved_at(trainer, 4, 6, 8)
        (tmp_path / f"{6:010d}" / PROGRESS).unlink()
        (tmp_path / f"{8:010d}").rename(tmp_path / f".{8:010d}.new")
        assert steps_in(tmp_path) == [4]
        resumed = trainer_of(KIND, shards, tmp_path, ranks, keep_checkpoints=5)
        resumed.resume()
        assert resumed.progress.step == 4
        assert resumed.ranker.over_arch.model[1].bias.tolist() == [4.0]
        plain = plain_model(KIND, shards)
        load_weights(plain, result_of(tmp_path))
        assert plain.model.over_arch.model[1].bias.tolist() == [4.0]
        # Written again, they are whole, and what was torn is gone.
        saved_at(resumed, 6, 8)
    assert steps_in(tmp_path) == [4, 6, 8]
    assert {path.name for path in tmp_path.iterdir()} == {f"{step:010d}" for step in (4, 6, 8)}


def test_torn_checkpoints_of_other_steps_are_removed(shards: Shards, tmp_path: Path) -> None:
    """Checkpoints are written by the clock, so that a resumed run need not reach the same step."""
    torn = tmp_path / f".{3:010d}.new"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half of")
    with joined_ranks(torch.device("cpu")) as ranks:
        saved_at(trainer_of(KIND, shards, tmp_path, ranks), 5)
    assert [path.name for path in tmp_path.iterdir()] == [f"{5:010d}"]


def test_a_folder_without_a_checkpoint_has_no_weights(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        load_weights(plain_model(KIND, shards), result_of(tmp_path))


def test_weights_that_are_not_finite_are_not_loaded(shards: Shards, tmp_path: Path) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        trainer = trainer_of(KIND, shards, tmp_path, ranks)
        saved_at(trainer, 1)
        (checkpoint,) = checkpoints_of(tmp_path)
        written = json.loads((checkpoint / PROGRESS).read_text())
        assert written == {"epoch": 0, "batch": 1, "step": 1, "best": None}
        with torch.no_grad():
            trainer.ranker.over_arch.model[1].bias.fill_(float("inf"))
        with pytest.raises(TrainingError, match=r"1 of the 1 values of .*bias are not finite"):
            trainer._save(None)
    assert steps_in(tmp_path) == [1]
