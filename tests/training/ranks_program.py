"""What ``test_ranks`` checks on each rank; see ``on_ranks``."""

import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torchrec.datasets.utils import Batch

from tests.training.on_ranks import (
    is_table,
    largest_difference,
    meeting,
    plain_model,
    run_config,
    tell,
    trainer_of,
    whole_tensors,
)
from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.ranks import Ranks
from torchrec_kvshare.training.run import load_dataset, train_run
from torchrec_kvshare.training.sharding import SGD, TableSettings

# Of SGD. The larger it is, the less of a gradient is lost when tables before and after a step are
# subtracted; a power of two adds no rounding.
RATE = 64.0


def check_gradients(kind: str, dataset: Dataset, folder: Path, ranks: Ranks, users: range) -> None:
    """Compare one step on all ranks with one backward pass of the plain model on all windows."""
    trainer = trainer_of(
        kind, dataset, folder / "never saved", ranks, tables=TableSettings(SGD, RATE)
    )
    chosen = np.flatnonzero(np.isin(trainer.windows.user, list(users)))
    own = trainer.own_part(chosen)
    batch = trainer.batch(own if len(own) else chosen[:1], 0)
    before = whole_tensors(trainer.sharded.state_dict())
    loss = trainer.step(batch, num_trained=None if len(own) else 0)
    after = whole_tensors(trainer.sharded.state_dict())
    gradients = {name: (before[name] - after[name]) / RATE for name in before if is_table(name)}
    for name, parameter in trainer.sharded.named_parameters():
        if not is_table(name):
            gradients[name] = parameter.grad

    plain = plain_model(kind, dataset)
    expected, _ = plain(trainer.batch(chosen, 0))
    expected.backward()
    differences: dict[bool, float] = {True: 0.0, False: 0.0}
    for name, parameter in plain.named_parameters():
        largest = parameter.grad.abs().max().item()
        # Some are zero but for rounding: the bias of keys shifts all logits of a softmax.
        difference = (gradients[name] - parameter.grad).abs().max().item() / max(largest, 1e-4)
        differences[is_table(name)] = max(differences[is_table(name)], difference)
    tell(
        case="gradients",
        kind=kind,
        users=len(users),
        candidates=len(own) and batch.labels.numel(),
        loss=abs(loss - expected.item()),
        tables=differences[True],
        dense=differences[False],
    )


def check_run(dataset: Dataset, folder: Path, ranks: Ranks) -> None:
    """Train a whole run; count the batches in which this rank has no windows."""
    empty: list[bool] = []
    real_part = Trainer.own_part

    def own_part(self: Trainer, chosen: Ints) -> Ints:
        own = real_part(self, chosen)
        empty.append(not len(own))
        return own

    Trainer.own_part = own_part  # type: ignore[method-assign]
    metrics = train_run(run_config(folder / "run"))
    Trainer.own_part = real_part  # type: ignore[method-assign]
    tell(case="run", metrics=metrics, padded=sum(empty), batches=len(empty))


def check_not_finite(dataset: Dataset, folder: Path, ranks: Ranks, *, padding: bool) -> None:
    """A batch of the last rank holds a NaN, in a step in which the rank pads, or does not."""
    trainer = trainer_of(
        "causal", dataset, folder / f"nan, padding {padding}", ranks, checkpoint_seconds=0
    )
    last = ranks.world_size - 1
    pads = [
        not (trainer.windows.user[chosen] % ranks.world_size == last).any()
        for chosen in trainer.epoch_batches(0)
    ]
    broken_step = pads.index(padding, 2)
    real_batch, steps = Trainer.batch, count()

    def batch(self: Trainer, *arguments: Any) -> Batch:
        made = real_batch(self, *arguments)
        if next(steps) == broken_step and ranks.rank == last:
            made.dense_features[0, 0] = float("nan")
        return made

    Trainer.batch = batch  # type: ignore[method-assign]
    message = ""
    try:
        trainer.run(None)
    except TrainingError as error:
        message = str(error)
    Trainer.batch = real_batch  # type: ignore[method-assign]
    resumed = trainer_of("causal", dataset, trainer.folder, ranks)
    resumed.resume()
    # The failed step changed nothing: the weights are those of the checkpoint before it.
    changed = largest_difference(
        whole_tensors(trainer.sharded.state_dict()), whole_tensors(resumed.sharded.state_dict())
    )
    tell(
        case="nan in a batch",
        padding=padding,
        message=message,
        broken_step=broken_step,
        steps=resumed.progress.step,
        changed=changed,
    )


def check_broken_weight(dataset: Dataset, folder: Path, ranks: Ranks) -> None:
    """A weight of the last rank's shard is not finite when a checkpoint is due."""
    trainer = trainer_of("causal", dataset, folder / "nan in a shard", ranks)
    name = "model.sparse_arch.embedding_bag_collection.token_embeddings.embeddings"
    shards = trainer.sharded.state_dict()[f"{name}.token_item_id.weight"].local_shards()
    if shards and ranks.rank == ranks.world_size - 1:
        shards[0].tensor[0, 0] = float("nan")
    message = ""
    try:
        trainer._save(None)
    except TrainingError as error:
        message = str(error)
    tell(case="nan in a shard", message=message, has_rows=bool(shards))


if __name__ == "__main__":
    with meeting(sys.argv[1:]) as (ranks, shared):
        folder = shared / f"{ranks.world_size} ranks"
        dataset = load_dataset(run_config(folder))
        for kind in KINDS:
            check_gradients(kind, dataset, folder, ranks, range(7))
        # The only user is the first rank's: the others pad.
        check_gradients("causal", dataset, folder, ranks, range(1))
        check_run(dataset, folder, ranks)
        check_not_finite(dataset, folder, ranks, padding=False)
        check_not_finite(dataset, folder, ranks, padding=True)
        check_broken_weight(dataset, folder, ranks)
