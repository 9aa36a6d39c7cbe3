"""Evaluate a scorer on a split against sampled negatives, or on its logged labels.

A scorer returns the logits of a batch's candidates: a trained model, or popularity. Targets are
scored shard by shard, and all ranks read every shard and share its targets. Metrics are those of
the targets in the order of the whole log, so that they do not depend on its shards.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.draws import EVALUATION_SEED, Draws
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.split_report import NAME_BY_SPLIT
from torchrec_kvshare.data.targets import (
    batches_of,
    build_batch,
    sample_negatives,
    windows_of,
)
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.features.schema import ITEM, candidate_key
from torchrec_kvshare.training.metrics import Measures, Values, classification_metrics
from torchrec_kvshare.training.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

Scorer = Callable[[Batch], Tensor]  # logits [C, tasks]


class Scored(NamedTuple):
    """Targets with the logits of their candidates, the first their own item.

    Attributes:
        keys: [P] index of each target's event in the whole log.
        user: [P] code of its user.
        num_earlier: [P] number of the user's strictly earlier events.
        labels: [P, tasks] float32, NaN for none; negatives have 0.
        logits: [P, 1 + negatives, tasks] of its candidates.
        tasks: their names.
    """

    keys: Ints
    user: Ints
    num_earlier: Ints
    labels: Tensor
    logits: Tensor
    tasks: tuple[str, ...]

    def take(self, chosen: Ints) -> "Scored":
        """Return some of the targets, in the given order."""
        rows = torch.from_numpy(chosen)
        return Scored(
            self.keys[chosen],
            self.user[chosen],
            self.num_earlier[chosen],
            self.labels[rows],
            self.logits[rows],
            self.tasks,
        )


TARGETS_AT_A_TIME = 1024
BAR_DELAY_S = 1.0  # seconds without a progress bar: a short evaluation shows none
# Of a split that has more, evenly drawn users are scored. torchrec.metrics counts rows in float32,
# which is exact up to 2**24, and its AUC takes 60 bytes for each.
MAX_ROWS = 2**23


def model_scorer(model: nn.Module, device: torch.device = ALONE.device) -> Scorer:
    """Put a model in eval mode and return its scorer, which raises TrainingError for NaN.

    Args:
        model: it lies on ``device``.
        device: batches are moved to it, and logits from it.
    """
    model.eval()

    def score(batch: Batch) -> Tensor:
        batch = batch.to(device)
        with torch.no_grad():
            logits: Tensor = model(batch.dense_features, batch.sparse_features)
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("the model gives scores that are not finite: it has diverged")
        return logits.cpu()

    return score


def popularity_scorer(shards: Shards, num_negatives: int) -> Scorer:
    """Return a scorer that scores an item for each task by its positive training events.

    Args:
        shards: their training split is counted.
        num_negatives: negatives sampled per target, so that the logits are the log odds of the
            task; with 0 they are those of the item's own events.

    Returns:
        A scorer that reads the candidate's item only; its logits are finite.
    """
    trained = np.flatnonzero(shards.num_training)
    rows, of_row = np.unique(shards.shared.item_row[trained], return_inverse=True)
    by_task = []
    for by_item in zip(shards.num_positive.T, shards.num_negative.T, strict=True):
        positive, negative = (
            np.append(np.bincount(of_row, weights=counts[trained], minlength=len(rows)), 0)
            for counts in by_item
        )
        if num_negatives:
            negative = num_negatives * max(positive.sum(), 1) / len(shards.shared.known_items)
            prior = 1.0
        else:
            prior = max(positive.sum(), 1) / max(negative.sum(), 1)
            negative = negative + 1.0
        # With a prior an item that was never bought gets small odds, not zero.
        by_task.append(np.log((positive + prior) / negative))
    log_odds = np.stack(by_task, axis=1).astype(np.float32)  # [rows, tasks]

    def score(batch: Batch) -> Tensor:
        candidates = batch.sparse_features[candidate_key(ITEM)].values().numpy()
        found = np.searchsorted(rows, candidates)
        is_trained = np.append(rows, -1)[found] == candidates
        return torch.from_numpy(log_odds[np.where(is_trained, found, len(rows))])

    return score


def evaluate_sampled(
    score: Scorer,
    shards: Shards,
    split: int,
    num_negatives: int,
    *,
    share_prefill: bool = True,
    ranks: Ranks = ALONE,
) -> Values:
    """Compute AUC, GAUC, NE and calibration of a split's targets against sampled negatives.

    Args:
        score: the scorer to evaluate.
        shards: hold the targets.
        split: ``VALID`` or ``TEST``.
        num_negatives: negatives sampled per target.
        share_prefill: whether targets of a user may see prefixes of one prefill.
        ranks: the processes that evaluate together; all of them must call this.

    Returns:
        ``AUC``, ``GAUC``, ``NE`` and ``calibration`` by task; None where a metric is undefined. The
        same on every rank.
    """
    measures = sampled_metrics(
        score_split(score, shards, split, num_negatives, share_prefill=share_prefill, ranks=ranks)
    )
    measures.log_undefined()
    return measures.values


def score_split(
    score: Scorer,
    shards: Shards,
    split: int,
    num_negatives: int,
    *,
    share_prefill: bool = True,
    ranks: Ranks = ALONE,
) -> Scored:
    """Score a split's targets and their sampled negatives.

    Targets and negatives are ``MAX_ROWS`` or about as many: of a larger split evenly drawn users.

    Args:
        score: the scorer to evaluate.
        shards: hold the targets.
        split: ``VALID`` or ``TEST``.
        num_negatives: negatives sampled per target.
        share_prefill: whether targets of a user may see prefixes of one prefill.
        ranks: the processes that evaluate together, each some of the windows; all of them must call
            this.

    Returns:
        The targets in the order of the whole log, the same on every rank.
    """
    draws = Draws(EVALUATION_SEED)
    num_targets = sum(int((dataset.split == split).sum()) for dataset in shards)
    share = _share_scored(num_targets, num_negatives)
    scored = [_no_targets(num_negatives, shards.schema.tasks)]
    bar = progress_bar(NAME_BY_SPLIT[split], int(num_targets * min(1, share)), "target", ranks)
    for dataset in shards:
        targets = np.flatnonzero(dataset.split == split)
        if share < 1:
            is_drawn = draws.uniform(dataset.user_code) < share
            targets = targets[is_drawn[dataset.event_user[targets]]]
        windows = windows_of(dataset, targets, share_prefill=share_prefill)
        for chosen in batches_of(windows.num_targets, TARGETS_AT_A_TIME, None):
            own = chosen[ranks.rank :: ranks.world_size]
            # A sharded model's ranks call it together: a rank without windows scores one again.
            part = windows.take(own if len(own) else chosen[:1])
            negatives = sample_negatives(dataset, part.targets, num_negatives, draws)
            candidates = np.concatenate([dataset.item[part.targets][:, None], negatives], axis=1)
            logits = score(build_batch(dataset, part, candidates, None))
            if len(own):
                logits = logits.view(*candidates.shape, -1)
                scored.append(_scored(dataset, part.targets, logits))
            bar.update(int(windows.num_targets[chosen].sum()))
    bar.close()
    everyone = _joined([one for of_rank in ranks.gather(scored) for one in of_rank])
    return everyone.take(np.argsort(everyone.keys))


def sampled_metrics(scored: Scored) -> Measures:
    """Compute AUC, GAUC, NE and calibration of scored targets, of every task.

    A target without a label for a task is left out there, with its negatives.

    Args:
        scored: in the order of the log.
    """
    probabilities = torch.sigmoid(scored.logits)
    measures = Measures({}, {})
    for number, task in enumerate(scored.tasks):
        of_targets = scored.labels[:, number]
        has_label = ~of_targets.isnan()
        labels = torch.zeros(int(has_label.sum()), scored.logits.shape[1])
        labels[:, 0] = of_targets[has_label]
        per_user = np.unique(scored.user[has_label.numpy()], return_counts=True)[1]
        found = classification_metrics(
            probabilities[has_label, :, number].flatten(),
            labels.flatten(),
            torch.from_numpy(per_user * labels.shape[1]),
        )
        measures |= found.of_task(task)
    return measures


def progress_bar(title: str, total: int, unit: str, ranks: Ranks) -> "tqdm[NoReturn]":
    """Return the progress bar of an evaluation; only the first rank shows it."""
    return tqdm(desc=title, total=total, unit=unit, delay=BAR_DELAY_S, disable=not ranks.is_first)


def _share_scored(num_targets: int, num_negatives: int) -> float:
    """Return the share of users to score; 1 or more for all."""
    share = MAX_ROWS / max(1, num_targets * (1 + num_negatives))
    if share < 1:
        logger.info("evaluation scores %.1f%% of the users of a split", 100 * share)
    return share


def _scored(dataset: Dataset, targets: Ints, logits: Tensor) -> Scored:
    return Scored(
        keys=dataset.keys_of(targets),
        user=dataset.user_code[dataset.event_user[targets]],
        num_earlier=dataset.num_earlier[targets],
        labels=torch.from_numpy(dataset.labels[targets]),
        logits=logits,
        tasks=dataset.schema.tasks,
    )


def _no_targets(num_negatives: int, tasks: tuple[str, ...]) -> Scored:
    none = np.zeros(0, np.int64)
    logits = torch.zeros(0, 1 + num_negatives, len(tasks))
    return Scored(none, none, none, logits[:, 0], logits, tasks)


def _joined(parts: list[Scored]) -> Scored:
    return Scored(
        keys=np.concatenate([part.keys for part in parts]),
        user=np.concatenate([part.user for part in parts]),
        num_earlier=np.concatenate([part.num_earlier for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        tasks=parts[0].tasks,
    )
