"""The training loop: TorchRec's ``DLRMTrain`` over whole windows, resumable at any batch.

Embedding tables get sparse gradients and a sparse Adam, so that a step costs what its batch holds
and not what the catalogue holds; the rest gets AdamW. Chance is seeded by epoch and batch, and a
checkpoint holds the generator of the dropout, so that a run that was killed and started again ends
with the weights, and the TensorBoard curves, of one that was not.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.tensorboard import SummaryWriter
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from tqdm import tqdm

from torchrec_kvshare.data.dataset import TRAIN, VALID, Dataset, Ints
from torchrec_kvshare.data.targets import (
    Windows,
    batches_of,
    build_batch,
    sample_negatives,
    windows_of,
)
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.model.ranking import takes_prefixes
from torchrec_kvshare.training.evaluate import evaluate_sampled, model_scorer

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the training split.
        learning_rate: of AdamW on the dense parts, falling to zero by a half cosine.
        table_learning_rate: the same for embedding tables, whose rows see few gradients each.
        weight_decay: of AdamW on the dense parts; on tables it would wear down rows that nobody
            meets.
        batch_targets: targets in a batch, each with its negatives.
        negatives: sampled for every target.
        seed: of everything drawn.
        checkpoint_seconds: most time between two checkpoints.
    """

    epochs: int
    learning_rate: float
    table_learning_rate: float
    weight_decay: float
    batch_targets: int
    negatives: int
    seed: int
    checkpoint_seconds: float


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        epoch: of the next batch; the epochs before it are validated too.
        batch: the next one of the epoch.
        step: batches done in all epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0


def train(
    model: DLRM, dataset: Dataset, settings: TrainSettings, folder: Path, log_folder: Path
) -> None:
    """Train a model in place, from the folder's checkpoint on if there is one.

    Args:
        model: with or without a history.
        dataset: its training split is learned, its validation split watched.
        settings: how to train.
        folder: of the checkpoint; the last one is the trained model.
        log_folder: gets loss, NE, AUC, GAUC and examples per second for TensorBoard, by batch.

    Raises:
        TrainingError: at the first loss or weight that is not finite; the checkpoint before it
            stays.
    """
    trainer = Trainer(model, dataset, settings, folder)
    trainer.resume()
    # What a killed run logged beyond its checkpoint is logged again: TensorBoard drops the first.
    with open_writer(log_folder, trainer.progress.step) as writer:
        trainer.run(writer)


