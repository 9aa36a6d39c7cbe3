"""What ``test_ranks`` checks on each rank; see ``on_ranks``."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torchrec.datasets.utils import Batch

from tests.data.folders import write_folder
from tests.training.checkpoints_program import steps
from tests.training.on_ranks import (
    PROTOCOL,
    is_table,
    largest_difference,
    on_each_rank,
    own_part,
    plain_model,
    run_config,
    tell,
    trainer_of,
    whole_tensors,
)
from tests.training.worlds import BUDGET, DATA
from torchrec_kvshare.config import LEAVE_ONE_OUT, RANKING_STAGE, PreparedData, TrainConfig
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.shards import Shards, in_memory
from torchrec_kvshare.data.splits import split_rule
from torchrec_kvshare.data.stream import Epoch, WindowStream
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.training.loop import Trainer
from torchrec_kvshare.training.objective import ObjectiveSettings
from torchrec_kvshare.training.ranks import Ranks
from torchrec_kvshare.training.run import load_data, train_run
from torchrec_kvshare.training.sharding import SGD, TableSettings

# Of SGD. The larger it is, the less of a gradient is lost when tables before and after a step are
# subtracted; a power of two adds no rounding.
RATE = 64.0


def check_gradients(kind: str, shards: Shards, folder: Path, ranks: Ranks, users: range) -> None:
    """Compare one step on all ranks with one backward pass of the plain model on all windows."""
    trainer = trainer_of(
        kind, shards, folder / "never saved", ranks, tables=TableSettings(SGD, RATE)
    )
    chosen = np.flatnonzero(np.isin(trainer.stream.user, list(users)))
    batch, num_trained = own_part(trainer, chosen)
    before = whole_tensors(trainer.sharded.state_dict())
    loss = trainer.step(batch, num_trained=num_trained)
    after = whole_tensors(trainer.sharded.state_dict())
    gradients = {name: (before[name] - after[name]) / RATE for name in before if is_table(name)}
    for name, parameter in trainer.sharded.named_parameters():
        if not is_table(name):
            gradients[name] = parameter.grad

    plain = plain_model(kind, shards)
    expected, _ = plain(trainer.stream.batch(chosen, 0, 0))
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
        candidates=batch.labels.size(0) if num_trained is None else 0,
        loss=abs(loss - expected.item()),
        tables=differences[True],
        dense=differences[False],
    )


def train_bounded(shards: Shards, folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Train with bounded gradients; return losses, the best NE, and logits of the result."""
    trainer = trainer_of(
        "causal",
        shards,
        folder / "bounded",
        ranks,
        tables=TableSettings(SGD, 0.5, clip=1e-3),
        clip_norm=0.05,
        warmup_steps=3,
        ema_decay=0.8,
        keep_best="NE",
        epochs=1,
        # Each rank has its part of the gradient of a shared item, and table_clip bounds the part.
        objective=ObjectiveSettings(),
    )
    losses = steps(trainer, 0, 7)
    trainer.run(None)  # the rest of the epoch
    assert trainer.progress.best is not None
    batch = trainer.stream.batch(trainer.stream.epoch(1).chosen[0], 1, 0)
    logits = trainer.scorer()(batch).flatten().tolist()
    return {"losses": losses, "best": [trainer.progress.best.value], "logits": logits}


def check_run(shards: Shards, folder: Path, ranks: Ranks) -> None:
    """Train a whole run; count the batches in which this rank has no windows."""
    empty: list[bool] = []
    real_has_own = Epoch.has_own

    def has_own(self: Epoch, index: int) -> bool:
        empty.append(not real_has_own(self, index))
        return not empty[-1]

    Epoch.has_own = has_own  # type: ignore[method-assign]
    metrics = train_run(run_config(folder / "run"))
    Epoch.has_own = real_has_own  # type: ignore[method-assign]
    tell(case="run", metrics=metrics, padded=sum(empty), batches=len(empty))


