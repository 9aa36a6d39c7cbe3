"""Requests in, TorchRec batches out; the one place where outside input is checked.

A request that passed ``parse_request`` holds table rows and finite numbers only, cut to the model's
window, so that nothing behind this file checks again. Raw ids may be integers or text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from torchrec_kvshare.data.batches import (
    Bags,
    assemble,
    clock_features,
    jagged,
    joined,
    single,
    squash,
)
from torchrec_kvshare.data.schema import (
    ACTION,
    FIRST_PLACE,
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    History,
    IntArray,
    candidate_key,
    context_key,
    history_key,
)
from torchrec_kvshare.errors import RequestError

MAX_TIME = 4_102_444_800  # 2100-01-01; a later time is milliseconds taken for seconds
MAX_FLOAT = 1e30
MAX_CANDIDATES = 100_000
MAX_SHOWN = 200  # characters of a value or of a list of names in a message

# A raw column: a list as JSON has it, an array, or Ragged.
Column = Any


@dataclass(frozen=True, eq=False)
class Ragged:
    """A multi-valued raw column as tensors have it: a request may hold it in place of lists.

    Attributes:
        values: ids of all cells, one cell behind the other.
        lengths: [rows] int64, ids of each cell.
    """

    values: list[Any] | IntArray
    lengths: IntArray

    def __len__(self) -> int:
        return self.lengths.size

    def __getitem__(self, rows: slice) -> "Ragged":
        ends = np.concatenate([[0], self.lengths.cumsum()])
        first, last, _ = rows.indices(len(self))
        return Ragged(self.values[ends[first] : ends[last]], self.lengths[rows])

    def cells(self) -> list[list[Any]]:
        """The same as lists."""
        ends = self.lengths.cumsum().tolist()
        values = self.values if isinstance(self.values, list) else self.values.tolist()
        return [values[first:last] for first, last in pairwise([0, *ends])]


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
        user_id: the raw id as text.
        user_row: row of the user's table.
        time: Unix seconds.
        context: rows by context column.
        events_by_history: what the model reads, by the history's name.
        candidate_items: [N] int64.
        candidate_bags: rows of each candidate by multi-valued item attribute.
        dense: [N, num_dense] float32.
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

    @property
    def num_events(self) -> int:
        """Events that the model reads, of all histories."""
        return sum(events.num_events for events in self.events_by_history.values())

    @property
    def num_candidates(self) -> int:
        """Candidates to score."""
        return self.candidate_items.numel()

    def part(self, first: int, last: int) -> "Request":
        """The request with the candidates from one place to another alone."""
        return replace(
            self,
            candidate_items=self.candidate_items[first:last],
            candidate_bags={c: _part(bag, first, last) for c, bag in self.candidate_bags.items()},
            dense=self.dense[first:last],
        )


def decode_request(line: str | bytes) -> dict[str, Any]:
    """One JSON object, refusing what JSON readers let pass in silence.

    Raises:
        RequestError: if the text is no JSON object or an object in it has the same key twice.
    """
    decoded = decode_json(line)
    if not isinstance(decoded, dict):
        raise RequestError(f"a request is a JSON object; got {type(decoded).__name__}")
    return decoded


def decode_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        RequestError: if the text is not JSON or an object in it has the same key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not JSON: {error}") from error


def parse_request(raw: Mapping[str, Any], schema: FeatureSchema) -> Request:
    """Check one request and turn it into table rows.

    Columns that the schema does not name are ignored: models that read different columns may share
    one request. Events are taken in the order given, oldest first. A column is a list, an array of
    int64 or float64, or ``Ragged``: the latter are read without a Python object for each value.

    Args:
        raw: the decoded request, in the project's one request format.
        schema: the model's columns.

    Returns:
        The request, its history cut to the window.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    user_id = _id(_need(raw, USER, "the request"), USER)
    time = _time(_need(raw, TIME, "the request"), TIME)
    context = _group(raw, "context", schema.context)
    event_columns = (*schema.event_columns, *schema.item_attributes, TIME)
    history = _columns(_group(raw, "history", event_columns), "history", event_columns)
    return Request(
        _request_id(raw.get("request_id")),
        user_id,
        schema.vocabulary_by_column[USER].row(user_id),
        time,
        {c: _bag(context[c], schema, c, f"context.{c}") for c in schema.context},
        {one.name: _events(one, history, schema) for one in schema.histories},
        **_candidates(raw, schema, time),
    )


