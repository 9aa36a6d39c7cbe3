"""Options that make a training run more robust do what they say, alone and together."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.checkpoints_program import steps
from tests.training.on_ranks import is_table, run_config, trainer_of
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.errors import ConfigError, TrainingError
from torchrec_kvshare.training.loop import FIRST_RATE, Trainer
from torchrec_kvshare.training.ranks import Ranks, joined_ranks
from torchrec_kvshare.training.run import load_data
from torchrec_kvshare.training.sharding import SGD, TableSettings, local_weights

KIND = "causal"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return load_data(run_config(tmp_path_factory.mktemp("unused")))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks(torch.device("cpu")) as ranks:
        yield ranks


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of all weights by key; all lie on this rank."""
    return {k: v.clone() for k, v in local_weights(trainer.sharded.state_dict()).items()}


# --- clipping


def gradients(trainer: Trainer) -> torch.Tensor:
    """Return all dense gradients of the last step, one after the other."""
    found = [parameter.grad for parameter in trainer.dense.values()]
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def test_dense_gradients_are_scaled_to_the_highest_norm_and_not_beyond(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    free = trainer_of(KIND, shards, tmp_path, ranks)
    steps(free, 0, 1)
    norm = float(gradients(free).norm())
    for clip_norm in (norm / 8, norm * 8):
        clipped = trainer_of(KIND, shards, tmp_path, ranks, clip_norm=clip_norm)
        steps(clipped, 0, 1)
        expected = gradients(free) * min(1.0, clip_norm / norm)
        torch.testing.assert_close(gradients(clipped), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_clipped(
    shards: Shards, ranks: Ranks, tmp_path: Path, value: float
) -> None:
    """Scaled by the norm, one infinite gradient would have made all dense weights NaN."""
    trainer = trainer_of(KIND, shards, tmp_path, ranks, clip_norm=1.0)
    bias = trainer.ranker.over_arch.model[1].bias
    assert isinstance(bias, nn.Parameter)
    bias.register_hook(lambda gradient: torch.full_like(gradient, value))
    with pytest.raises(TrainingError, match=rf"norm of the dense gradients is {value};"):
        steps(trainer, 0, 1)
    assert all(weight.isfinite().all() for weight in trainer.dense.values())


def test_the_gradients_of_looked_up_embeddings_are_cut_to_the_largest_value(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    rate, clip = 64.0, 2.0**-20
    tables = TableSettings(SGD, rate, clip=clip)
    trainer = trainer_of(KIND, shards, tmp_path, ranks, tables=tables)
    before = weights_of(trainer)
    (chosen, *_) = trainer.stream.epoch(0).chosen
    features = trainer.stream.batch(chosen, 0).sparse_features
    steps(trainer, 0, 1)
    after = weights_of(trainer)
    for name in filter(is_table, before):
        changed = (after[name] - before[name]).abs() / rate
        # Every look-up of a row adds a gradient of its own.
        assert 0 < changed.max().item() <= 1.01 * clip * features.values().numel()
    # Candidates' items come a few times each: hardly a value is so small that it is not cut.
    (items,) = [name for name in before if name.endswith(".bag_item_id.weight[0]")]
    counts = features["candidates.item_id"].values().bincount(minlength=len(before[items]))
    changed = (after[items] - before[items]).abs().max(1).values / rate
    torch.testing.assert_close(
        changed[counts == 1], torch.full_like(changed[counts == 1], clip), rtol=0.05, atol=0
    )


# --- warm-up


def test_rates_of_dense_parts_and_tables_rise_and_then_fall(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    trainer = trainer_of(KIND, shards, tmp_path, ranks, warmup_steps=4)
    shares = []
    for index in range(7):
        steps(trainer, index, index + 1)
        groups = trainer.optimizer.param_groups
        (share,) = {round(group["lr"] / group[FIRST_RATE], 9) for group in groups}
        shares.append(share)
    assert {group[FIRST_RATE] for group in groups} == {3e-3, 0.5}
    left = trainer.num_steps - 4
    falling = [0.5 * (1 + math.cos(math.pi * step / left)) for step in range(3)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, *falling], abs=1e-9)


def test_a_warm_up_that_never_ends_is_refused(shards: Shards, ranks: Ranks, tmp_path: Path) -> None:
    num_steps = trainer_of(KIND, shards, tmp_path, ranks).num_steps
    assert trainer_of(KIND, shards, tmp_path, ranks, warmup_steps=num_steps - 1)
    with pytest.raises(
        ConfigError, match=rf"warmup_steps is {num_steps}; it must be below the {num_steps} steps"
    ):
        trainer_of(KIND, shards, tmp_path, ranks, warmup_steps=num_steps)
