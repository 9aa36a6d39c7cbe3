"""The training loop: a model and its ``Objective`` over whole windows, resumable at any batch.

The same loop runs in one process and on several ranks, on a log in memory and on one that is read
shard by shard. A batch is the same whatever the number of ranks: each rank trains on the windows of
its users, and losses are weighted so that the ranks together learn what one process would. Tables
get fused optimizers, so that the cost of a step grows with its batch, not with the catalogue; dense
parameters get AdamW. Everything random depends on the seed and the step, so that a run that was
killed and restarted ends with the weights and the TensorBoard curves of an uninterrupted one.
"""

import logging
import math
import time
from collections import OrderedDict
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_kvshare.config import ALL, BFLOAT16, CUDA, FLOAT32, RANKING_STAGE, UNIFORM
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import VALID
from torchrec_kvshare.data.stream import (
    Loading,
    SamplingSettings,
    StreamSettings,
    WindowStream,
    worker_errors,
)
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.model.ranking import takes_prefixes
from torchrec_kvshare.training.averaging import AveragedWeights
from torchrec_kvshare.training.checkpoints import (
    MODEL,
    OPTIMIZER,
    RAW,
    checkpoints_of,
    load_arrays,
    load_checkpoint,
    load_progress,
    non_finite,
    result_of,
    save_checkpoint,
)
from torchrec_kvshare.training.evaluate import Scorer, evaluate_sampled, model_scorer
from torchrec_kvshare.training.frozen import FrozenTowers
from torchrec_kvshare.training.managed import ManagedIds, keys_of
from torchrec_kvshare.training.metrics import Values, metric_name, rank_metrics
from torchrec_kvshare.training.objective import Objective, ObjectiveSettings
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out
from torchrec_kvshare.training.ranks import Ranks
from torchrec_kvshare.training.schedule import check_warmup, rate_share
from torchrec_kvshare.training.selection import RANKED, Best, is_better
from torchrec_kvshare.training.sharding import (
    TableSettings,
    configs_of,
    local_weights,
    plan_table,
    redraw_rows,
    shard,
)

logger = logging.getLogger(__name__)

LEARNING_RATE, FIRST_RATE = "lr", "first_lr"
TABLES, DENSE = "tables", "dense"  # optimizers, in a checkpoint's keys


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the training split.
        learning_rate: highest rate of AdamW on dense parameters; falls to zero along a half cosine,
            as that of the tables does.
        tables: how embedding tables are spread and trained.
        weight_decay: of AdamW on dense parameters; on tables it would shrink rows that
            no batch holds.
        batch_targets: targets per batch of all ranks together, each with its negatives.
        negatives: negatives sampled per target.
        seed: of negatives, order and dropout.
        checkpoint_seconds: longest time between two checkpoints, in seconds.
        keep_checkpoints: number of checkpoints that stay.
        shuffle_shards: shards whose windows are shuffled together, and held at a time.
        sampling: what negatives and shared items are drawn from.
        loading: which processes build batches.
        objective: what is minimised.
        warmup_steps: steps in which all learning rates rise; 0: the first step has the whole rate.
        clip_norm: highest norm of all dense gradients together; None: any.
        precision: of the forward pass, ``float32`` or ``bfloat16``; weights, optimizers, tables,
            attention and the loss are float32 with both.
        ema_decay: highest decay of the moving average of dense weights, which is what is validated
            and saved as the model; None: the weights themselves are.
        ranking: what held-out items are ranked among for a ``keep_best`` of ``RANKED``.
        keep_best: validation metric, of the first task, that chooses the epoch whose weights are
            the result; None: the last epoch is.
        patience: epochs in a row without a better ``keep_best`` after which training stops.
        trainable: ``all``, or ``ranking_stage``: towers and their tables stay as they are.
    """

    epochs: int
    learning_rate: float
    tables: TableSettings
    weight_decay: float
    batch_targets: int
    negatives: int
    seed: int
    checkpoint_seconds: float
    keep_checkpoints: int = 1
    shuffle_shards: int = 1
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    loading: Loading = field(default_factory=Loading)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    warmup_steps: int = 0
    clip_norm: float | None = None
    precision: str = FLOAT32
    ema_decay: float | None = None
    ranking: RankingSettings = field(default_factory=RankingSettings)
    keep_best: str | None = None
    patience: int | None = None
    trainable: str = ALL


@dataclass
class Progress:
    """How far training has come.

    Attributes:
        epoch: epoch of the next batch, from 0; earlier epochs are trained and validated.
        batch: index of the next batch in its epoch.
        step: batches trained in all epochs.
        best: the best epoch so far, if the run keeps it.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: Best | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Progress":
        """Return the progress that a checkpoint has as JSON."""
        best = values["best"]
        return cls(**(values | {"best": best and Best(**best)}))


