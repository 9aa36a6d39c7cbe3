"""Evaluate a scorer on a split: against sampled negatives, and against the whole catalogue.

A scorer returns the logits of a batch's candidates: a trained model, or popularity. The catalogue
is ranked in chunks, so that memory does not grow with it.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_kvshare.data.dataset import TEST, TRAIN, Dataset, Ints
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.targets import (
    batches_of,
    build_batch,
    build_catalogue_batch,
    sample_negatives,
    windows_of,
)
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.features.schema import ITEM, candidate_key
from torchrec_kvshare.training.metrics import (
    CUTOFF,
    Values,
    classification_metrics,
    num_ahead,
    rank_metrics,
)
from torchrec_kvshare.training.ranks import ALONE, Ranks

Scorer = Callable[[Batch], Tensor]  # logits [C]


class Scored(NamedTuple):
    """Targets with the logits and labels [P, 1 + negatives] of their candidates."""

    targets: Ints
    logits: Tensor
    labels: Tensor


EVALUATION_SEED = 20_240_101  # every scorer gets the same negatives
TARGETS_AT_A_TIME = 1024
CATALOGUE_ROWS_AT_A_TIME = 32_768
FIRST_CHUNK_ITEMS = 4096  # enough to rank most held-out items beyond CUTOFF


def model_scorer(model: nn.Module) -> Scorer:
    """Put a model in eval mode and return its scorer, which raises TrainingError for NaN."""
    model.eval()

    def score(batch: Batch) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(batch.dense_features, batch.sparse_features)
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("the model gives scores that are not finite: it has diverged")
        return logits.squeeze(1)

    return score


def popularity_scorer(dataset: Dataset, num_negatives: int) -> Scorer:
    """Return a scorer that scores an item by its number of positive training events.

    Args:
        dataset: its training split is counted.
        num_negatives: negatives per target, so that the logits are the log odds of the task.

    Returns:
        A scorer that reads the candidate's item only; its logits are finite.
    """
    trained = (dataset.split == TRAIN) & (dataset.label > 0)
    rows, counts = np.unique(dataset.item_row[dataset.item[trained]], return_counts=True)
    expected_negatives = num_negatives * max(counts.sum(), 1) / len(dataset.known_items)
    # One pseudo-event: an item never bought gets small odds, not zero.
    log_odds = np.log((np.append(counts, 0) + 1.0) / expected_negatives).astype(np.float32)

    def score(batch: Batch) -> Tensor:
        candidates = batch.sparse_features[candidate_key(ITEM)].values().numpy()
        found = np.searchsorted(rows, candidates)
        is_trained = np.append(rows, -1)[found] == candidates
        return torch.from_numpy(log_odds[np.where(is_trained, found, len(rows))])

    return score


def evaluate_sampled(
    score: Scorer,
    dataset: Dataset,
    split: int,
    num_negatives: int,
    *,
    share_prefill: bool = True,
    ranks: Ranks = ALONE,
) -> Values:
    """Compute AUC, GAUC and NE of every target of a split against sampled negatives.

    Args:
        score: the scorer to evaluate.
        dataset: holds the targets.
        split: ``VALID`` or ``TEST``.
        num_negatives: negatives sampled per target.
        share_prefill: whether targets of a user may see prefixes of one prefill.
        ranks: the processes that evaluate together, each the targets of its users; all of them must
            call this.

    Returns:
        ``AUC``, ``GAUC``, ``NE``; None where a metric is undefined. The same on every rank.
    """
    draws = Draws(EVALUATION_SEED)
    targets = np.flatnonzero(dataset.split == split)
    windows = windows_of(dataset, targets, share_prefill=share_prefill)
    scored: list[Scored] = []
    for chosen in batches_of(windows, TARGETS_AT_A_TIME, None):
        own = chosen[windows.user[chosen] % ranks.world_size == ranks.rank]
        # A sharded model's ranks call it together: a rank without targets scores some again.
        part = windows.take(own if len(own) else chosen[:1])
        negatives = sample_negatives(dataset, part.targets, num_negatives, draws)
        candidates = np.concatenate([dataset.item[part.targets][:, None], negatives], axis=1)
        batch = build_batch(dataset, part, candidates, None)
        logits = score(batch)
        if len(own):
            rows = (len(part.targets), 1 + num_negatives)
            scored.append(Scored(part.targets, logits.view(rows), batch.labels.view(rows)))
    everyone = [one for of_rank in ranks.gather(scored) for one in of_rank]
    order = np.argsort(np.concatenate([one.targets for one in everyone]))
    logits = torch.cat([one.logits for one in everyone])[order].flatten()
    labels = torch.cat([one.labels for one in everyone])[order].flatten()
    per_user = np.unique(dataset.event_user[targets], return_counts=True)[1] * (1 + num_negatives)
    return classification_metrics(torch.sigmoid(logits), labels, torch.from_numpy(per_user))


def evaluate_catalogue(
    score: Scorer, dataset: Dataset, max_users: int | None, ranks: Ranks = ALONE
) -> Values:
    """Compute HR@10 and NDCG@10 of each user's last positive event among the whole catalogue.

    Only positive events are held out: finding an item that a user disliked is not a hit. Items that
    the user met strictly before are excluded. If the held-out item is one of them (a repurchase),
    nothing is excluded: among items the user never met, a met one would be easy to find. A held-out
    item that is not in the training split counts as not found.

    Args:
        score: the scorer to evaluate.
        dataset: the last positive event of every user in its test split is held out.
        max_users: number of users to rank for, spread evenly; None for all.
        ranks: the processes that evaluate together, each some of the users; all of them must call
            this.

    Returns:
        ``HR@10`` and ``NDCG@10``; None if nothing is held out. The same on every rank.
    """
    held_out = _last_positives(dataset)
    if max_users is not None and max_users < len(held_out):
        held_out = held_out[np.linspace(0, len(held_out) - 1, max_users).astype(np.int64)]
    known = held_out[np.isin(dataset.item[held_out], dataset.known_items)]
    never_found = [CUTOFF] * (len(held_out) - len(known))
    users_at_a_time = max(1, CATALOGUE_ROWS_AT_A_TIME // len(dataset.known_items))
    popular_first = _popular_first(dataset)
    own = known[ranks.rank :: ranks.world_size]
    positions: list[int] = []
    # As many groups on every rank: a rank that has no user left ranks one again.
    for first in range(0, -(-len(known) // ranks.world_size), users_at_a_time):
        group = own[first : first + users_at_a_time]
        found = _positions(score, dataset, group if len(group) else known[:1], popular_first, ranks)
        positions += found[: len(group)]
    return rank_metrics([*chain.from_iterable(ranks.gather(positions)), *never_found])


def _popular_first(dataset: Dataset) -> Ints:
    """Return the catalogue, the items most likely to rank before a held-out one first."""
    trained = dataset.item[dataset.split == TRAIN]
    counts = np.bincount(trained, minlength=len(dataset.item_row))[dataset.known_items]
    return dataset.known_items[np.argsort(-counts, kind="stable")]


def _last_positives(dataset: Dataset) -> Ints:
    """Return each user's last positive event of the test split."""
    tested = np.flatnonzero((dataset.split == TEST) & (dataset.label > 0))
    users = dataset.event_user[tested]
    return (
        tested[np.append(np.flatnonzero(np.diff(users)), len(tested) - 1)]
        if len(tested)
        else tested
    )


