"""Evaluate a scorer on a split: against sampled negatives, and against the whole catalogue.

A scorer is anything that gives a batch of candidates their logits: a trained model, or popularity.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_kvshare.data.dataset import TEST, TRAIN, Dataset, Ints
from torchrec_kvshare.data.schema import ITEM, NUM_RESERVED_ROWS, candidate_key
from torchrec_kvshare.data.targets import (
    batches_of,
    build_batch,
    build_catalogue_batch,
    sample_negatives,
    windows_of,
)
from torchrec_kvshare.training.metrics import (
    classification_metrics,
    rank_metrics,
    rank_of_target,
)

Scorer = Callable[[Batch], Tensor]  # logits [C]

EVALUATION_SEED = 20_240_101  # every scorer meets the same negatives
TARGETS_AT_A_TIME = 1024
CATALOGUE_ROWS_AT_A_TIME = 32_768


def model_scorer(model: nn.Module) -> Scorer:
    """A ranking model as a scorer, in eval mode."""
    model.eval()

    def score(batch: Batch) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(batch.dense_features, batch.sparse_features)
        return logits.squeeze(1)

    return score


def popularity_scorer(dataset: Dataset, num_negatives: int) -> Scorer:
    """The log odds that a candidate is the positive one, from training counts alone.

    Args:
        dataset: its training split is counted.
        num_negatives: sampled for every target, so that the odds are those of the task.

    Returns:
        A scorer that looks at the candidate's item only.
    """
    trained = (dataset.split == TRAIN) & (dataset.label > 0)
    rows = dataset.item_row[dataset.item[trained]]
    counts = np.bincount(rows, minlength=dataset.schema.num_rows(ITEM))
    expected_negatives = num_negatives * len(rows) / len(dataset.known_items)
    # One pseudo-event: an item never bought gets small odds, not none.
    log_odds = torch.from_numpy(np.log((counts + 1.0) / expected_negatives)).float()
    return lambda batch: log_odds[batch.sparse_features[candidate_key(ITEM)].values()]


def evaluate_sampled(
    score: Scorer, dataset: Dataset, split: int, num_negatives: int, share_prefill: bool = True
) -> dict[str, float]:
    """AUC, GAUC and NE of every target of a split against sampled negatives.

    Args:
        score: what is evaluated.
        dataset: its targets.
        split: ``VALID`` or ``TEST``.
        num_negatives: sampled for every target.
        share_prefill: whether the scorer lets targets see prefixes of one prefill.

    Returns:
        ``AUC``, ``GAUC``, ``NE``.
    """
    rng = np.random.default_rng(EVALUATION_SEED)
    targets = np.flatnonzero(dataset.split == split)
    windows = windows_of(dataset, targets, share_prefill)
    logits, labels = [], []
    for chosen in batches_of(windows, TARGETS_AT_A_TIME, None):
        part = windows.take(chosen)
        negatives = sample_negatives(dataset, part.targets, num_negatives, rng)
        candidates = np.concatenate([dataset.item[part.targets][:, None], negatives], axis=1)
        batch = build_batch(dataset, part, candidates, None)
        logits.append(score(batch))
        labels.append(batch.labels)
    per_user = np.unique(dataset.event_user[targets], return_counts=True)[1] * (1 + num_negatives)
    return classification_metrics(
        torch.sigmoid(torch.cat(logits)), torch.cat(labels), torch.from_numpy(per_user)
    )


def evaluate_catalogue(score: Scorer, dataset: Dataset, max_users: int | None) -> dict[str, float]:
    """HR@10 and NDCG@10 of each user's last positive event among the whole catalogue.

    Where a label rule tells liked from disliked, finding what was disliked is no hit.
    Items that the user has met strictly before are excluded. If the held-out item is one of them,
    bought again, nothing is excluded: among unmet items alone it would be given away by having been
    met. A held-out item that training never met counts as not found.

    Args:
        score: what is evaluated.
        dataset: the last positive event of every user in its test split is held out.
        max_users: rank for that many users only, spread evenly; None ranks for all.

    Returns:
        ``HR@10`` and ``NDCG@10``.
    """
    held_out = _last_positives(dataset)
    if max_users is not None and max_users < len(held_out):
        held_out = held_out[np.linspace(0, len(held_out) - 1, max_users).astype(np.int64)]
    known = held_out[dataset.item_row[dataset.item[held_out]] >= NUM_RESERVED_ROWS]
    never_found = [len(dataset.known_items)] * (len(held_out) - len(known))
    users_at_a_time = max(1, CATALOGUE_ROWS_AT_A_TIME // len(dataset.known_items))
    ranks: list[int] = []
    for first in range(0, len(known), users_at_a_time):
        ranks += _ranks(score, dataset, known[first : first + users_at_a_time])
    return rank_metrics(ranks + never_found)


def _last_positives(dataset: Dataset) -> Ints:
    tested = np.flatnonzero((dataset.split == TEST) & (dataset.label > 0))
    users = dataset.event_user[tested]
    return (
        tested[np.append(np.flatnonzero(np.diff(users)), len(tested) - 1)]
        if len(tested)
        else tested
    )


def _ranks(score: Scorer, dataset: Dataset, held_out: Ints) -> list[int]:
    catalogue = dataset.known_items
    windows = windows_of(dataset, held_out)
    candidates = np.broadcast_to(catalogue, (len(held_out), len(catalogue)))
    batch = build_catalogue_batch(dataset, windows, candidates)
    scores = score(batch).view(len(held_out), len(catalogue))
    excluded = np.zeros(candidates.shape, bool)
    for row, event in enumerate(held_out):
        first = dataset.user_offsets[dataset.event_user[event]]
        seen = dataset.item[first : first + dataset.num_earlier[event]]
        if dataset.item[event] not in seen:
            excluded[row] = np.isin(catalogue, seen)
    target = torch.from_numpy(np.searchsorted(catalogue, dataset.item[held_out]))
    ranks: list[int] = rank_of_target(scores, target, torch.from_numpy(excluded)).tolist()
    return ranks