def parse_candidates(raw: Mapping[str, Any], user: Request, schema: FeatureSchema) -> Request:
    """Check candidates of a user that was parsed before.

    Args:
        raw: ``candidates`` as in a request, and maybe another ``time``.
        user: whose candidates they are.
        schema: the model's columns.

    Returns:
        The user's request with these candidates.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    time = _time(raw[TIME], TIME) if TIME in raw else user.time
    return replace(user, time=time, **_candidates(raw, schema, time))


def parse_user(raw: Mapping[str, Any], schema: FeatureSchema) -> Request:
    """Check a user whose history is to be encoded: a request without candidates.

    Args:
        raw: as a request; ``time`` may be missing, and candidates are not read.
        schema: the model's columns.

    Returns:
        The request, its history cut to the window.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    columns = (ITEM, *schema.item_attributes, *schema.item_floats)
    return parse_request({TIME: 0} | {**raw, "candidates": {c: [] for c in columns}}, schema)


def collate_history(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """The histories of some requests, as prefill wants them: no candidates.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch with the histories' keys alone.
    """
    firsts, _ = distinct_histories(requests)
    return _without_candidates(
        _history_bags([requests[row].events_by_history for row in firsts], schema), schema
    )


def collate_tails(
    events_by_history: Sequence[Mapping[str, Events]],
    first_places: Mapping[str, Sequence[int]],
    schema: FeatureSchema,
) -> Batch:
    """The new events of some histories, as ``extend`` wants them.

    Args:
        events_by_history: new events of each user by the history's name; maybe none.
        first_places: by the history's name, the window's place of each user's first new event.
        schema: the model's columns.

    Returns:
        A batch with the histories' keys, and with ``first_place``, alone.
    """
    bags = _history_bags(events_by_history, schema)
    for name, places in first_places.items():
        bags[history_key(name, FIRST_PLACE)] = single(torch.tensor(places))
    return _without_candidates(bags, schema)


def collate_candidates(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Candidates with their users and contexts, and of the histories the times alone.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch that can be scored once page ids are added.
    """
    return _collate(requests, _request_bags(requests, schema))


def collate(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Histories and candidates, as the uncached model wants them.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch for ``model(dense, features)``.
    """
    firsts, _ = distinct_histories(requests)
    history_bags = _history_bags([requests[row].events_by_history for row in firsts], schema)
    return _collate(requests, _request_bags(requests, schema) | history_bags)


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


def user_of_candidates(requests: Sequence[Request]) -> Tensor:
    """[C] int64: the request each candidate belongs to."""
    counts = torch.tensor([request.num_candidates for request in requests])
    return torch.repeat_interleave(torch.arange(len(requests)), counts)


def _collate(requests: Sequence[Request], bags: dict[str, Bags]) -> Batch:
    dense = torch.cat([request.dense for request in requests])
    return assemble(bags, user_of_candidates(requests), dense, torch.zeros(dense.size(0)))


def _request_bags(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Bags]:
    """Everything but the events, of which there are the times alone."""
    firsts, row_of_request = distinct_histories(requests)
    bags = {USER: single(torch.tensor([request.user_row for request in requests]))}
    for column in schema.context:
        bags[context_key(column)] = jagged([request.context[column] for request in requests])
    bags[REQUEST_TIME] = single(torch.tensor([request.time for request in requests]))
    bags[REQUEST_HISTORY] = single(torch.tensor(row_of_request))
    for history in schema.histories:
        times = [requests[row].events_by_history[history.name].columns[TIME] for row in firsts]
        bags[history_key(history.name, TIME)] = jagged(times)
    bags[candidate_key(ITEM)] = single(torch.cat([r.candidate_items for r in requests]))
    for column in schema.item_attributes:
        bags[candidate_key(column)] = joined([r.candidate_bags[column] for r in requests])
    return bags


def _without_candidates(bags: dict[str, Bags], schema: FeatureSchema) -> Batch:
    nobody = torch.empty(0, dtype=torch.int64)
    return assemble(bags, nobody, torch.empty(0, schema.num_dense), torch.empty(0))


def _history_bags(
    events_by_history: Sequence[Mapping[str, Events]], schema: FeatureSchema
) -> dict[str, Bags]:
    bags = {}
    for history in schema.histories:
        events = [by_history[history.name] for by_history in events_by_history]
        for column in (*schema.event_columns, TIME):
            bags[history_key(history.name, column)] = jagged([e.columns[column] for e in events])
        for column in schema.item_attributes:
            bags[history_key(history.name, column)] = joined([e.bags[column] for e in events])
    return bags


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


def _taken(values: Column, places: list[int]) -> Column:
    if isinstance(values, np.ndarray):
        return values[places]
    cells = values.cells() if isinstance(values, Ragged) else values
    return [cells[place] for place in places]


def _events(history: History, columns: dict[str, Column], schema: FeatureSchema) -> Events:
    """One history of a request, as rows."""
    places = history.places(columns[ACTION] if history.actions else columns[TIME])
    first = places[0] if places else len(columns[TIME])
    if len(places) == len(columns[TIME]) - first:
        read = {column: values[first:] for column, values in columns.items()}
    else:
        read = {column: _taken(values, places) for column, values in columns.items()}
    return Events(
        {c: _rows(read[c], schema, c, f"history.{c}") for c in schema.event_columns}
        | {TIME: _times(read[TIME])},
        {c: _bags(read[c], schema, c, f"history.{c}") for c in schema.item_attributes},
        history.window.start(history.num_events(columns[ACTION if history.actions else TIME])),
    )


def _candidates(raw: Mapping[str, Any], schema: FeatureSchema, time: int) -> dict[str, Any]:
    """What a request has of its candidates, by the names of its attributes."""
    names = (ITEM, *schema.item_attributes, *schema.item_floats)
    columns = _columns(_group(raw, "candidates", names), "candidates", names)
    if len(columns[ITEM]) > MAX_CANDIDATES:
        raise RequestError(
            f"candidates has {len(columns[ITEM])} rows; at most {MAX_CANDIDATES} are allowed"
        )
    return {
        "candidate_items": _rows(columns[ITEM], schema, ITEM, f"candidates.{ITEM}"),
        "candidate_bags": {
            c: _bags(columns[c], schema, c, f"candidates.{c}") for c in schema.item_attributes
        },
        "dense": _dense(columns, schema, time),
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the key {_shown(twice)} stands twice in one object")
    return decoded


def _shown(value: Any) -> str:
    """A value as a message may hold it: short, whatever its size and depth."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return _cut(repr(value))
    except ValueError:
        return "an integer that Python does not print"  # It has more than 4300 digits.


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _need(group: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in group:
        raise RequestError(f"{where} has no {name!r}; it has {_cut(str(sorted(group)))}")
    return group[name]


def _group(raw: Mapping[str, Any], name: str, columns: Sequence[str]) -> Mapping[str, Any]:
    if not columns:
        return {}
    group = _need(raw, name, "the request")
    if not isinstance(group, dict):
        raise RequestError(f"{name} is an object of columns; got {type(group).__name__}")
    for column in columns:
        _need(group, column, name)
    return group


def _columns(group: Mapping[str, Any], name: str, columns: Sequence[str]) -> dict[str, Column]:
    """The wanted columns, each a list, all of one length."""
    for column in columns:
        if not isinstance(group[column], list | np.ndarray | Ragged):
            raise RequestError(
                f"{name}.{column} is a list, one value a row; got {type(group[column]).__name__}"
            )
    lengths = {column: len(group[column]) for column in columns}
    if len(set(lengths.values())) > 1:
        raise RequestError(f"the columns of {name} differ in length: {lengths}")
    return {column: group[column] for column in columns}


def _request_id(value: Any) -> str | int | None:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return value
    raise RequestError(f"request_id is text or an integer; got {_shown(value)}")


def _id(value: Any, column: str) -> str:
    """One raw id as text."""
    # The type itself, not isinstance: a bool is an int to Python, and no id.
    if type(value) is str and value:
        return value
    if type(value) is int and value >= 0:
        return str(value)
    raise RequestError(f"{column} holds {_shown(value)}; an id is an integer from 0 or a text")


def _check_ids(values: list[Any], column: str) -> None:
    # A history has thousands: what can be said of all at once is not asked of each.
    kinds = set(map(type, values))
    if kinds <= {str, NoneType} and "" not in values:
        return
    if kinds == {int} and min(values) >= 0:
        return
    for value in values:
        if value is not None:
            _id(value, column)


def _rows(values: Column, schema: FeatureSchema, column: str, name: str) -> Tensor:
    vocabulary = schema.vocabulary_by_column[column]
    if isinstance(values, np.ndarray):
        if values.size:
            _id(int(values.min()), name)
        return torch.from_numpy(vocabulary.rows_of_array(values))
    _check_ids(values, name)
    return _integers(vocabulary.rows(values))


def _integers(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))  # 2 x as fast as torch.tensor


def _bag(value: Any, schema: FeatureSchema, column: str, name: str) -> Tensor:
    """Rows of one multi-valued cell; a single id stands for a list of one, null for none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return _rows(values, schema, column, name)


def _bags(values: Column, schema: FeatureSchema, column: str, name: str) -> Bags:
    if isinstance(values, Ragged):
        lengths = torch.from_numpy(values.lengths.copy())
        return Bags(_rows(values.values, schema, column, name), lengths)
    cells = values
    if set(map(type, values)) != {list}:
        cells = [v if isinstance(v, list) else [] if v is None else [v] for v in values]
    flat = _rows(list(chain.from_iterable(cells)), schema, column, name)
    return Bags(flat, _integers(list(map(len, cells))))


def _time(value: Any, column: str) -> int:
    number = _number(value, column)
    if not 0 <= number <= MAX_TIME:
        raise RequestError(
            f"{column} is {_shown(value)}; Unix seconds from 0 to {MAX_TIME} are allowed"
        )
    return int(number)


def _times(values: Column) -> Tensor:
    if isinstance(values, np.ndarray):
        for least_or_most in (values.min(), values.max()) if values.size else ():
            _time(int(least_or_most), f"history.{TIME}")
        return torch.from_numpy(values.copy())  # It may be part of a message, and read-only.
    is_plain = set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_TIME
    return _integers(values if is_plain else [_time(value, f"history.{TIME}") for value in values])


def _number(value: Any, column: str) -> float:
    # Integers of any length are JSON; those beyond a float are no number of ours.
    if type(value) in (int, float) and abs(value) <= MAX_FLOAT and math.isfinite(value):
        return value
    raise RequestError(f"{column} holds {_shown(value)}; a finite number is allowed")


def _floats(values: Column, column: str) -> Column:
    if isinstance(values, np.ndarray):
        is_good = np.abs(values) <= MAX_FLOAT
        return values if is_good.all() else [_number(value, column) for value in values.tolist()]
    is_plain = values and set(map(type, values)) <= {int, float}
    # NaN compares with nothing, but it is in every sum that it is in.
    if is_plain and max(map(abs, values)) <= MAX_FLOAT and not math.isnan(sum(values)):
        return values
    return [_number(value, column) for value in values]


def _dense(candidates: dict[str, list[Any]], schema: FeatureSchema, time: int) -> Tensor:
    num_candidates = len(candidates[ITEM])
    clock = np.repeat(clock_features(np.array([time])), num_candidates, axis=0)
    floats = [_floats(candidates[column], f"candidates.{column}") for column in schema.item_floats]
    columns = np.array(floats, dtype=np.float64).reshape(len(floats), num_candidates).T
    return torch.from_numpy(np.concatenate([clock, squash(columns)], axis=1))
