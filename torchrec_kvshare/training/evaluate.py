"""Evaluate a scorer on a split: against sampled negatives, and against the whole catalogue.

A scorer is anything that gives a batch of candidates their logits: a trained model, or popularity.
Catalogues are ranked in chunks, so that memory does not grow with them.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from torchrec_kvshare.data.dataset import TEST, TRAIN, Dataset, Ints
from torchrec_kvshare.data.targets import (
    batches_of,
    build_batch,
    build_catalogue_batch,
    sample_negatives,
    windows_of,
)
from torchrec_kvshare.errors import TrainingError
from torchrec_kvshare.features.schema import ITEM, NUM_RESERVED_ROWS, candidate_key
from torchrec_kvshare.training.metrics import (
    CUTOFF,
    Values,
    classification_metrics,
    num_ahead,
    rank_metrics,
)

Scorer = Callable[[Batch], Tensor]  # logits [C]

EVALUATION_SEED = 20_240_101  # every scorer meets the same negatives
TARGETS_AT_A_TIME = 1024
CATALOGUE_ROWS_AT_A_TIME = 32_768
FIRST_CHUNK_ITEMS = 4096  # most held-out items are found to be far behind among them


def model_scorer(model: nn.Module) -> Scorer:
    """A ranking model as a scorer, in eval mode; scores that are not finite are a TrainingError."""
    model.eval()

    def score(batch: Batch) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(batch.dense_features, batch.sparse_features)
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("the model gives scores that are not finite: it has diverged")
        return logits.squeeze(1)

    return score


def popularity_scorer(dataset: Dataset, num_negatives: int) -> Scorer:
    """The log odds that a candidate is the positive one, from training counts alone.

    Args:
        dataset: its training split is counted.
        num_negatives: sampled for every target, so that the odds are those of the task.

    Returns:
        A scorer that looks at the candidate's item only; its scores are finite.
    """
    trained = (dataset.split == TRAIN) & (dataset.label > 0)
    rows = dataset.item_row[dataset.item[trained]]
    counts = np.bincount(rows, minlength=dataset.schema.num_rows(ITEM))
    expected_negatives = num_negatives * max(len(rows), 1) / len(dataset.known_items)
    # One pseudo-event: an item never bought gets small odds, not none.
    log_odds = torch.from_numpy(np.log((counts + 1.0) / expected_negatives)).float()
    return lambda batch: log_odds[batch.sparse_features[candidate_key(ITEM)].values()]


def evaluate_sampled(
    score: Scorer, dataset: Dataset, split: int, num_negatives: int, share_prefill: bool = True
) -> Values:
    """AUC, GAUC and NE of every target of a split against sampled negatives.

    Args:
        score: what is evaluated.
        dataset: its targets.
        split: ``VALID`` or ``TEST``.
        num_negatives: sampled for every target.
        share_prefill: whether the scorer lets targets see prefixes of one prefill.

    Returns:
        ``AUC``, ``GAUC``, ``NE``; None where one means nothing.
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


def evaluate_catalogue(score: Scorer, dataset: Dataset, max_users: int | None) -> Values:
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
        ``HR@10`` and ``NDCG@10``; None if nothing is held out.
    """
    held_out = _last_positives(dataset)
    if max_users is not None and max_users < len(held_out):
        held_out = held_out[np.linspace(0, len(held_out) - 1, max_users).astype(np.int64)]
    known = held_out[dataset.item_row[dataset.item[held_out]] >= NUM_RESERVED_ROWS]
    never_found = [CUTOFF] * (len(held_out) - len(known))
    users_at_a_time = max(1, CATALOGUE_ROWS_AT_A_TIME // len(dataset.known_items))
    popular_first = _popular_first(dataset)
    ranks: list[int] = []
    for first in range(0, len(known), users_at_a_time):
        ranks += _ranks(score, dataset, known[first : first + users_at_a_time], popular_first)
    return rank_metrics(ranks + never_found)


def _popular_first(dataset: Dataset) -> Ints:
    """The catalogue, those items first that are likely to stand before a held-out one."""
    trained = dataset.item[dataset.split == TRAIN]
    counts = np.bincount(trained, minlength=len(dataset.item_row))[dataset.known_items]
    return dataset.known_items[np.argsort(-counts, kind="stable")]


def _last_positives(dataset: Dataset) -> Ints:
    tested = np.flatnonzero((dataset.split == TEST) & (dataset.label > 0))
    users = dataset.event_user[tested]
    return (
        tested[np.append(np.flatnonzero(np.diff(users)), len(tested) - 1)]
        if len(tested)
        else tested
    )


def _ranks(score: Scorer, dataset: Dataset, held_out: Ints, catalogue: Ints) -> list[int]:
    """Places of the held-out items, from 0; from ``CUTOFF`` on a place is not counted out.

    A chunk encodes the histories anew: of a history of 256 events among 32,768 candidates that is
    1 % of the arithmetic.
    """
    windows = windows_of(dataset, held_out)
    targets = dataset.item[held_out]
    seen = [_seen_before(dataset, event) for event in held_out.tolist()]
    ahead = torch.zeros(len(held_out), dtype=torch.int64)
    for chunk in _chunks(catalogue):
        # The target beside each chunk: what is compared is computed together.
        rows = np.broadcast_to(chunk, (len(held_out), len(chunk)))
        candidates = np.concatenate([rows, targets[:, None]], axis=1)
        batch = build_catalogue_batch(dataset, windows, candidates)
        scores = score(batch).view(candidates.shape)
        excluded = chunk == targets[:, None]
        for row, items in enumerate(seen):
            excluded[row] |= np.isin(chunk, items)
        ahead += num_ahead(scores[:, :-1], scores[:, -1], torch.from_numpy(excluded))
        if bool((ahead >= CUTOFF).all()):
            break
    return ahead.tolist()


def _chunks(catalogue: Ints) -> Iterator[Ints]:
    first, num_items = 0, FIRST_CHUNK_ITEMS
    while first < len(catalogue):
        yield catalogue[first : first + num_items]
        first += num_items
        num_items = min(2 * num_items, CATALOGUE_ROWS_AT_A_TIME)


def _seen_before(dataset: Dataset, event: int) -> Ints:
    """Items that the user of an event met strictly before; none if the event's is among them."""
    first = dataset.user_offsets[dataset.event_user[event]]
    seen = dataset.item[first : first + dataset.num_earlier[event]]
    return seen[:0] if dataset.item[event] in seen else np.unique(seen)
