"""A description of a data set's splits, for the log of a run: one pass over its shards."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.draws import EVALUATION_SEED, Draws
from torchrec_kvshare.data.interactions import num_tied
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST, TRAIN, VALID
from torchrec_kvshare.data.targets import MIN_CATALOGUE, sample_negatives
from torchrec_kvshare.features.schema import (
    ITEM,
    MISSING_ROW,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    USER,
    Vocabulary,
)

NAME_BY_SPLIT = {TRAIN: "training", VALID: "validation", TEST: "test"}
LOG = "log"
TARGETS_AT_A_TIME = 2**16
LARGE_SHARE = 0.5  # of the events of a split or the log at one moment: worth a warning


@dataclass(frozen=True)
class SplitReport:
    """What the splits of a data set hold.

    Attributes:
        num_events: of each split and of the log, by name.
        num_users: likewise; users that have events there.
        crowded_moments: a sentence for each split, and the log, of which half or more of the events
            are at one moment. This shows times that were read wrongly, such as days taken for
            seconds.
        unknown_shares: share of the test split's ids that are not in the training split, by column
            that has a vocabulary.
        collisions: a sentence for each hashed column.
        tied_share: share of the log's events that are at the time of another event of their user.
        own_positive_share: share of the test split's sampled negatives that are, somewhere in the
            log, positive events of their user; None if none are sampled.
    """

    num_events: dict[str, int]
    num_users: dict[str, int]
    crowded_moments: list[str]
    unknown_shares: dict[str, float]
    collisions: list[str]
    tied_share: float
    own_positive_share: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers; one without a value has its reason as ``undefined`` beside it."""
        found = {
            "events": self.num_events,
            "users": self.num_users,
            "tied_share": self.tied_share,
            "own_positive_share": self.own_positive_share,
            "unknown_shares": self.unknown_shares,
        }
        if self.own_positive_share is None:
            found["undefined"] = {"own_positive_share": "no negatives are sampled"}
        return found

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {self.num_events[name]:,} events of {self.num_users[name]:,} users"
            for name in self.num_events
            if name != LOG
        )


def split_report(shards: Shards, num_negatives: int = 0) -> SplitReport:
    """Count what the splits of a data set hold.

    Args:
        shards: the data set.
        num_negatives: negatives that are sampled for each target.
    """
    num_events: Counter[str] = Counter()
    num_users: Counter[str] = Counter()
    num_ids: Counter[str] = Counter()
    num_unknown: Counter[str] = Counter()
    candidates: dict[str, set[int]] = {LOG: set()}
    has_negatives = num_negatives and len(shards.shared.known_items) >= MIN_CATALOGUE
    num_ties = num_own_positives = 0
    for dataset in shards:
        num_ties += num_tied(dataset.event_user, dataset.time)
        if has_negatives:
            num_own_positives += _num_own_positives(dataset, num_negatives)
        for name, chosen in _parts(dataset):
            num_events[name] += int(chosen.sum())
            num_users[name] += len(np.unique(dataset.event_user[chosen]))
            # A moment of half of all events is one of half of a shard's events somewhere.
            candidates.setdefault(name, set()).update(_crowded(dataset.time[chosen]))
        for column, rows in _tested_rows(dataset).items():
            num_ids[column] += len(rows)
            num_unknown[column] += int((rows == UNKNOWN_ROW).sum())
    num_sampled = num_negatives * num_events[f"{NAME_BY_SPLIT[TEST]} split"]
    return SplitReport(
        num_events=dict(num_events),
        num_users=dict(num_users),
        crowded_moments=_crowded_moments(shards, candidates, num_events),
        unknown_shares={name: num_unknown[name] / max(1, num_ids[name]) for name in num_ids},
        collisions=_collisions(shards.shared),
        tied_share=num_ties / max(1, num_events[LOG]),
        own_positive_share=num_own_positives / num_sampled
        if has_negatives and num_sampled
        else None,
    )


