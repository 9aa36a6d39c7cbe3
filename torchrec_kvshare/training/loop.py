"""The training loop: TorchRec's ``DLRMTrain`` over whole windows, resumable at any batch.

Embedding tables get sparse gradients and SparseAdam, so that the cost of a step grows with its
batch, not with the catalogue; dense parameters get AdamW. Sampling is seeded by epoch and batch,
and a checkpoint holds the dropout's generator state, so that a run that was killed and restarted
ends with the weights and the TensorBoard curves of an uninterrupted one.
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
        learning_rate: first rate of AdamW on dense parameters; falls to zero along a half cosine.
        table_learning_rate: the same of SparseAdam on embedding tables, whose rows get few
            gradients each.
        weight_decay: of AdamW on dense parameters; on tables it would shrink rows that
            no batch holds.
        batch_targets: targets per batch, each with its negatives.
        negatives: negatives sampled per target.
        seed: of negatives, order and dropout.
        checkpoint_seconds: longest time between two checkpoints, in seconds.
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
    """How far training has come.

    Attributes:
        epoch: epoch of the next batch, from 0; earlier epochs are trained and validated.
        batch: index of the next batch in its epoch.
        step: batches trained in all epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0


def train(
    model: DLRM, dataset: Dataset, settings: TrainSettings, folder: Path, log_folder: Path
) -> None:
    """Train a model in place, resuming from the folder's checkpoint if there is one.

    Args:
        model: with or without a history.
        dataset: the model is trained on its training split and evaluated on its validation split.
        settings: how to train.
        folder: holds the checkpoint; the last one is the trained model.
        log_folder: gets loss and examples per second by batch, and NE, AUC and GAUC by epoch, for
            TensorBoard.

    Raises:
        TrainingError: at the first loss or weight that is not finite; the checkpoint before it
            stays.
    """
    trainer = Trainer(model, dataset, settings, folder)
    trainer.resume()
    # Points that a killed run logged after its checkpoint are logged again and replaced.
    with open_writer(log_folder, trainer.progress.step) as writer:
        trainer.run(writer)


