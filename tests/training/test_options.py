"""Options that make a training run more robust do what they say, alone and together."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.checkpoints_program import steps
from tests.training.on_ranks import is_table, plain_model, run_config, trainer_of
from torchrec_kvshare.config import BFLOAT16
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import VALID
from torchrec_kvshare.errors import ConfigError, TrainingError
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.training.checkpoints import load_weights, result_of
from torchrec_kvshare.training.evaluate import evaluate_sampled, model_scorer
from torchrec_kvshare.training.loop import FIRST_RATE, Trainer
from torchrec_kvshare.training.objective import Objective
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
    features = trainer.stream.batch(chosen, 0, 0).sparse_features
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


# --- averages


def expected_average(history: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Average the values that a weight had before the first step and after each."""
    average = history[0].double()
    for step, value in enumerate(history[1:]):
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * value.double()
    return average


def test_the_average_follows_the_weights_and_forgets_the_first_ones(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    trainer = trainer_of(KIND, shards, tmp_path, ranks, ema_decay=0.3)
    history = {name: [weight.detach().clone()] for name, weight in trainer.dense.items()}
    for index in range(7):
        steps(trainer, index, index + 1)
        for name, weight in trainer.dense.items():
            history[name].append(weight.detach().clone())
    assert trainer.averaged is not None
    raw = weights_of(trainer)
    with trainer.averaged.applied():
        averaged = weights_of(trainer)
    for name, values in history.items():
        expected = expected_average(values, 0.3)
        torch.testing.assert_close(averaged[name].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(raw[name], values[-1])
    # Biases of keys have no gradients but rounding; most others have moved.
    moved = [name for name in history if not torch.equal(averaged[name], raw[name])]
    assert len(moved) > len(history) / 2
    assert all(torch.equal(averaged[name], raw[name]) for name in filter(is_table, raw))
    after = weights_of(trainer)
    assert all(torch.equal(after[name], raw[name]) for name in raw)


def test_a_checkpoint_has_the_average_as_the_model_and_goes_on_from_the_raw_weights(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    trainer = trainer_of(KIND, shards, tmp_path, ranks, ema_decay=0.9)
    steps(trainer, 0, 3)
    trainer._save(None)
    assert trainer.averaged is not None
    with trainer.averaged.applied():
        expected = {name.removesuffix("[0]"): one for name, one in weights_of(trainer).items()}
    plain = plain_model(KIND, shards, seed=5)
    load_weights(plain, result_of(tmp_path))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    resumed = trainer_of(KIND, shards, tmp_path, ranks, ema_decay=0.9, seed=5)
    resumed.resume()
    assert steps(resumed, 3, 6) == steps(trainer, 3, 6)
    assert resumed.averaged is not None
    for name, average in resumed.averaged.average.items():
        assert torch.equal(average, trainer.averaged.average[name]), name


def test_a_run_with_averages_validates_tests_and_exports_them(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    trainer = trainer_of(KIND, shards, tmp_path, ranks, ema_decay=0.9, epochs=1)
    trainer.run(None)
    plain = plain_model(KIND, shards, seed=5)
    load_weights(plain, result_of(tmp_path))
    batch = trainer.stream.batch(trainer.stream.epoch(1).chosen[0], 1, 0)
    expected = model_scorer(plain.model)(batch)
    assert torch.equal(trainer.scorer()(batch), expected)
    trainer.resume()  # It has the raw weights again.
    assert not torch.equal(trainer.scorer()(batch), expected)
    watched = partial(evaluate_sampled, shards=shards, split=VALID, num_negatives=3)
    assert trainer._validate() == watched(model_scorer(plain.model))
    assert trainer._validate() != watched(trainer.scorer())


# --- precision


def test_bfloat16_is_the_precision_of_linear_layers_only(
    shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    trainer = trainer_of(KIND, shards, tmp_path, ranks, precision=BFLOAT16)
    dtypes: dict[type, set[torch.dtype]] = {}

    def remember(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        dtypes.setdefault(type(module), set()).add(out.dtype)

    for module in trainer.sharded.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(remember)
    losses: list[torch.Tensor] = []
    [objective] = [one for one in trainer.sharded.modules() if isinstance(one, Objective)]
    objective.register_forward_hook(
        lambda _module, _batch, result: losses.extend([result[0], *result[1]])
    )
    steps(trainer, 0, 1)
    assert {one.dtype for one in losses} == {torch.float32}
    assert len(dtypes) == 2  # linear layers and projections
    assert all(found == {torch.bfloat16} for found in dtypes.values())
    assert {weight.dtype for weight in weights_of(trainer).values()} == {torch.float32}
    assert gradients(trainer).dtype == torch.float32


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_every_encoder_trains_in_bfloat16_and_is_evaluated_in_float32(
    kind: str, shards: Shards, ranks: Ranks, tmp_path: Path
) -> None:
    exact = trainer_of(kind, shards, tmp_path, ranks)
    mixed = trainer_of(kind, shards, tmp_path, ranks, precision=BFLOAT16)
    expected, found = steps(exact, 0, 3), steps(mixed, 0, 3)
    assert found != expected
    # Worst of the six kinds: 1.3e-3, of losses near 2.5; projected tokens are rounded too.
    assert found == pytest.approx(expected, abs=5e-3, rel=0)
    plain = plain_model(kind, shards)
    weights = {name.removesuffix("[0]"): value for name, value in weights_of(mixed).items()}
    plain.load_state_dict(weights)
    batch = mixed.stream.batch(mixed.stream.epoch(1).chosen[0], 1, 0)
    score = model_scorer(plain.model)
    assert torch.equal(mixed.scorer()(batch), score(batch))


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
