"""A checked request: ids are table rows, histories are cut to their windows."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_kvshare.features.bags import Bags
from torchrec_kvshare.features.schema import (
    HISTORY,
    ITEM,
    TIME,
    UNKNOWN_ROW,
    USER,
    candidate_key,
    context_key,
    history_key,
)

NO_TIME = -1  # time of a user without a request


@dataclass(frozen=True, eq=False)
class Events:
    """One history of a user, cut to the window.

    Attributes:
        columns: [L] int64 by event column, and ``time``.
        bags: rows of each event by multi-valued item attribute.
        first_event: index of the first one among all events of the history.
        floats: [L] float32 by float column of events, squashed.
    """

    columns: dict[str, Tensor]
    bags: dict[str, Bags]
    first_event: int
    floats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_events(self) -> int:
        """Number of events that the model reads."""
        return self.columns[TIME].numel()

    def part(self, first: int, last: int) -> "Events":
        """Return events ``first`` to ``last`` (exclusive) of the window."""
        columns = {column: values[first:last] for column, values in self.columns.items()}
        bags = {column: _part(bag, first, last) for column, bag in self.bags.items()}
        floats = {column: values[first:last] for column, values in self.floats.items()}
        return Events(columns, bags, self.first_event + first, floats)


@dataclass(frozen=True, eq=False)
class Request:
    """One user, its histories cut to their windows, N candidates; ids are table rows.

    Attributes:
        request_id: as it came.
        user_id: the raw id, spelt as ``canonical_id`` does.
        user_row: row of the user's table.
        time: Unix seconds; ``NO_TIME`` where a user came without a time.
        context: rows by context column.
        context_floats: [F] float32, squashed, in the order of the schema.
        events_by_history: the events that the model reads, by the history's name.
        candidate_items: [N] int64.
        candidate_bags: rows of each candidate by multi-valued item attribute.
        dense: [N, num_dense] float32.
        newest: Unix seconds of the newest event given; ``NO_TIME`` without events.
        report: the ``REPORTS`` that the answer includes.
        came_at: time of arrival by ``steady_clock``; a later ``forget`` of the user keeps its K/V
            out of the cache. None: the time of scoring.
    """

    request_id: str | int | None
    user_id: str
    user_row: int
    time: int
    context: dict[str, Tensor]
    context_floats: Tensor
    events_by_history: dict[str, Events]
    candidate_items: Tensor
    candidate_bags: dict[str, Bags]
    dense: Tensor
    newest: int = NO_TIME
    report: tuple[str, ...] = ()
    came_at: float | None = None

    @property
    def num_events(self) -> int:
        """Number of events that the model reads, over all histories."""
        return sum(events.num_events for events in self.events_by_history.values())

    @property
    def num_events_by_history(self) -> list[int]:
        """Number of events that the model reads of each history, in the schema's order."""
        return [events.num_events for events in self.events_by_history.values()]

    @property
    def num_candidates(self) -> int:
        """Number of candidates to score."""
        return self.candidate_items.numel()

    @property
    def num_bag_ids(self) -> int:
        """Number of ids in multi-valued columns; of events, only those that the model reads."""
        groups = [self.candidate_bags, *(e.bags for e in self.events_by_history.values())]
        in_bags = sum(bag.values.numel() for bags in groups for bag in bags.values())
        return in_bags + sum(rows.numel() for rows in self.context.values())

    def part(self, first: int, last: int) -> "Request":
        """Return the request with candidates ``first`` to ``last`` (exclusive) only."""
        return replace(
            self,
            candidate_items=self.candidate_items[first:last],
            candidate_bags={c: _part(bag, first, last) for c, bag in self.candidate_bags.items()},
            dense=self.dense[first:last],
        )


class IdCount(NamedTuple):
    """Ids of one column: how many were given, and how many of them are unknown."""

    given: int
    unknown: int


def count_ids(request: Request) -> dict[str, IdCount]:
    """Count the given and the unknown ids of a request, by column as the request names it.

    Only events that the model reads are counted; an event that two histories read counts twice.
    """
    rows_by_column = {USER: [torch.tensor(request.user_row)]}
    for column, rows in request.context.items():
        rows_by_column[context_key(column)] = [rows]
    for events in request.events_by_history.values():
        for column, rows in events.columns.items():
            if column != TIME:
                rows_by_column.setdefault(history_key(HISTORY, column), []).append(rows)
        for column, bags in events.bags.items():
            rows_by_column.setdefault(history_key(HISTORY, column), []).append(bags.values)
    rows_by_column[candidate_key(ITEM)] = [request.candidate_items]
    for column, bags in request.candidate_bags.items():
        rows_by_column[candidate_key(column)] = [bags.values]
    return {
        column: IdCount(
            sum(int(np.count_nonzero(rows.numpy())) for rows in parts),  # MISSING_ROW is 0.
            sum(int(np.count_nonzero(rows.numpy() == UNKNOWN_ROW)) for rows in parts),
        )
        for column, parts in rows_by_column.items()
    }


def unknown_ids(request: Request) -> dict[str, int]:
    """Return the number of unknown ids by column, without columns that have none."""
    return {column: count.unknown for column, count in count_ids(request).items() if count.unknown}


def _part(bag: Bags, first: int, last: int) -> Bags:
    start, end = int(bag.lengths[:first].sum()), int(bag.lengths[:last].sum())
    return Bags(bag.values[start:end], bag.lengths[first:last])
