"""What ``test_managed`` checks on each rank; see ``on_ranks``."""

from dataclasses import replace
from pathlib import Path

from tests.training import worlds
from tests.training.on_ranks import (
    is_table,
    on_each_rank,
    run_config,
    tell,
    train_on,
    trainer_of,
    whole_tensors,
)
from torchrec_kvshare.config import IdConfig
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.features.schema import ITEM
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.ranks import ALONE, Ranks
from torchrec_kvshare.training.run import load_data
from torchrec_kvshare.training.sharding import ROWWISE_ADAGRAD, TableSettings

# Many rare items.
DATA = replace(worlds.DATA, num_items=300)
# Fewer rows than ids. Rows change hands at steps 2, 5, 8 and so on: the checkpoint is between two.
IDS = {
    "item_id": IdConfig("managed", num_rows=90, eviction_steps=3),
    "user_id": IdConfig("managed", num_rows=11, eviction_steps=2),
    "category": IdConfig("managed", num_rows=4, eviction_steps=3),
}
SAVED_AT, NUM_STEPS = 10, 16
ROW_WISE = TableSettings(ROWWISE_ADAGRAD, 0.05, {"token_item_id": ["row_wise"]})


def managed_shards(folder: Path) -> Shards:
    return load_data(run_config(folder, ids=IDS, data=DATA))


def managed_trainer(
    shards: Shards,
    folder: Path,
    ranks: Ranks = ALONE,
    *,
    tables: TableSettings = ROW_WISE,
    seed: int = 0,
) -> Trainer:
    return trainer_of("causal", shards, folder, ranks, tables=tables, seed=seed)


def train_steps(trainer: Trainer, first: int, end: int) -> list[float]:
    """Train batches ``first`` to ``end - 1`` of the first epoch; return their losses."""
    losses = []
    for index in range(first, end):
        losses.append(train_on(trainer, trainer.stream.epoch(0).chosen[index]))
        trainer.progress.batch, trainer.progress.step = index + 1, index + 1
    return losses


def maps_of(trainer: Trainer) -> dict[str, list[int]]:
    return {name: array.tolist() for name, array in trainer.managed.arrays().items()}


def sums_of(trainer: Trainer) -> dict[str, float]:
    """Sum of each whole table, whatever the number of ranks that hold it."""
    whole = whole_tensors(trainer.sharded.state_dict())
    return {n: tensor.double().sum().item() for n, tensor in whole.items() if is_table(n)}


def check_all(ranks: Ranks, folder: Path) -> None:
    shards = managed_shards(folder)
    trainer = managed_trainer(shards, folder / f"{ranks.world_size}", ranks)
    losses, num_evicted = [], 0
    for index in range(NUM_STEPS):
        if index == SAVED_AT:
            trainer._save(None)
        losses += train_steps(trainer, index, index + 1)
        num_evicted += trainer.managed.num_evicted.get(ITEM, 0)
    told = {"maps": maps_of(trainer), "sums": sums_of(trainer)}
    tell(case="trained", losses=losses, num_evicted=num_evicted, **told)
    if ranks.world_size == 1:  # resumes what two ranks saved
        resumed = managed_trainer(shards, folder / "2", ranks, seed=7)
        resumed.resume()
        losses = train_steps(resumed, SAVED_AT, NUM_STEPS)
        tell(case="resumed", losses=losses, maps=maps_of(resumed), sums=sums_of(resumed))


if __name__ == "__main__":
    on_each_rank(check_all)
