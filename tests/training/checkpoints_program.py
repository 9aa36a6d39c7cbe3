"""What ``test_checkpoints`` checks on each rank; see ``on_ranks``.

Two ranks save a checkpoint in the middle of an epoch and train on. Then any number of ranks resume.
"""

from pathlib import Path
from typing import Any

import torch

from tests.training.on_ranks import (
    logits_of,
    on_each_rank,
    plain_model,
    run_config,
    tell,
    train_on,
    trainer_of,
    whole_tensors,
)
from torchrec_kvshare.config import RANKING_STAGE
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.ranks import Ranks
from torchrec_kvshare.training.run import load_data
from torchrec_kvshare.training.sharding import (
    ADAGRAD,
    ROWWISE_ADAGRAD,
    SGD,
    TableSettings,
)

KIND = "longer"  # the one with the most kinds of parameters
SAVED_AT, NUM_STEPS = 5, 9  # in the middle of the first epoch
OTHER_SEED = 7  # of models that are to be overwritten
RANKING_STAGE_ALONE = "ranking stage"
# By name: sharding types of tables, with their optimizer.
SETTINGS: dict[str, dict[str, Any]] = {
    "rowwise_adagrad": {"tables": TableSettings(ROWWISE_ADAGRAD, 0.05)},
    "adagrad, column_wise": {"tables": TableSettings(ADAGRAD, 0.05, {"*": ["column_wise"]})},
    "sgd": {"tables": TableSettings(SGD, 0.5)},
    RANKING_STAGE_ALONE: {
        "tables": TableSettings(ADAGRAD, 0.05, {"token_item_id": ["row_wise"]}),
        "trainable": RANKING_STAGE,
    },
}


def steps(trainer: Trainer, first: int, end: int) -> list[float]:
    """Train batches ``first`` to ``end - 1`` of the first epoch; return their losses."""
    losses = []
    for index in range(first, end):
        losses.append(train_on(trainer, trainer.stream.epoch(0).chosen[index]))
        trainer.progress.batch, trainer.progress.step = index + 1, index + 1
    return losses


def probe(trainer: Trainer) -> list[float]:
    """Return logits of a batch that every rank holds."""
    batch = trainer.stream.batch(trainer.stream.epoch(1).chosen[0], 1, 0)
    return logits_of(trainer.ranker, batch).tolist()


def save(name: str, shards: Shards, folder: Path, ranks: Ranks) -> None:
    trainer = trainer_of(KIND, shards, folder / name, ranks, **SETTINGS[name])
    before = whole_tensors(trainer.sharded.state_dict())
    steps(trainer, 0, SAVED_AT)
    trainer._save(None)
    logits = probe(trainer)
    keys = set(trainer.sharded.state_dict()) == set(plain_model(KIND, shards).state_dict())
    losses = steps(trainer, SAVED_AT, NUM_STEPS)
    after = whole_tensors(trainer.sharded.state_dict())
    same = [key for key, weight in after.items() if torch.equal(weight, before[key])]
    tell(case="saved", name=name, logits=logits, losses=losses, same_keys=keys, same=same)


def resume(name: str, shards: Shards, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Resume in a trainer with other weights; return what it gives and how it goes on."""
    trainer = trainer_of(KIND, shards, folder / name, ranks, seed=OTHER_SEED, **SETTINGS[name])
    before = probe(trainer)
    trainer.resume()
    logits, step = probe(trainer), trainer.progress.step
    losses = steps(trainer, SAVED_AT, NUM_STEPS)
    return {"before": before, "logits": logits, "losses": losses, "step": step}


def check_all(ranks: Ranks, folder: Path) -> None:
    shards = load_data(run_config(folder))
    for name in SETTINGS:
        if ranks.world_size == 2:
            save(name, shards, folder, ranks)
        tell(case="resumed", name=name, **resume(name, shards, folder, ranks))


if __name__ == "__main__":
    on_each_rank(check_all)
