"""Rank each user's held-out item among the catalogue, or among candidates drawn from it.

A user's last event of the test or validation split that is positive for the first task is held out,
and items are ranked by that task's scores: finding an item that a user disliked is not a hit. The
catalogue is ranked in chunks, so that memory does not grow with it, and no further than to the
largest cut-off. All ranks read every shard and share its users.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.draws import EVALUATION_SEED, Draws
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.data.targets import build_catalogue_batch, windows_of
from torchrec_kvshare.training.evaluate import Scorer, progress_bar
from torchrec_kvshare.training.metrics import MAX_CUTOFF, num_ahead
from torchrec_kvshare.training.ranks import ALONE, Ranks

CATALOGUE_ROWS_AT_A_TIME = 32_768
FIRST_CHUNK_ITEMS = 4096  # enough to rank most held-out items beyond the cut-offs


@dataclass(frozen=True)
class RankingSettings:
    """What held-out items are ranked among.

    Attributes:
        max_users: number of users to rank for, spread evenly; None for all.
        num_candidates: items drawn for each user, which its item is ranked among; None: the whole
            catalogue.
        exclude_seen: whether items that the user met strictly before are left out. If the held-out
            item is one of them (a repurchase), nothing is: among items the user never met, a met
            one would be easy to find.
    """

    max_users: int | None = None
    num_candidates: int | None = None
    exclude_seen: bool = True

    def num_columns(self, catalogue_size: int) -> int:
        """Return the number of items to score for each user, beside the held-out one."""
        return min(self.num_candidates or catalogue_size, catalogue_size)


class Ranked(NamedTuple):
    """Held-out events in the order of the log, and where their items rank.

    Attributes:
        num_earlier: [E] strictly earlier events of each event's user.
        position: [E] rank of its item, from 0; ``MAX_CUTOFF`` or more is a lower bound.
        num_items: number of items that are ranked, at most.
    """

    num_earlier: Ints
    position: Ints
    num_items: int


class _HeldOut(NamedTuple):
    """Held-out events in the order of the log, [E] each."""

    keys: Ints
    num_earlier: Ints
    shard: Ints


def rank_held_out(
    score: Scorer,
    shards: Shards,
    settings: RankingSettings,
    ranks: Ranks = ALONE,
    split: int = TEST,
) -> Ranked:
    """Rank the item of each user's last positive event of a split.

    A held-out item that is not in the training split counts as not found.

    Args:
        score: the scorer to evaluate.
        shards: hold the events.
        settings: what the items are ranked among.
        ranks: the processes that evaluate together, each some of the users; all of them must call
            this.
        split: ``TEST`` or ``VALID``.

    Returns:
        The same on every rank.
    """
    held_out = _held_out(shards, settings.max_users, split)
    catalogue = _popular_first(shards)
    position_by_key: dict[int, int] = {}
    bar = progress_bar("ranking", len(held_out.keys), "user", ranks)
    for shard in np.unique(held_out.shard).tolist():
        dataset = shards.read([shard])
        events = _last_positives(dataset, split)
        events = events[np.isin(dataset.keys_of(events), held_out.keys)]
        known = events[np.isin(dataset.item[events], dataset.known_items)]
        for group in _groups(known, settings.num_columns(len(catalogue)), ranks):
            own = group[ranks.rank :: ranks.world_size]
            # A sharded model's ranks call it together: one that has no user ranks another's again.
            asked = own if len(own) else group[:1]
            found = _positions(score, dataset, asked, catalogue, settings, ranks)
            position_by_key |= zip(dataset.keys_of(own).tolist(), found, strict=False)
            bar.update(len(group))
        bar.update(len(events) - len(known))
    bar.close()
    everyone = dict(chain.from_iterable(part.items() for part in ranks.gather(position_by_key)))
    positions = [everyone.get(key, MAX_CUTOFF) for key in held_out.keys.tolist()]
    num_items = settings.num_columns(len(catalogue)) + (settings.num_candidates is not None)
    return Ranked(
        held_out.num_earlier, np.array(positions, np.int64), min(num_items, len(catalogue))
    )


def _groups(events: Ints, num_columns: int, ranks: Ranks) -> list[Ints]:
    """Return the events that all ranks rank at a time."""
    length = ranks.world_size * max(1, CATALOGUE_ROWS_AT_A_TIME // num_columns)
    return [events[first : first + length] for first in range(0, len(events), length)]


def _held_out(shards: Shards, max_users: int | None, split: int) -> _HeldOut:
    parts = []
    for shard, dataset in enumerate(shards):
        events = _last_positives(dataset, split)
        parts.append(
            (dataset.keys_of(events), dataset.num_earlier[events], np.full(len(events), shard))
        )
    keys, num_earlier, of_shard = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys)
    if max_users is not None and max_users < len(order):
        order = order[np.linspace(0, len(order) - 1, max_users).astype(np.int64)]
    return _HeldOut(keys[order], num_earlier[order], of_shard[order])


def _popular_first(shards: Shards) -> Ints:
    """Return the catalogue, the items most likely to rank before a held-out one first."""
    known = shards.shared.known_items
    return known[np.argsort(-shards.num_training[known], kind="stable")]


def _last_positives(dataset: Dataset, split: int) -> Ints:
    """Return each user's last positive event of a split."""
    tested = np.flatnonzero((dataset.split == split) & dataset.is_positive)
    users = dataset.event_user[tested]
    return (
        tested[np.append(np.flatnonzero(np.diff(users)), len(tested) - 1)]
        if len(tested)
        else tested
    )