def _parts(dataset: Dataset) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Return the events of the log and of each split, by name."""
    yield LOG, np.ones(len(dataset.time), bool)
    for split, name in NAME_BY_SPLIT.items():
        yield f"{name} split", dataset.split == split


def _num_own_positives(dataset: Dataset, num_negatives: int) -> int:
    """Count the test split's negatives, as an evaluation samples them, that their user likes."""
    num_items, user = len(dataset.item_row), dataset.event_user
    liked = dataset.is_positive
    pairs = np.unique(user[liked] * num_items + dataset.item[liked])
    targets = np.flatnonzero(dataset.split == TEST)
    draws, count = Draws(EVALUATION_SEED), 0
    for first in range(0, len(targets), TARGETS_AT_A_TIME):
        chosen = targets[first : first + TARGETS_AT_A_TIME]
        negatives = sample_negatives(dataset, chosen, num_negatives, draws)
        count += int(np.isin(user[chosen][:, None] * num_items + negatives, pairs).sum())
    return count


def _crowded(time: Ints) -> list[int]:
    """Return the moments of half or more of some events."""
    moments, counts = np.unique(time, return_counts=True)
    crowded: list[int] = moments[counts >= LARGE_SHARE * len(time)].tolist()
    return crowded


def _crowded_moments(
    shards: Shards, candidates: dict[str, set[int]], num_events: Counter[str]
) -> list[str]:
    """Describe the moments of half or more of all events, among those that may be."""
    wanted = np.array(sorted({moment for moments in candidates.values() for moment in moments}))
    counts: dict[str, Ints] = {name: np.zeros(len(wanted), np.int64) for name in candidates}
    for dataset in shards if len(wanted) else ():
        for name, chosen in _parts(dataset):
            found = dataset.time[chosen]
            found = found[np.isin(found, wanted)]
            counts[name] += np.bincount(np.searchsorted(wanted, found), minlength=len(wanted))
    sentences = []
    for name, by_moment in counts.items():
        largest = int(by_moment.max(initial=0))
        if largest > 1 and largest >= LARGE_SHARE * num_events[name]:
            index = int(by_moment.argmax())
            where = ", ".join(
                f"{count} in the {split}"
                for split, others in counts.items()
                if split != LOG and name in (LOG, split) and (count := int(others[index]))
            )
            sentences.append(
                f"{largest} of {num_events[name]} events of the {name} are at one moment, "
                f"{np.datetime64(int(wanted[index]), 's')}Z: {where}"
            )
    return sentences


def _tested_rows(dataset: Dataset) -> dict[str, Ints]:
    """Return the table rows of the test split's ids.

    By column, of columns with a vocabulary: no other has a row for unknown ids.
    """
    tested = dataset.split == TEST
    users, items = np.unique(dataset.event_user[tested]), dataset.item[tested]
    rows = {USER: dataset.user_row[users], ITEM: dataset.item_row[items]}
    for name, coded in dataset.event_attributes.items():
        found = coded.take(np.flatnonzero(tested))
        rows[f"events.{name}"] = found[found != MISSING_ROW]
    for name, values in dataset.item_attributes.items():
        rows[f"items.{name}"] = values.take(items)[0]
    for name, values in dataset.context.items():
        rows[f"context.{name}"] = values.take(users)[0]
    for name, of_events in dataset.request_context.items():
        rows[f"context.{name}"] = of_events.take(np.flatnonzero(tested))[0]
    return {
        name: of_column
        for name, of_column in rows.items()
        if isinstance(dataset.schema.vocabulary_by_column[name], Vocabulary)
    }


def _collisions(shared: Dataset) -> list[str]:
    """Describe each hashed column: its rows, and how many known ids share one."""
    return [
        f"{column} is hashed, so no id of it is unknown: {count:,} of the "
        f"{len(shared.known_ids[column]):,} ids of the training split share one of "
        f"{shared.schema.num_table_rows(column) - NUM_RESERVED_ROWS:,} rows with another"
        for column, count in shared.num_colliding_ids.items()
    ]