def train(
    model: nn.Module,
    shards: Shards,
    settings: TrainSettings,
    folder: Path,
    log_folder: Path,
    ranks: Ranks,
) -> "Trainer":
    """Train a model, resuming from the folder's checkpoint if there is one.

    Args:
        model: with or without a history; its tables are sharded in place.
        shards: the model is trained on their training split and evaluated on their validation
            split.
        settings: how to train.
        folder: holds the checkpoints; the last one, or the best, is the trained model.
        log_folder: gets loss and examples per second by batch, and NE, AUC and GAUC by epoch, for
            TensorBoard.
        ranks: the processes that train together; all of them must call this.

    Returns:
        The trainer, whose ``ranker`` is the trained model.

    Raises:
        ConfigError: if a table cannot be sharded as configured, or the warm-up takes all steps.
        DataError: if a shard cannot be read.
        TrainingError: at the first loss or weight that is not finite; the checkpoint before it
            stays.
    """
    trainer = Trainer(model, shards, settings, folder, ranks)
    trainer.resume()
    if not ranks.is_first:
        trainer.run(None)
        return trainer
    logger.info("%s: tables\n%s", folder.name, plan_table(trainer.plan))
    # Points that a killed run logged after its checkpoint are logged again and replaced.
    with open_writer(log_folder, trainer.progress.step) as writer:
        trainer.run(writer)
    return trainer


def open_writer(folder: Path, purge_step: int) -> SummaryWriter:
    """Open a writer whose points replace the folder's points from ``purge_step`` on.

    TensorBoard reads event files in the order of their names. A name starts with the second it was
    opened in, followed by numbers that sort as text, so each file needs a second of its own.
    """
    seconds = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while f"{int(time.time()):010d}" in seconds:
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=purge_step)