def _positions(
    score: Scorer, dataset: Dataset, held_out: Ints, catalogue: Ints, ranks: Ranks
) -> list[int]:
    """Return positions of the held-out items, from 0; ``CUTOFF`` or more is a lower bound.

    Every chunk encodes the histories again: 1 % of the arithmetic for a history of 256 events
    among 32,768 candidates.
    """
    windows = windows_of(dataset, held_out)
    targets = dataset.item[held_out]
    seen = [_seen_before(dataset, event) for event in held_out.tolist()]
    ahead = torch.zeros(len(held_out), dtype=torch.int64)
    for chunk in _chunks(catalogue):
        # Score the target with each chunk: scores to compare are computed in one batch.
        rows = np.broadcast_to(chunk, (len(held_out), len(chunk)))
        candidates = np.concatenate([rows, targets[:, None]], axis=1)
        batch = build_catalogue_batch(dataset, windows, candidates)
        scores = score(batch).view(candidates.shape)
        excluded = chunk == targets[:, None]
        for row, items in enumerate(seen):
            excluded[row] |= np.isin(chunk, items)
        ahead += num_ahead(scores[:, :-1], scores[:, -1], torch.from_numpy(excluded))
        if not ranks.sum((ahead < CUTOFF).sum()):
            break
    return ahead.tolist()


def _chunks(catalogue: Ints) -> Iterator[Ints]:
    first, num_items = 0, FIRST_CHUNK_ITEMS
    while first < len(catalogue):
        yield catalogue[first : first + num_items]
        first += num_items
        num_items = min(2 * num_items, CATALOGUE_ROWS_AT_A_TIME)


def _seen_before(dataset: Dataset, event: int) -> Ints:
    """Return items that a user met strictly before an event, or none if its item is among them."""
    first = dataset.user_offsets[dataset.event_user[event]]
    seen = dataset.item[first : first + dataset.num_earlier[event]]
    return seen[:0] if dataset.item[event] in seen else np.unique(seen)