def open_writer(folder: Path, purge_step: int) -> SummaryWriter:
    """A writer whose points from a step on take the place of those that the folder has.

    TensorBoard reads event files in the order of their names, which begin with a second and go on
    with numbers that are ordered as text: a new file needs a second of its own.
    """
    seconds = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while f"{int(time.time()):010d}" in seconds:
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=purge_step)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of a folder's checkpoint.

    Raises:
        TrainingError: if one of them is not finite.
    """
    weights = torch.load(folder / CHECKPOINT, weights_only=True)["model"]
    if broken := non_finite(weights):
        raise TrainingError(f"{folder / CHECKPOINT} cannot be used: {broken}")
    model.load_state_dict(weights)


def non_finite(weights: dict[str, Tensor]) -> str:
    """Name the first tensor that has a NaN or an infinity; empty if all are finite.

    Example:
        >>> non_finite({"bias": torch.tensor([1.0, float("nan")])})
        '1 of the 2 values of bias are not finite'
    """
    for name, tensor in weights.items():
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            return f"{int((~finite).sum())} of the {finite.numel()} values of {name} are not finite"
    return ""


class Trainer:
    """A model in training: its batches, its optimizers, and where it stands.

    Args:
        model: trained in place; its tables get sparse gradients.
        dataset: what it learns.
        settings: how.
        folder: of the checkpoint.
    """

    def __init__(
        self, model: DLRM, dataset: Dataset, settings: TrainSettings, folder: Path
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.settings = settings
        self.folder = folder
        self.train_model = DLRMTrain(model)
        self.share_prefill = takes_prefixes(model)
        training = np.flatnonzero(dataset.split == TRAIN)
        self.windows = windows_of(dataset, training, self.share_prefill)
        self.optimizers = _optimizers(model, settings)
        # Epochs differ by a batch or so: windows are not of equal size.
        total = sum(len(self.epoch_batches(epoch)) for epoch in range(settings.epochs))
        self.schedules = [CosineAnnealingLR(one, total) for one in self.optimizers]
        self.progress = Progress()
        self.saved = "none"
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one."""
        torch.manual_seed(self.settings.seed)
        if not (self.folder / CHECKPOINT).is_file():
            return
        state = torch.load(self.folder / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        for one, saved in zip(self._stateful(), state["optimizers"], strict=True):
            one.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        self.progress = Progress(**state["progress"])
        self.saved = self._place(self.progress)

    def run(self, writer: SummaryWriter) -> None:
        """Train what is left."""
        for epoch in range(self.progress.epoch, self.settings.epochs):
            self._run_epoch(epoch, writer)
            watched = evaluate_sampled(
                model_scorer(self.model),
                self.dataset,
                VALID,
                self.settings.negatives,
                self.share_prefill,
            )
            # At the step of the epoch's last batch: what is logged again after a kill is what
            # stands at the checkpoint's step or later.
            for name, value in watched.items():
                if value is not None:
                    writer.add_scalar(f"valid/{name}", value, self.progress.step - 1)
            self.progress = Progress(epoch + 1, 0, self.progress.step)
            self._save(writer)

    def step(self, batch: Batch) -> float:
        """Learn from a batch: its loss before.

        Raises:
            TrainingError: if the loss is not finite; nothing is learned then.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss: Tensor = self.train_model(batch)[0]
        if not math.isfinite(loss.item()):
            raise self._diverged(f"the loss is {loss.item()}")
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        return loss.item()

    def epoch_batches(self, epoch: int) -> list[Ints]:
        """The windows of each batch of an epoch."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        return list(batches_of(self.windows, self.settings.batch_targets, rng))

    def batch(self, chosen: Ints, epoch: int, place: int) -> Batch:
        """The batch of some windows, with the negatives of its place in the epoch."""
        rng = np.random.default_rng([self.settings.seed, epoch, place])
        part: Windows = self.windows.take(chosen)
        negatives = sample_negatives(self.dataset, part.targets, self.settings.negatives, rng)
        candidates = np.concatenate([self.dataset.item[part.targets][:, None], negatives], axis=1)
        return build_batch(self.dataset, part, candidates, rng)

    def _run_epoch(self, epoch: int, writer: SummaryWriter) -> None:
        self.train_model.train()
        batches = self.epoch_batches(epoch)
        left = range(self.progress.batch, len(batches))
        title = f"{self.folder.name} epoch {epoch + 1}/{self.settings.epochs}"
        for place in (bar := tqdm(left, title, initial=left.start, total=len(batches))):
            started = time.monotonic()
            batch = self.batch(batches[place], epoch, place)
            loss = self.step(batch)
            seconds = time.monotonic() - started
            writer.add_scalar("train/loss", loss, self.progress.step)
            writer.add_scalar(
                "train/examples_per_s", batch.labels.numel() / seconds, self.progress.step
            )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.progress = Progress(epoch, place + 1, self.progress.step + 1)
            # Not after the last batch: an epoch is done when it is validated.
            is_due = time.monotonic() - self.saved_at > self.settings.checkpoint_seconds
            if is_due and place + 1 < len(batches):
                self._save(writer)

    def _diverged(self, what: str) -> TrainingError:
        rates = [f"{one.param_groups[0]['lr']:.3g}" for one in self.optimizers]
        return TrainingError(
            f"{self.folder.name}, {self._place(self.progress)}: {what}; learning_rate is "
            f"{rates[0]} there, table_learning_rate {rates[1]}. Last finite checkpoint, kept in "
            f"{self.folder}: {self.saved}. Lower rates may help, in a folder of their own"
        )

    def _place(self, progress: Progress) -> str:
        return f"epoch {progress.epoch + 1}, batch {progress.batch + 1}"

    def _stateful(self) -> list[Any]:
        return [*self.optimizers, *self.schedules]

    def _save(self, writer: SummaryWriter) -> None:
        """Replace the checkpoint as a whole: a killed run finds the old one or the new one."""
        weights = self.model.state_dict()
        if broken := non_finite(weights):
            raise self._diverged(broken)
        state: dict[str, Any] = {
            "model": weights,
            "optimizers": [one.state_dict() for one in self._stateful()],
            "rng": torch.get_rng_state(),
            "progress": vars(self.progress),
        }
        # What was logged before the checkpoint will not be logged again.
        writer.flush()
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, written)
        os.replace(written, self.folder / CHECKPOINT)
        self.saved = self._place(self.progress)
        self.saved_at = time.monotonic()


def _optimizers(model: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW of the dense parts, and Adam of just those table rows that a batch holds."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    for table in tables:
        table.sparse = True
    of_tables = [parameter for table in tables for parameter in table.parameters()]
    known = {id(parameter) for parameter in of_tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        torch.optim.AdamW(dense, settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.SparseAdam(of_tables, settings.table_learning_rate),
    ]
