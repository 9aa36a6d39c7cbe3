"""The training loop: TorchRec's ``DLRMTrain`` over whole windows, resumable at any batch.

Chance is seeded by epoch and batch, and a checkpoint holds the generator of the dropout, so that a
run that was killed and started again ends with the weights of one that was not.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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
from torchrec_kvshare.ranking import takes_prefixes
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
    """Where training stands: the next batch of the next epoch."""

    epoch: int = 0
    batch: int = 0


def train(
    model: DLRM, dataset: Dataset, settings: TrainSettings, folder: Path, writer: SummaryWriter
) -> None:
    """Train a model in place, from the folder's checkpoint on if there is one.

    Args:
        model: with or without a history.
        dataset: its training split is learned, its validation split watched.
        settings: how to train.
        folder: of the checkpoint; the last one is the trained model.
        writer: gets loss, NE, AUC, GAUC and examples per second.
    """
    trainer = _Trainer(model, dataset, settings, folder, writer)
    trainer.resume()
    trainer.run()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a model the weights of a folder's checkpoint."""
    model.load_state_dict(torch.load(folder / CHECKPOINT, weights_only=True)["model"])


class _Trainer:
    def __init__(
        self,
        model: DLRM,
        dataset: Dataset,
        settings: TrainSettings,
        folder: Path,
        writer: SummaryWriter,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.settings = settings
        self.folder = folder
        self.writer = writer
        self.train_model = DLRMTrain(model)
        self.share_prefill = takes_prefixes(model)
        training = np.flatnonzero(dataset.split == TRAIN)
        self.windows = windows_of(dataset, training, self.share_prefill)
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, settings))
        total = settings.epochs * len(self._epoch_batches(0))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(total, 1))
        self.progress = Progress()
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one."""
        torch.manual_seed(self.settings.seed)
        if not (self.folder / CHECKPOINT).is_file():
            return
        state = torch.load(self.folder / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        self.progress = Progress(**state["progress"])

    def run(self) -> None:
        """Train what is left."""
        for epoch in range(self.progress.epoch, self.settings.epochs):
            self._run_epoch(epoch)
            self.progress = Progress(epoch + 1, 0)
            self._save()
            watched = evaluate_sampled(
                model_scorer(self.model),
                self.dataset,
                VALID,
                self.settings.negatives,
                self.share_prefill,
            )
            for name, value in watched.items():
                self.writer.add_scalar(f"valid/{name}", value, epoch + 1)

    def _run_epoch(self, epoch: int) -> None:
        self.train_model.train()
        batches = self._epoch_batches(epoch)
        left = range(self.progress.batch, len(batches))
        title = f"{self.folder.name} epoch {epoch + 1}/{self.settings.epochs}"
        for place in (bar := tqdm(left, title, initial=left.start, total=len(batches))):
            started = time.monotonic()
            batch = self._batch(batches[place], epoch, place)
            loss = self._step(batch)
            seconds = time.monotonic() - started
            step = epoch * len(batches) + place
            self.writer.add_scalar("train/loss", loss, step)
            self.writer.add_scalar("train/examples_per_s", batch.labels.numel() / seconds, step)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.progress = Progress(epoch, place + 1)
            if time.monotonic() - self.saved_at > self.settings.checkpoint_seconds:
                self._save()

    def _step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss: Tensor = self.train_model(batch)[0]
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def _epoch_batches(self, epoch: int) -> list[Ints]:
        rng = np.random.default_rng([self.settings.seed, epoch])
        return list(batches_of(self.windows, self.settings.batch_targets, rng))

    def _batch(self, chosen: Ints, epoch: int, place: int) -> Batch:
        rng = np.random.default_rng([self.settings.seed, epoch, place])
        part: Windows = self.windows.take(chosen)
        negatives = sample_negatives(self.dataset, part.targets, self.settings.negatives, rng)
        candidates = np.concatenate([self.dataset.item[part.targets][:, None], negatives], axis=1)
        return build_batch(self.dataset, part, candidates, rng)

    def _save(self) -> None:
        """Replace the checkpoint as a whole: a killed run finds the old one or the new one."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": vars(self.progress),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, written)
        os.replace(written, self.folder / CHECKPOINT)
        self.saved_at = time.monotonic()


def _parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    of_tables = [parameter for table in tables for parameter in table.parameters()]
    known = {id(parameter) for parameter in of_tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        {"params": dense, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": of_tables, "lr": settings.table_learning_rate, "weight_decay": 0.0},
    ]