class Trainer:
    """A model in training, its optimizers, its batches and its progress.

    Args:
        model: its tables are sharded in place.
        shards: hold the training split.
        settings: how to train.
        folder: holds the checkpoints.
        ranks: the processes that train together.
    """

    def __init__(
        self, model: nn.Module, shards: Shards, settings: TrainSettings, folder: Path, ranks: Ranks
    ) -> None:
        self.shards = shards
        self.settings = settings
        self.folder = folder
        self.ranks = ranks
        self.share_prefill = takes_prefixes(model)
        self.ranker = model
        self.configs = configs_of(model)
        self.frozen = FrozenTowers(model) if settings.trainable == RANKING_STAGE else None
        objective = Objective(
            model,
            settings.objective,
            histories=[history.name for history in shards.schema.histories],
            tasks=shards.schema.tasks,
            negatives=settings.negatives,
            has_draw_ratios=settings.sampling.negatives != UNIFORM,
        )
        self.sharded, self.plan = shard(objective, settings.tables, ranks)
        self.dense = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(self.sharded.named_parameters())
            if parameter.requires_grad
        }
        self.optimizer = _optimizer(self.sharded, self.dense, settings)
        self.averaged = (
            None if settings.ema_decay is None else AveragedWeights(self.dense, settings.ema_decay)
        )
        stream = StreamSettings(
            batch_targets=settings.batch_targets,
            negatives=settings.negatives,
            shared_items=settings.objective.shared_items if objective.has_next_event else 0,
            sampling=settings.sampling,
            seed=settings.seed,
            shuffle_shards=settings.shuffle_shards,
            share_prefill=self.share_prefill,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self.stream = WindowStream(shards, stream)
        # Epochs differ by a batch or so, because windows differ in size.
        self.num_steps = sum(len(self.stream.epoch(epoch)) for epoch in range(settings.epochs))
        check_warmup(settings.warmup_steps, self.num_steps)
        self.managed = ManagedIds(shards.schema, ranks)
        self.progress = Progress()
        self.last_saved = "none"
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Return to the last checkpoint, if there is one."""
        found = checkpoints_of(self.folder)
        if not found:
            return
        for name, optimizer in self.optimizer.optimizers:
            if name == DENSE:
                # Only state that is there is loaded, and AdamW makes it in its first step.
                optimizer.init_state()
        state = self._state()
        load_checkpoint(found[-1], state)
        self.sharded.load_state_dict(OrderedDict(state[MODEL] | state.get(RAW, {})))
        self.optimizer.load_state_dict(state[OPTIMIZER])
        self.managed.load(load_arrays(found[-1]))
        self.progress = Progress.of(load_progress(found[-1]))
        self.last_saved = self._name(self.progress)

    def run(self, writer: SummaryWriter | None) -> None:
        """Train the remaining batches; the first rank logs them.

        At the end the model has the weights of the run's result, as its checkpoint has them.
        """
        for epoch in range(self.progress.epoch, self.settings.epochs):
            if self._is_out_of_patience():
                break
            self._run_epoch(epoch, writer)
            watched = self._validate()
            # Logged at the step of the epoch's last batch: points that are logged again after a
            # kill are those of the checkpoint's step or later.
            for name, value in watched.items():
                if writer is not None and value is not None:
                    writer.add_scalar(f"valid/{name}", value, self.progress.step - 1)
            best = self._best_after(epoch, watched)
            self.progress = Progress(epoch + 1, 0, self.progress.step, best)
            self._save(writer)
        self._take_result()

    def _validate(self) -> Values:
        with self.averaged.applied() if self.averaged else nullcontext():
            watched = evaluate_sampled(
                self.scorer(),
                self.shards,
                VALID,
                self.settings.negatives,
                share_prefill=self.share_prefill,
                ranks=self.ranks,
            )
            if self.settings.keep_best not in RANKED:
                return watched
            of_split = self.settings.ranking, self.ranks, VALID
            ranked = rank_held_out(self.scorer(), self.shards, *of_split)
            values = rank_metrics(ranked.position.tolist(), ranked.num_items).values
            return watched | {name: values[name] for name in RANKED}

    def _take_result(self) -> None:
        """Give the model the averages, or the weights of the best epoch, from their checkpoint."""
        if self.averaged is None and self.progress.best is None:
            return
        result = result_of(self.folder)
        state = {MODEL: self.sharded.state_dict()}
        load_checkpoint(result, state)
        self.sharded.load_state_dict(OrderedDict(state[MODEL]))
        self.managed.load(load_arrays(result))

    def _best_after(self, epoch: int, watched: Values) -> Best | None:
        """Return the best epoch so far, given the metrics of the one that has ended."""
        metric = self.settings.keep_best
        if metric is None:
            return None
        task = "" if metric in RANKED else self.shards.schema.tasks[0]
        value = watched[metric_name(metric, task)]
        if not is_better(metric, value, self.progress.best):
            return self.progress.best
        assert value is not None
        return Best(value, epoch, self.progress.step)

    def _is_out_of_patience(self) -> bool:
        """Whether the last epochs were no better, so that training stops before the next."""
        best, patience = self.progress.best, self.settings.patience
        if best is None or patience is None:
            return False
        num_worse = self.progress.epoch - 1 - best.epoch
        if num_worse < patience:
            return False
        logger.info(
            "%s: stopped after epoch %d: %s was best in epoch %d, %.4f",
            self.folder.name,
            self.progress.epoch,
            self.settings.keep_best,
            best.epoch + 1,
            best.value,
        )
        return True

    def scorer(self) -> Scorer:
        """Return the model's scorer of batches that are not remapped."""
        score = model_scorer(self.ranker, self.ranks.device)
        return lambda batch: score(self.managed.remapped(batch))

    def step(self, batch: Batch, *, num_trained: int | None = None) -> float:
        """Train on a batch.

        Args:
            batch: of this rank, not remapped, in host memory.
            num_trained: number of its candidates that count: 0 for a rank that has no windows and
                pads. All by default.

        Returns:
            The loss before the step, over the batches of all ranks.

        Raises:
            TrainingError: if the loss is not finite, before any weight is changed; or if the norm
                of the dense gradients is not, and they are to be clipped.
        """
        batch = self._remapped(batch, is_padding=num_trained == 0)
        batch = batch.to(self.ranks.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            first = group.setdefault(FIRST_RATE, group[LEARNING_RATE])  # type: ignore[attr-defined]
            group[LEARNING_RATE] = first * self._rate_share()  # type: ignore[index]
        self.optimizer.zero_grad()
        # Dropout depends on the step only, so that no generator's state has to be saved.
        torch.manual_seed(_seed(self.settings.seed, self.progress.step, self.ranks.rank))
        is_mixed = self.settings.precision == BFLOAT16
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=is_mixed):
            loss: Tensor = self.sharded(batch)[0]
        own = batch.labels.size(0) if num_trained is None else num_trained
        # Padding counts for nothing, unless its loss is NaN: 0 x NaN would reach all weights.
        sums = self.ranks.sum(torch.tensor([loss.item() * own, own], dtype=torch.float64))
        mean = float(sums[0] / sums[1])
        if not math.isfinite(mean):
            raise self._diverged(f"the loss is {mean}")
        # DistributedDataParallel takes the mean of the ranks' gradients.
        (loss * (self.ranks.world_size * own / float(sums[1]))).backward()
        self._clip_gradients()
        self.optimizer.step()
        if self.averaged:
            self.averaged.update(self.progress.step)
        return mean

    def _clip_gradients(self) -> None:
        """Scale the dense gradients down to ``clip_norm``.

        After the backward pass all ranks hold the same dense gradients, and tables have taken their
        step already.
        """
        if self.settings.clip_norm is None:
            return
        norm = float(nn.utils.clip_grad_norm_(self.dense.values(), self.settings.clip_norm))
        if not math.isfinite(norm):
            raise self._diverged(f"the norm of the dense gradients is {norm}")

    def _remapped(self, batch: Batch, *, is_padding: bool = False) -> Batch:
        """Give rows to the batch's managed ids; rows that change hands are drawn anew."""
        evicted = self.managed.observe(None if is_padding else batch, self.progress.step)
        for number, (column, rows) in enumerate(evicted.items()):
            seed = _seed(self.settings.seed, self.progress.step, number)
            keys = set(keys_of(self.shards.schema, column))
            configs = [one for one in self.configs if keys.intersection(one.feature_names)]
            redraw_rows(self.sharded, configs, torch.from_numpy(rows), seed)
        return self.managed.remapped(batch)

    def _run_epoch(self, epoch: int, writer: SummaryWriter | None) -> None:
        self.sharded.train()
        if self.frozen:
            self.frozen.stay_in_eval_mode()
        batches = self.stream.epoch(epoch)
        left = range(self.progress.batch, len(batches))
        title = f"{self.folder.name} epoch {epoch + 1}/{self.settings.epochs}"
        bar = tqdm(
            left, title, initial=left.start, total=len(batches), disable=not self.ranks.is_first
        )
        is_cuda = self.ranks.device.type == CUDA
        loading = replace(self.settings.loading, pin_memory=is_cuda)
        with worker_errors(), closing(batches.load(left.start, loading)) as loaded:
            started = time.monotonic()
            for index, batch in zip(bar, loaded, strict=True):
                loss = self.step(batch, num_trained=None if batches.has_own(index) else 0)
                if writer is not None:
                    num_examples = batches.num_targets(index) * (1 + self.settings.negatives)
                    per_second = num_examples / (time.monotonic() - started)
                    writer.add_scalar("train/loss", loss, self.progress.step)
                    writer.add_scalar("train/examples_per_s", per_second, self.progress.step)
                    for column, count in self.managed.num_evicted.items():
                        writer.add_scalar(f"evicted_ids/{column}", count, self.progress.step)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                step = self.progress.step + 1
                self.progress = replace(self.progress, epoch=epoch, batch=index + 1, step=step)
                # After an epoch's last batch the checkpoint is written once validation is done.
                if self._is_due() and index + 1 < len(batches):
                    self._save(writer)
                started = time.monotonic()
        # Validation reads shards of its own.
        self.stream.forget()

    def _is_due(self) -> bool:
        """Whether the first rank's clock says that a checkpoint is due; the same on every rank."""
        is_due = time.monotonic() - self.saved_at > self.settings.checkpoint_seconds
        return bool(self.ranks.sum(torch.tensor([float(is_due and self.ranks.is_first)])) > 0)

    def _rate_share(self) -> float:
        """Share of the configured learning rates in the next step."""
        return rate_share(self.progress.step, self.num_steps, self.settings.warmup_steps)

    def _diverged(self, what: str) -> TrainingError:
        share = self._rate_share()
        return TrainingError(
            f"{self.folder.name}, {self._name(self.progress)}: {what}; learning_rate is "
            f"{self.settings.learning_rate * share:.3g} there, table_learning_rate "
            f"{self.settings.tables.learning_rate * share:.3g}. Last finite checkpoint, kept in "
            f"{self.folder}: {self.last_saved}. Lower rates may help, in a folder of their own"
        )

    def _name(self, progress: Progress) -> str:
        return f"epoch {progress.epoch + 1}, batch {progress.batch + 1}"

    def _state(self) -> dict[str, Any]:
        weights = self.sharded.state_dict()
        state = {MODEL: weights, OPTIMIZER: self.optimizer.state_dict()}
        if self.averaged:
            # Whoever loads the model gets the average; training goes on with the raw weights.
            state[MODEL] = weights | self.averaged.average
            state[RAW] = {name: weights[name] for name in self.averaged.average}
        return state

    def _save(self, writer: SummaryWriter | None) -> None:
        """Write a checkpoint that a killed run finds whole or not at all."""
        state = self._state()
        broken = non_finite(local_weights(state[MODEL]))
        if any(found := self.ranks.gather(broken)):
            raise self._diverged(next(text for text in found if text))
        # Points before the checkpoint are not logged again.
        if writer is not None:
            writer.flush()
        save_checkpoint(
            self.folder,
            state,
            asdict(self.progress),
            self.ranks,
            keep=self.settings.keep_checkpoints,
            arrays=self.managed.arrays(),
        )
        self.last_saved = self._name(self.progress)
        self.saved_at = time.monotonic()


def _optimizer(
    sharded: DistributedModelParallel, dense: dict[str, nn.Parameter], settings: TrainSettings
) -> CombinedOptimizer:
    """The tables' fused optimizers, and AdamW for the dense parameters."""
    adamw = KeyedOptimizerWrapper(
        dense,
        lambda parameters: torch.optim.AdamW(
            parameters, settings.learning_rate, weight_decay=settings.weight_decay
        ),
    )
    return CombinedOptimizer([(TABLES, sharded.fused_optimizer), (DENSE, adamw)])


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
