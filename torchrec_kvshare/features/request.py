"""A request that was checked: ids are table rows, histories are cut to the model's window."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

NO_TIME = -1  # of a user that came without a request


@dataclass(frozen=True, eq=False)
class Events:
    """One history of a user, cut to the window.

    Attributes:
        columns: one [L] int64 per event column, and ``time``.
        bags: rows of each event by multi-valued item attribute.
        first_event: place of the first of them among all of the history's events.
    """

    columns: dict[str, Tensor]
    bags: dict[str, Bags]
    first_event: int

    @property
    def num_events(self) -> int:
        """Events that the model reads."""
        return self.columns[TIME].numel()

    def part(self, first: int, last: int) -> "Events":
        """The events from one place of the window to another."""
        columns = {column: values[first:last] for column, values in self.columns.items()}
        bags = {column: _part(bag, first, last) for column, bag in self.bags.items()}
        return Events(columns, bags, self.first_event + first)


@dataclass(frozen=True, eq=False)
class Request:
    """One user, its histories cut to their windows, N candidates; ids are table rows.

    Attributes:
        request_id: as it came.
        user_id: the raw id, spelt as ``canonical_id`` does.
        user_row: row of the user's table.
        time: Unix seconds; ``NO_TIME`` of a user that came without.
        context: rows by context column.
        events_by_history: what the model reads, by the history's name.
        candidate_items: [N] int64.
        candidate_bags: rows of each candidate by multi-valued item attribute.
        dense: [N, num_dense] float32.
        newest: Unix seconds of the newest event given; ``NO_TIME`` where there is none.
        report: of ``REPORTS`` those that the answer is to tell.
        came_at: when it came, by ``steady_clock``: nothing of it is kept for a user who was
            forgotten since. None for when it is scored.
    """

    request_id: str | int | None
    user_id: str
    user_row: int
    time: int
    context: dict[str, Tensor]
    events_by_history: dict[str, Events]
    candidate_items: Tensor
    candidate_bags: dict[str, Bags]
    dense: Tensor
    newest: int = NO_TIME
    report: tuple[str, ...] = ()
    came_at: float | None = None

    @property
    def num_events(self) -> int:
        """Events that the model reads, of all histories."""
        return sum(events.num_events for events in self.events_by_history.values())

    @property
    def num_events_by_history(self) -> list[int]:
        """Events that the model reads, of each history in the schema's order."""
        return [events.num_events for events in self.events_by_history.values()]

    @property
    def num_candidates(self) -> int:
        """Candidates to score."""
        return self.candidate_items.numel()

    @property
    def num_bag_ids(self) -> int:
        """Ids in multi-valued columns, of events those that the model reads."""
        groups = [self.candidate_bags, *(e.bags for e in self.events_by_history.values())]
        of_bags = sum(bag.values.numel() for bags in groups for bag in bags.values())
        return of_bags + sum(rows.numel() for rows in self.context.values())

    def part(self, first: int, last: int) -> "Request":
        """The request with the candidates from one place to another alone."""
        return replace(
            self,
            candidate_items=self.candidate_items[first:last],
            candidate_bags={c: _part(bag, first, last) for c, bag in self.candidate_bags.items()},
            dense=self.dense[first:last],
        )


class IdCount(NamedTuple):
    """Ids of one column: how many were given, and how many of them no table knows."""

    given: int
    unknown: int


def count_ids(request: Request) -> dict[str, IdCount]:
    """Ids of a request by column, named as in the request: those given, and the unknown ones.

    Of events only those that the model reads are counted; one that two histories read counts twice.
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
    """How many ids of each column no table knows; columns without are left out."""
    return {column: count.unknown for column, count in count_ids(request).items() if count.unknown}


def distinct_histories(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """Requests whose histories are to be encoded: one for each user and content.

    Args:
        requests: in a batch.

    Returns:
        Places of the first request with each of the histories, and for every request the index
        among these.
    """
    firsts: list[int] = []
    row_of_request: list[int] = []
    rows_by_user: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        known = rows_by_user.setdefault(request.user_id, [])
        same = [row for row in known if _same_events(requests[firsts[row]], request)]
        if not same:
            known.append(len(firsts))
            firsts.append(place)
        row_of_request.append(same[0] if same else known[-1])
    return firsts, row_of_request


def _same_events(one: Request, other: Request) -> bool:
    if one.events_by_history is other.events_by_history:
        return True
    for name, events in one.events_by_history.items():
        columns, bags = other.events_by_history[name].columns, other.events_by_history[name].bags
        if not all(torch.equal(values, columns[c]) for c, values in events.columns.items()):
            return False
        for column, (values, lengths) in events.bags.items():
            if not torch.equal(lengths, bags[column].lengths):
                return False
            if not torch.equal(values, bags[column].values):
                return False
    return True


def _part(bag: Bags, first: int, last: int) -> Bags:
    start, end = int(bag.lengths[:first].sum()), int(bag.lengths[:last].sum())
    return Bags(bag.values[start:end], bag.lengths[first:last])
