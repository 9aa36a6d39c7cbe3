"""A description of a data set's splits, for the log of a run."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.dataset import TEST, TRAIN, VALID, Dataset, Ints
from torchrec_kvshare.features.schema import (
    ACTION,
    ITEM,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    USER,
    Vocabulary,
)

NAME_BY_SPLIT = {TRAIN: "training", VALID: "validation", TEST: "test"}
LARGE_SHARE = 0.5  # of the events of a split or the log at one moment: worth a warning


def split_sizes(dataset: Dataset) -> str:
    """Return the size of each split, such as ``training split 129 events of 4 users, ...``."""
    return ", ".join(
        f"{name} {int(chosen.sum()):,} events of "
        f"{len(np.unique(dataset.event_user[chosen])):,} users"
        for name, chosen in _splits(dataset)
    )


def crowded_moments(dataset: Dataset) -> list[str]:
    """Describe each split, and the log, of which half or more of the events are at one moment.

    This shows times that were read wrongly, such as days taken for seconds.
    """
    sentences = []
    everything = ("log", np.ones(len(dataset.time), bool))
    for name, chosen in (everything, *_splits(dataset)):
        times, counts = np.unique(dataset.time[chosen], return_counts=True)
        num_events = int(counts.sum())
        if num_events and counts.max() > 1 and counts.max() >= LARGE_SHARE * num_events:
            moment = times[counts.argmax()]
            where = ", ".join(
                f"{number} in the {split}"
                for split, members in _splits(dataset)
                if (number := int((members & chosen & (dataset.time == moment)).sum()))
            )
            sentences.append(
                f"{counts.max()} of {num_events} events of the {name} are at one moment, "
                f"{np.datetime64(int(moment), 's')}Z: {where}"
            )
    return sentences


def unknown_shares(dataset: Dataset) -> dict[str, float]:
    """Return the share of the test split's ids that are not in the training split.

    By column, of columns with a vocabulary: no other has a row for unknown ids.
    """
    tested = dataset.split == TEST
    users, items = np.unique(dataset.event_user[tested]), dataset.item[tested]
    rows = {
        USER: dataset.user_row[users],
        ITEM: dataset.item_row[items],
    }
    if dataset.schema.has_action:
        rows[ACTION] = dataset.action_row[dataset.action[tested]]
    for name, values in dataset.item_attributes.items():
        rows[f"items.{name}"] = values.take(items)[0]
    for name, values in dataset.context.items():
        rows[f"context.{name}"] = values.take(users)[0]
    return {
        name: _unknown_share(found)
        for name, found in rows.items()
        if isinstance(dataset.schema.vocabulary_by_column[name], Vocabulary)
    }


def collisions(dataset: Dataset) -> list[str]:
    """Describe each hashed column: its rows, and how many known ids share one."""
    return [
        f"{column} is hashed, so no id of it is unknown: {count:,} of the "
        f"{len(dataset.known_ids[column]):,} ids of the training split share one of "
        f"{dataset.schema.num_table_rows(column) - NUM_RESERVED_ROWS:,} rows with another"
        for column, count in dataset.num_colliding_ids.items()
    ]


def _splits(dataset: Dataset) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for split, name in NAME_BY_SPLIT.items():
        yield f"{name} split", dataset.split == split


def _unknown_share(rows: Ints) -> float:
    return float((rows == UNKNOWN_ROW).mean()) if len(rows) else 0.0
