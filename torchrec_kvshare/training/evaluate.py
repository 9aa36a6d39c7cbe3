"""Evaluate a scorer on a split: against sampled negatives, and against the whole catalogue.

A scorer returns the logits of a batch's candidates: a trained model, or popularity. Targets are
scored shard by shard and the catalogue is ranked in chunks, so that memory grows with neither. All
ranks read every shard and share its targets. Metrics are those of the targets in the order of the
whole log, so that they do not depend on its shards.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST
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

logger = logging.getLogger(__name__)

Scorer = Callable[[Batch], Tensor]  # logits [C]


class Scored(NamedTuple):
    """Targets with the logits [P, 1 + negatives] of their candidates, the first their own item.

    Attributes:
        keys: [P] index of each target's event in the whole log.
        user: [P] code of its user.
        labels: [P] float32; negatives have 0.
        logits: of its candidates.
    """

    keys: Ints
    user: Ints
    labels: Tensor
    logits: Tensor


EVALUATION_SEED = 20_240_101  # every scorer gets the same negatives
TARGETS_AT_A_TIME = 1024
CATALOGUE_ROWS_AT_A_TIME = 32_768
# Of a split that has more, evenly drawn users are scored. torchrec.metrics counts rows in float32,
# which is exact up to 2**24, and its AUC takes 60 bytes for each.
MAX_ROWS = 2**23
FIRST_CHUNK_ITEMS = 4096  # enough to rank most held-out items beyond CUTOFF


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
        return logits.squeeze(1).cpu()

    return score


def popularity_scorer(shards: Shards, num_negatives: int) -> Scorer:
    """Return a scorer that scores an item by its number of positive training events.

    Args:
        shards: their training split is counted.
        num_negatives: negatives sampled per target, so that the logits are the log odds of the
            task; with 0 they are those of the item's own events.

    Returns:
        A scorer that reads the candidate's item only; its logits are finite.
    """
    trained = np.flatnonzero(shards.num_training)
    rows, of_row = np.unique(shards.shared.item_row[trained], return_inverse=True)
    shown, positive = (
        np.append(np.bincount(of_row, weights=counts[trained], minlength=len(rows)), 0)
        for counts in (shards.num_training, shards.num_positive)
    )
    if num_negatives:
        negative = num_negatives * max(positive.sum(), 1) / len(shards.shared.known_items)
        prior = 1.0
    else:
        negative = shown - positive + 1.0
        prior = max(positive.sum(), 1) / max((shown - positive).sum(), 1)
    # With a prior an item that was never bought gets small odds, not zero.
    log_odds = np.log((positive + prior) / negative).astype(np.float32)

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
    """Compute AUC, GAUC and NE of a split's targets against sampled negatives.

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
        ``AUC``, ``GAUC``, ``NE``; None where a metric is undefined. The same on every rank.
    """
    draws = Draws(EVALUATION_SEED)
    share = _share_scored(shards, split, num_negatives)
    scored: list[Scored] = []
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
                scored.append(_scored(dataset, part.targets, logits.view(candidates.shape)))
    everyone = [one for of_rank in ranks.gather(scored) for one in of_rank]
    order = np.argsort(np.concatenate([one.keys for one in everyone]))
    user = np.concatenate([one.user for one in everyone])[order]
    logits = torch.cat([one.logits for one in everyone])[order]
    labels = torch.zeros_like(logits)
    labels[:, 0] = torch.cat([one.labels for one in everyone])[order]
    per_user = torch.from_numpy(np.unique(user, return_counts=True)[1] * (1 + num_negatives))
    return classification_metrics(torch.sigmoid(logits).flatten(), labels.flatten(), per_user)


def _share_scored(shards: Shards, split: int, num_negatives: int) -> float:
    """Return the share of users to score; 1 or more for all."""
    num_targets = sum(int((dataset.split == split).sum()) for dataset in shards)
    share = MAX_ROWS / max(1, num_targets * (1 + num_negatives))
    if share < 1:
        logger.info("evaluation scores %.1f%% of the users of a split", 100 * share)
    return share


def _scored(dataset: Dataset, targets: Ints, logits: Tensor) -> Scored:
    labels = torch.from_numpy(dataset.label[targets])
    users = dataset.user_code[dataset.event_user[targets]]
    return Scored(dataset.keys_of(targets), users, labels, logits)


def evaluate_catalogue(
    score: Scorer, shards: Shards, max_users: int | None, ranks: Ranks = ALONE
) -> Values:
    """Compute HR@10 and NDCG@10 of each user's last positive event among the whole catalogue.

    Only positive events are held out: finding an item that a user disliked is not a hit. Items that
    the user met strictly before are excluded. If the held-out item is one of them (a repurchase),
    nothing is excluded: among items the user never met, a met one would be easy to find. A held-out
    item that is not in the training split counts as not found.

    Args:
        score: the scorer to evaluate.
        shards: the last positive event of every user in their test split is held out.
        max_users: number of users to rank for, spread evenly; None for all.
        ranks: the processes that evaluate together, each some of the users; all of them must call
            this.

    Returns:
        ``HR@10`` and ``NDCG@10``; None if nothing is held out. The same on every rank.
    """
    keys = [dataset.keys_of(_last_positives(dataset)) for dataset in shards]
    held_out = np.sort(np.concatenate(keys))
    if max_users is not None and max_users < len(held_out):
        held_out = held_out[np.linspace(0, len(held_out) - 1, max_users).astype(np.int64)]
    users_at_a_time = max(1, CATALOGUE_ROWS_AT_A_TIME // len(shards.shared.known_items))
    popular_first = _popular_first(shards)
    position_by_key: dict[int, int] = {}
    for shard, of_shard in enumerate(keys):
        if not np.isin(of_shard, held_out).any():
            continue
        dataset = shards.read([shard])
        chosen = _last_positives(dataset)[np.isin(of_shard, held_out)]
        known = chosen[np.isin(dataset.item[chosen], dataset.known_items)]
        own = known[ranks.rank :: ranks.world_size]
        # As many groups on every rank: a rank that has no user left ranks one again.
        for first in range(0, -(-len(known) // ranks.world_size), users_at_a_time):
            group = own[first : first + users_at_a_time]
            asked = group if len(group) else known[:1]
            found = _positions(score, dataset, asked, popular_first, ranks)
            position_by_key |= zip(dataset.keys_of(group).tolist(), found, strict=False)
    everyone = dict(chain.from_iterable(part.items() for part in ranks.gather(position_by_key)))
    never_found = [CUTOFF] * (len(held_out) - len(everyone))
    return rank_metrics([*(everyone[key] for key in sorted(everyone)), *never_found])


def _popular_first(shards: Shards) -> Ints:
    """Return the catalogue, the items most likely to rank before a held-out one first."""
    known = shards.shared.known_items
    return known[np.argsort(-shards.num_training[known], kind="stable")]


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
