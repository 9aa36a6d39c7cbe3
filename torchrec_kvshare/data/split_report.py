"""A description of a data set's splits, for the log of a run: one pass over its shards."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST, TRAIN, VALID
from torchrec_kvshare.features.schema import (
    ACTION,
    ITEM,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    USER,
    Vocabulary,
)

NAME_BY_SPLIT = {TRAIN: "training", VALID: "validation", TEST: "test"}
LOG = "log"
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
    """

    num_events: dict[str, int]
    num_users: dict[str, int]
    crowded_moments: list[str]
    unknown_shares: dict[str, float]
    collisions: list[str]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {self.num_events[name]:,} events of {self.num_users[name]:,} users"
            for name in self.num_events
            if name != LOG
        )


def split_report(shards: Shards) -> SplitReport:
    """Count what the splits of a data set hold."""
    num_events: Counter[str] = Counter()
    num_users: Counter[str] = Counter()
    num_ids: Counter[str] = Counter()
    num_unknown: Counter[str] = Counter()
    candidates: dict[str, set[int]] = {LOG: set()}
    for dataset in shards:
        for name, chosen in _parts(dataset):
            num_events[name] += int(chosen.sum())
            num_users[name] += len(np.unique(dataset.event_user[chosen]))
            # A moment of half of all events is one of half of a shard's events somewhere.
            candidates.setdefault(name, set()).update(_crowded(dataset.time[chosen]))
        for column, rows in _tested_rows(dataset).items():
            num_ids[column] += len(rows)
            num_unknown[column] += int((rows == UNKNOWN_ROW).sum())
    return SplitReport(
        num_events=dict(num_events),
        num_users=dict(num_users),
        crowded_moments=_crowded_moments(shards, candidates, num_events),
        unknown_shares={name: num_unknown[name] / max(1, num_ids[name]) for name in num_ids},
        collisions=_collisions(shards.shared),
    )


def _parts(dataset: Dataset) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Return the events of the log and of each split, by name."""
    yield LOG, np.ones(len(dataset.time), bool)
    for split, name in NAME_BY_SPLIT.items():
        yield f"{name} split", dataset.split == split


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
    if dataset.schema.has_action:
        rows[ACTION] = dataset.action_row[dataset.action[tested]]
    for name, values in dataset.item_attributes.items():
        rows[f"items.{name}"] = values.take(items)[0]
    for name, values in dataset.context.items():
        rows[f"context.{name}"] = values.take(users)[0]
    for name, of_events in dataset.request_context.items():
        rows[f"context.{name}"] = of_events.take(np.flatnonzero(tested))[0]
    return {
        name: found
        for name, found in rows.items()
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