def train_with_gaps(shards: Shards, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Train two tasks, each with rows that have a label for the other alone."""
    dataset = shards.read([0])
    number = np.arange(len(dataset.time))
    [labels] = dataset.log.labels.values()
    labels_by_task = {
        "like": np.where(number % 3 == 0, np.nan, labels),
        "love": np.where(number % 3 == 1, np.nan, number % 2).astype(np.float32),
    }
    log = replace(dataset.log, labels=labels_by_task)
    gappy = in_memory(build_dataset(log, dataset.schema.histories))
    trainer = trainer_of("causal", gappy, folder / "gaps", ranks)
    losses = steps(trainer, 0, 7)
    return {"losses": losses, "valid": trainer._validate()}


def stage_config(run: Path, output: Path) -> TrainConfig:
    """Go on from a run: one epoch of its ranking stage alone."""
    config = run_config(output, init_from=str(run), trainable=RANKING_STAGE)
    return replace(config, budget=replace(BUDGET, epochs=1))


def check_prepared(folder: Path, ranks: Ranks) -> None:
    """Train on a folder of six shards with a worker; tell which shards this rank read."""
    data = PreparedData(path=str(folder / "prepared"))
    if ranks.is_first:
        write_folder(load_log(DATA), Path(data.path), 6, split_rule(LEAVE_ONE_OUT))
    ranks.wait()
    config = run_config(folder / "prepared run", data=data, shuffle_shards=3, workers=1, **PROTOCOL)
    held: set[int] = set()
    real_epoch = WindowStream.epoch

    def epoch(self: WindowStream, number: int) -> Epoch:
        found = real_epoch(self, number)
        held.update(shard for shards in found.held for shard in shards)
        return found

    WindowStream.epoch = epoch  # type: ignore[method-assign]
    metrics = train_run(config)
    WindowStream.epoch = real_epoch  # type: ignore[method-assign]
    tell(case="prepared", metrics=metrics, held=sorted(held))


def check_not_finite(shards: Shards, folder: Path, ranks: Ranks, *, padding: bool) -> None:
    """A batch of the last rank holds a NaN, in a step in which the rank pads, or does not."""
    trainer = trainer_of(
        "causal", shards, folder / f"nan, padding {padding}", ranks, checkpoint_seconds=0
    )
    last = ranks.world_size - 1
    pads = [
        not (trainer.stream.user[chosen] % ranks.world_size == last).any()
        for chosen in trainer.stream.epoch(0).chosen
    ]
    broken_step = pads.index(padding, 2)
    real_step, steps = Trainer.step, count()

    def step(self: Trainer, batch: Batch, **given: Any) -> float:
        if next(steps) == broken_step and ranks.rank == last:
            batch.dense_features[0, 0] = float("nan")
        return real_step(self, batch, **given)

    Trainer.step = step  # type: ignore[method-assign]
    message = ""
    try:
        trainer.run(None)
    except TrainingError as error:
        message = str(error)
    Trainer.step = real_step  # type: ignore[method-assign]
    resumed = trainer_of("causal", shards, trainer.folder, ranks)
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


def check_broken_weight(shards: Shards, folder: Path, ranks: Ranks) -> None:
    """A weight of the last rank's shard is not finite when a checkpoint is due."""
    trainer = trainer_of("causal", shards, folder / "nan in a shard", ranks)
    name = "model.sparse_arch.embedding_bag_collection.token_embeddings.embeddings"
    parts = trainer.sharded.state_dict()[f"{name}.token_item_id.weight"].local_shards()
    if parts and ranks.rank == ranks.world_size - 1:
        parts[0].tensor[0, 0] = float("nan")
    message = ""
    try:
        trainer._save(None)
    except TrainingError as error:
        message = str(error)
    tell(case="nan in a shard", message=message, has_rows=bool(parts))


def check_all(ranks: Ranks, shared: Path) -> None:
    folder = shared / f"{ranks.world_size} ranks"
    shards = load_data(run_config(folder))
    for kind in KINDS:
        check_gradients(kind, shards, folder, ranks, range(7))
    # The only user is the first rank's: the others pad.
    check_gradients("causal", shards, folder, ranks, range(1))
    tell(case="bounded", **train_bounded(shards, folder, ranks))
    check_run(shards, folder, ranks)
    tell(case="gaps", **train_with_gaps(shards, folder, ranks))
    tell(case="stage", metrics=train_run(stage_config(folder / "run", folder / "stage")))
    check_prepared(folder, ranks)
    check_not_finite(shards, folder, ranks, padding=False)
    check_not_finite(shards, folder, ranks, padding=True)
    check_broken_weight(shards, folder, ranks)


if __name__ == "__main__":
    on_each_rank(check_all)