def _seen_before(dataset: Dataset, event: int, settings: RankingSettings) -> Ints:
    """Return the items that are left out for a user."""
    first = dataset.user_offsets[dataset.event_user[event]]
    seen = dataset.item[first : first + dataset.num_earlier[event]]
    if not settings.exclude_seen or dataset.item[event] in seen:
        return seen[:0]
    return np.unique(seen)


def _drawn_candidates(
    dataset: Dataset, held_out: Ints, seen: list[Ints], num_candidates: int
) -> Ints:
    """Draw distinct items for each held-out event, evenly from those that are not left out.

    Returns:
        [E, num_candidates] item codes; where fewer items are left, the event's own fills the row.
    """
    draws = Draws(EVALUATION_SEED, 1)  # Other numbers than those of the sampled negatives.
    keys = dataset.keys_of(held_out).tolist()
    own = dataset.item[held_out].tolist()
    rows = [
        _drawn(dataset.known_items, np.append(items, item), num_candidates, draws, key)
        for key, item, items in zip(keys, own, seen, strict=True)
    ]
    return np.stack(
        [
            np.append(row, np.full(num_candidates - len(row), item))
            for row, item in zip(rows, own, strict=True)
        ]
    )


def _drawn(catalogue: Ints, left_out: Ints, num_candidates: int, draws: Draws, key: int) -> Ints:
    num_left = len(catalogue) - len(np.intersect1d(left_out, catalogue))
    num_wanted, num_drawn = min(num_candidates, num_left), num_candidates
    drawn = catalogue[:0]
    while len(drawn) < num_wanted:
        num_drawn *= 2
        places = draws.below(len(catalogue), np.array([key]), np.arange(num_drawn))
        distinct = places[np.sort(np.unique(places, return_index=True)[1])]
        drawn = catalogue[distinct]
        drawn = drawn[~np.isin(drawn, left_out)][:num_wanted]
    return drawn


def _positions(
    score: Scorer,
    dataset: Dataset,
    held_out: Ints,
    catalogue: Ints,
    settings: RankingSettings,
    ranks: Ranks,
) -> list[int]:
    """Return positions of the held-out items, from 0; ``MAX_CUTOFF`` or more is a lower bound.

    Every chunk encodes the histories again: 1 % of the arithmetic for a history of 256 events
    among 32,768 candidates.
    """
    seen = [_seen_before(dataset, event, settings) for event in held_out.tolist()]
    if settings.num_candidates is None:
        items = np.broadcast_to(catalogue, (len(held_out), len(catalogue)))
    else:
        num_columns = settings.num_columns(len(catalogue))
        items = _drawn_candidates(dataset, held_out, seen, num_columns)
    windows = windows_of(dataset, held_out)
    targets = dataset.item[held_out]
    ahead = torch.zeros(len(held_out), dtype=torch.int64)
    for columns in _chunks(items.shape[1]):
        chunk = items[:, columns]
        # Score the target with each chunk: scores to compare are computed in one batch.
        candidates = np.concatenate([chunk, targets[:, None]], axis=1)
        batch = build_catalogue_batch(dataset, windows, candidates)
        scores = score(batch)[:, 0].view(candidates.shape)
        excluded = chunk == targets[:, None]
        for row, left_out in enumerate(seen):
            excluded[row] |= np.isin(chunk[row], left_out)
        ahead += num_ahead(scores[:, :-1], scores[:, -1], torch.from_numpy(excluded))
        if not ranks.sum((ahead < MAX_CUTOFF).sum()):
            break
    return ahead.tolist()


def _chunks(num_items: int) -> Iterator[slice]:
    first, length = 0, FIRST_CHUNK_ITEMS
    while first < num_items:
        yield slice(first, first + length)
        first += length
        length = min(2 * length, CATALOGUE_ROWS_AT_A_TIME)