def open_writer(folder: Path, purge_step: int) -> SummaryWriter:
    """Open a writer whose points replace the folder's points from ``purge_step`` on.

    TensorBoard reads event files in the order of their names. A name starts with the second it was
    opened in, followed by numbers that sort as text, so each file needs a second of its own.
    """
    seconds = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while f"{int(time.time()):010d}" in seconds:
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=purge_step)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a folder's checkpoint into a model.

    Raises:
        TrainingError: if a weight is not finite.
    """
    weights = torch.load(folder / CHECKPOINT, weights_only=True)["model"]
    if broken := non_finite(weights):
        raise TrainingError(f"{folder / CHECKPOINT} cannot be used: {broken}")
    model.load_state_dict(weights)


def non_finite(weights: dict[str, Tensor]) -> str:
    """Describe the first tensor with a NaN or an infinity; empty if all tensors are finite.

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
    """A model in training, with its batches, optimizers and progress.

    Args:
        model: trained in place; its tables get sparse gradients.
        dataset: the data to train on.
        settings: how to train.
        folder: holds the checkpoint.
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
        self.windows = windows_of(dataset, training, share_prefill=self.share_prefill)
        self.optimizers = _optimizers(model, settings)
        # Windows differ in size, so epochs differ by a batch or so.
        total_steps = sum(len(self.epoch_batches(epoch)) for epoch in range(settings.epochs))
        self.schedules = [CosineAnnealingLR(one, total_steps) for one in self.optimizers]
        self.progress = Progress()
        self.last_saved = "none"
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Load the last checkpoint, if there is one."""
        torch.manual_seed(self.settings.seed)
        if not (self.folder / CHECKPOINT).is_file():
            return
        state = torch.load(self.folder / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        for one, saved in zip(self._stateful(), state["optimizers"], strict=True):
            one.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        self.progress = Progress(**state["progress"])
        self.last_saved = _position(self.progress)

    def run(self, writer: SummaryWriter) -> None:
        """Train the remaining epochs, validating after each."""
        for epoch in range(self.progress.epoch, self.settings.epochs):
            self._run_epoch(epoch, writer)
            values = evaluate_sampled(
                model_scorer(self.model),
                self.dataset,
                VALID,
                self.settings.negatives,
                share_prefill=self.share_prefill,
            )
            # Logged at the step of the epoch's last batch: a run that was killed logs again from
            # its checkpoint's step on.
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(f"valid/{name}", value, self.progress.step - 1)
            self.progress = Progress(epoch + 1, 0, self.progress.step)
            self._save(writer)

    def step(self, batch: Batch) -> float:
        """Take one optimizer step on a batch; return the loss before it.

        Raises:
            TrainingError: if the loss is not finite; the weights are unchanged then.
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
        """Return the windows of each batch of an epoch."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        return list(batches_of(self.windows, self.settings.batch_targets, rng))

    def batch(self, chosen: Ints, epoch: int, index: int) -> Batch:
        """Build the batch of some windows; its index in the epoch seeds its negatives."""
        rng = np.random.default_rng([self.settings.seed, epoch, index])
        part: Windows = self.windows.take(chosen)
        negatives = sample_negatives(self.dataset, part.targets, self.settings.negatives, rng)
        candidates = np.concatenate([self.dataset.item[part.targets][:, None], negatives], axis=1)
        return build_batch(self.dataset, part, candidates, rng)

    def _run_epoch(self, epoch: int, writer: SummaryWriter) -> None:
        self.train_model.train()
        batches = self.epoch_batches(epoch)
        remaining = range(self.progress.batch, len(batches))
        title = f"{self.folder.name} epoch {epoch + 1}/{self.settings.epochs}"
        bar = tqdm(remaining, title, initial=remaining.start, total=len(batches))
        for index in bar:
            started = time.monotonic()
            batch = self.batch(batches[index], epoch, index)
            loss = self.step(batch)
            seconds = time.monotonic() - started
            writer.add_scalar("train/loss", loss, self.progress.step)
            writer.add_scalar(
                "train/examples_per_s", batch.labels.numel() / seconds, self.progress.step
            )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.progress = Progress(epoch, index + 1, self.progress.step + 1)
            # Not after the last batch: an epoch ends with its validation.
            is_due = time.monotonic() - self.saved_at > self.settings.checkpoint_seconds
            if is_due and index + 1 < len(batches):
                self._save(writer)

    def _diverged(self, what: str) -> TrainingError:
        rates = [f"{one.param_groups[0]['lr']:.3g}" for one in self.optimizers]
        return TrainingError(
            f"{self.folder.name}, {_position(self.progress)}: {what}; learning_rate is "
            f"{rates[0]} there, table_learning_rate {rates[1]}. Last finite checkpoint, kept in "
            f"{self.folder}: {self.last_saved}. Try lower rates, with another output"
        )

    def _stateful(self) -> list[Any]:
        return [*self.optimizers, *self.schedules]

    def _save(self, writer: SummaryWriter) -> None:
        """Replace the checkpoint atomically: a killed run finds the old one or the new one."""
        weights = self.model.state_dict()
        if broken := non_finite(weights):
            raise self._diverged(broken)
        state: dict[str, Any] = {
            "model": weights,
            "optimizers": [one.state_dict() for one in self._stateful()],
            "rng": torch.get_rng_state(),
            "progress": vars(self.progress),
        }
        # Points logged before the checkpoint are not logged again.
        writer.flush()
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, written)
        os.replace(written, self.folder / CHECKPOINT)
        self.last_saved = _position(self.progress)
        self.saved_at = time.monotonic()


def _position(progress: Progress) -> str:
    return f"epoch {progress.epoch + 1}, batch {progress.batch + 1}"


def _optimizers(model: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Return AdamW for dense parameters and SparseAdam, which updates only a batch's table rows."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    for table in tables:
        table.sparse = True
    sparse = [parameter for table in tables for parameter in table.parameters()]
    sparse_ids = {id(parameter) for parameter in sparse}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in sparse_ids]
    return [
        torch.optim.AdamW(dense, settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.SparseAdam(sparse, settings.table_learning_rate),
    ]
