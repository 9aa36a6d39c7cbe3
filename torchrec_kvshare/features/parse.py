"""Requests in, TorchRec batches out; the one place where outside input is checked.

A request that passed ``parse_request`` holds table rows and finite numbers only, cut to the model's
window, so that nothing behind this file checks again. Raw ids are spelt as ``canonical_id`` does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features.bags import Bags
from torchrec_kvshare.features.decode import cut, shown
from torchrec_kvshare.features.dense import clock_features, squash
from torchrec_kvshare.features.ids import canonical_id, is_long_id
from torchrec_kvshare.features.limits import (
    MAX_BAG_IDS,
    MAX_FLOAT,
    MAX_ID_CHARACTERS,
    MAX_REQUEST_IDS,
    MAX_TIME,
)
from torchrec_kvshare.features.request import NO_TIME, Events, Request
from torchrec_kvshare.features.schema import (
    ACTION,
    FIRST_EVENT,
    ITEM,
    TIME,
    UNKNOWN_ROW,
    USER,
    FeatureSchema,
    History,
    IntArray,
    candidate_key,
    context_key,
    item_key,
)

MAX_FIRST_EVENT = 2**62  # with the events behind it still an int64
MAX_CANDIDATES = 100_000
MAX_REQUEST_ID = 200  # characters
MAX_BITS = 14_000  # of an integer id: a few less than Python prints

UNKNOWN_IDS = "unknown_ids"
REPORTS = (UNKNOWN_IDS,)  # what a request may ask its answer to tell
ID_KINDS = {str, int, float, bool, NoneType}

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


def parse_request(raw: Mapping[str, Any], schema: FeatureSchema) -> Request:
    """Check one request and turn it into table rows.

    Columns that the schema does not name are ignored: models that read different columns may share
    one request. Events are given oldest first, all of them before the request's time, as training
    has them. A column is a list, an array or ``Ragged``; ids and times in arrays of int64 are read
    without a Python object for each.

    Args:
        raw: the decoded request, in the project's one request format.
        schema: the model's columns.

    Returns:
        The request, its history cut to the window.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    return _request(raw, schema, _time(_need(raw, TIME, "the request"), TIME))


def parse_candidates(raw: Mapping[str, Any], user: Request, schema: FeatureSchema) -> Request:
    """Check candidates of a user that was parsed before.

    Args:
        raw: ``candidates`` as in a request, and maybe another ``time``.
        user: whose candidates they are.
        schema: the model's columns.

    Returns:
        The user's request with these candidates.

    Raises:
        RequestError: naming the column, what came and what was allowed; a time must come from
            somewhere, and be after the user's events.
    """
    time = _time(raw[TIME], TIME) if TIME in raw else user.time
    if time == NO_TIME:
        raise RequestError(f"there is no {TIME!r} of the candidates, and their user came without")
    if time <= user.newest:
        raise RequestError(f"time is {time}, not after the user's newest event at {user.newest}")
    return _checked(replace(user, time=time, **_candidates(raw, schema, time)))


def parse_user(raw: Mapping[str, Any], schema: FeatureSchema) -> Request:
    """Check a user whose history is to be encoded: a request without candidates.

    Args:
        raw: as a request; ``time`` may be missing, and bounds the events no more then; candidates
            are not read.
        schema: the model's columns.

    Returns:
        The request, its history cut to the window.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    columns = (ITEM, *schema.item_attributes, *schema.item_floats)
    time = _time(raw[TIME], TIME) if TIME in raw else NO_TIME
    return _request({**raw, "candidates": {c: [] for c in columns}}, schema, time)


def parse_forget(raw: Mapping[str, Any]) -> str:
    """The user whom a message asks to forget, ``{"user_id": …}``, spelt as ``canonical_id`` does.

    Raises:
        RequestError: naming the key, what came and what was allowed.
    """
    user_id = _id(_need(raw, USER, "the request"), USER)
    if len(raw) > 1:
        raise RequestError(f"the request has {cut(str(sorted(raw)))}; {USER!r} alone is allowed")
    return user_id


def user_columns(raw: Mapping[str, Any], schema: FeatureSchema) -> dict[str, Any]:
    """What ``parse_user`` reads of a request that passed ``parse_request``, still raw.

    Args:
        raw: the request.
        schema: the model's columns.

    Returns:
        The user, the time, the context columns and all events with the columns of the schema.
    """
    names = (*schema.event_columns, *schema.item_attributes, TIME, FIRST_EVENT)
    history = {name: raw["history"][name] for name in names if name in raw["history"]}
    context = {name: raw["context"][name] for name in schema.context}
    return {USER: raw[USER], TIME: raw[TIME], "context": context, "history": history}


def check_request_id(request_id: str | int, name: str) -> None:
    """Refuse the id of a request or a message that has more than ``MAX_REQUEST_ID`` characters.

    Args:
        request_id: as it came.
        name: of what holds it, for the error.

    Raises:
        RequestError: naming the length and what is allowed.
    """
    _check_length(request_id, name, MAX_REQUEST_ID)


def request_id_of(raw: Any) -> str | int | None:
    """The id that the answer to a request tells, of one that may be refused too.

    Args:
        raw: what came for a request.

    Returns:
        The id, or None where there is none or it would be refused.
    """
    try:
        return _request_id(raw.get("request_id") if isinstance(raw, dict) else None)
    except RequestError:
        return None


def sort_history(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A raw request with its events oldest first; events of one time stay in their order.

    Args:
        raw: a request, or what came for one; ``parse_request`` checks it afterwards.

    Returns:
        The request, every column of its history sorted alike; the very object that came where
        events are in order, or no order can be told.

    Example:
        >>> sort_history({"history": {"time": [30, 10, 30], "item_id": ["a", "b", "c"]}})
        {'history': {'time': [10, 30, 30], 'item_id': ['b', 'a', 'c']}}
    """
    history = raw.get("history")
    if not isinstance(history, dict):
        return raw
    times = history.get(TIME)
    if isinstance(times, np.ndarray):
        times = times.tolist()
    if not isinstance(times, list) or not set(map(type, times)) <= {int, float}:
        return raw
    places = sorted(range(len(times)), key=lambda place: times[place] // 1)  # in whole seconds
    if places == list(range(len(times))):
        return raw
    columns = {
        name: _taken(column, places)
        if isinstance(column, list | np.ndarray | Ragged) and len(column) == len(places)
        else column
        for name, column in history.items()
    }
    return {**raw, "history": columns}


def _taken(values: Column, places: list[int]) -> Column:
    if isinstance(values, np.ndarray):
        return values[places]
    cells = values.cells() if isinstance(values, Ragged) else values
    return [cells[place] for place in places]


def _request(raw: Mapping[str, Any], schema: FeatureSchema, time: int) -> Request:
    """A request, or a user without candidates, at a time that is known or ``NO_TIME``."""
    user_id = _id(_need(raw, USER, "the request"), USER)
    context = _group(raw, "context", schema.context)
    names = (*schema.event_columns, *schema.item_attributes, TIME)
    group = _group(raw, "history", names)
    history = _columns(group, "history", names)
    history[TIME] = times = _times(history[TIME])
    _check_order(times, MAX_TIME + 1 if time == NO_TIME else time)
    first_event = _first_event(group.get(FIRST_EVENT), schema)
    return _checked(
        Request(
            _request_id(raw.get("request_id")),
            user_id,
            schema.vocabulary_by_column[USER].row(user_id),
            time,
            {c: _bag(context[c], schema, context_key(c)) for c in schema.context},
            {one.name: _events(one, history, first_event, schema) for one in schema.histories},
            newest=int(times[-1]) if times.size else NO_TIME,
            report=_report(raw.get("report")),
            **_candidates(raw, schema, time),
        )
    )


def _checked(request: Request) -> Request:
    """The request, or an error if its bags are too much together."""
    if request.num_bag_ids > MAX_REQUEST_IDS:
        raise RequestError(
            f"the request has {request.num_bag_ids} ids in multi-valued columns; at most "
            f"{MAX_REQUEST_IDS} are allowed"
        )
    return request


def _events(
    history: History, columns: dict[str, Column], first_event: int, schema: FeatureSchema
) -> Events:
    """One history of a request, as rows."""
    if history.actions:
        places = _places(history, columns[ACTION])
        start = history.window.start(len(places))
        read = {column: _taken(values, places[start:]) for column, values in columns.items()}
    else:
        start = history.window.start_among(first_event, len(columns[TIME]))
        read = {column: values[start - first_event :] for column, values in columns.items()}
    return Events(
        {c: _rows(read[c], schema, c, f"history.{c}") for c in schema.event_columns}
        | {TIME: torch.from_numpy(read[TIME].copy())},  # It may be read-only.
        {c: _bags(read[c], schema, item_key(c), f"history.{c}") for c in schema.item_attributes},
        start,
    )


def _places(history: History, actions: Column) -> list[int]:
    """Which of a user's events are of the history's actions."""
    listed = actions.tolist() if isinstance(actions, np.ndarray) else actions
    if not set(map(type, listed)) <= {str, NoneType}:
        listed = [None if raw is None else _id(raw, f"history.{ACTION}") for raw in listed]
    chosen = {raw for raw in set(listed) if raw and canonical_id(raw) in history.actions}
    return [place for place, raw in enumerate(listed) if raw in chosen]


def _check_order(times: IntArray, before: int) -> None:
    """Refuse a history that training cannot have seen: out of order, or not before the request."""
    steps_back = times[1:] < times[:-1]
    num_ordered = int(steps_back.argmax()) + 1 if steps_back.any() else times.size
    place = int(np.searchsorted(times[:num_ordered], before))
    if place < num_ordered:
        raise RequestError(
            f"history.{TIME}[{place}] is {times[place]}, not before the request's time {before}"
        )
    if num_ordered < times.size:
        raise RequestError(
            f"history.{TIME}[{num_ordered}] is {times[num_ordered]}, before history.{TIME}"
            f"[{num_ordered - 1}] = {times[num_ordered - 1]}: events are given oldest first"
        )


def _first_event(value: Any, schema: FeatureSchema) -> int:
    """Place of the first event given among all of the user's; 0 where a request does not say."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_FIRST_EVENT:
        raise RequestError(
            f"history.{FIRST_EVENT} is {shown(value)}; an integer from 0 to {MAX_FIRST_EVENT} is "
            "allowed: how many of the user's events are older than those given"
        )
    of_actions = [history.name for history in schema.histories if history.actions]
    if value and of_actions:
        raise RequestError(
            f"history.{FIRST_EVENT} is {value}; the model's histories {of_actions} are of some "
            "actions only, and cannot know how many of theirs came before: send all events"
        )
    return value


def _report(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(one in REPORTS for one in value):
        return tuple(value)
    raise RequestError(f"report is {cut(shown(value))}; a list of {list(REPORTS)} is allowed")


def _candidates(raw: Mapping[str, Any], schema: FeatureSchema, time: int) -> dict[str, Any]:
    """What a request has of its candidates, by the names of its attributes."""
    names = (ITEM, *schema.item_attributes, *schema.item_floats)
    columns = _columns(_group(raw, "candidates", names), "candidates", names)
    if len(columns[ITEM]) > MAX_CANDIDATES:
        raise RequestError(
            f"candidates has {len(columns[ITEM])} rows; at most {MAX_CANDIDATES} are allowed"
        )
    return {
        "candidate_items": _rows(columns[ITEM], schema, ITEM, candidate_key(ITEM)),
        "candidate_bags": {
            c: _bags(columns[c], schema, item_key(c), candidate_key(c))
            for c in schema.item_attributes
        },
        "dense": _dense(columns, schema, time),
    }


def _need(group: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in group:
        raise RequestError(f"{where} has no {name!r}; it has {cut(str(sorted(group)))}")
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
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise RequestError(f"request_id is text or an integer; got {shown(value)}")
    if value is not None:
        check_request_id(value, "request_id")
    return value


def _id(value: Any, column: str) -> str:
    """One raw id, spelt the one way that ids are compared."""
    _check_id(value, column)
    return canonical_id(value)


def _check_id(value: Any, column: str) -> None:
    # The type itself: what only derives from one of these is no id of a message.
    kind = type(value)
    is_text, is_number = kind is str and value.strip(), kind is float and math.isfinite(value)
    if kind is bool or (is_text and not is_long_id(value)):
        return
    if not (is_text or is_number or kind is int):
        raise RequestError(
            f"{column} holds {shown(value)}; an id is a text that is not blank, an integer, a "
            "finite number or a boolean"
        )
    _check_length(value if kind is int else canonical_id(value), column, MAX_ID_CHARACTERS)


def _check_length(value: str | int, name: str, most: int) -> None:
    """Refuse a text, or an integer as it is printed, that has too many characters."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        length = int(math.log10(abs(value))) + 1  # Python does not print it.
    else:
        length = len(str(value))
    if length > most:
        raise RequestError(f"{name} has {length} characters; at most {most} are allowed")


def _rows(values: Column, schema: FeatureSchema, column: str, name: str) -> Tensor:
    vocabulary = schema.vocabulary_by_column[column]
    if isinstance(values, np.ndarray):
        if values.dtype == np.int64:
            return torch.from_numpy(vocabulary.rows_of_array(values))
        values = values.tolist()
    kinds = set(map(type, values))
    if not kinds <= ID_KINDS or float in kinds:
        for value in values:
            if value is not None:
                _check_id(value, name)
    rows = np.array(vocabulary.rows(values), dtype=np.int64)
    # A history has thousands of ids, and what the table knows is one: only the others are checked.
    for place in np.flatnonzero(rows == UNKNOWN_ROW).tolist():
        _check_id(values[place], name)
    return torch.from_numpy(rows)


def _integers(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))  # 2 x as fast as torch.tensor


def _bag(value: Any, schema: FeatureSchema, column: str) -> Tensor:
    """Rows of one multi-valued cell; a single id stands for a list of one, null for none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    _check_bags([len(values)], column)
    return _rows(values, schema, column, column)


def _bags(values: Column, schema: FeatureSchema, column: str, name: str) -> Bags:
    if isinstance(values, Ragged):
        _check_bags(values.lengths, name)
        lengths = torch.from_numpy(values.lengths.copy())
        return Bags(_rows(values.values, schema, column, name), lengths)
    cells = values
    if set(map(type, values)) != {list}:
        cells = [v if isinstance(v, list) else [] if v is None else [v] for v in values]
    _check_bags(list(map(len, cells)), name)
    flat = _rows(list(chain.from_iterable(cells)), schema, column, name)
    return Bags(flat, _integers(list(map(len, cells))))


def _check_bags(lengths: Sequence[int] | IntArray, name: str) -> None:
    longest = int(np.max(lengths, initial=0))
    if longest > MAX_BAG_IDS:
        raise RequestError(
            f"a row of {name} has {longest} ids; at most {MAX_BAG_IDS} are allowed in one"
        )


def _time(value: Any, column: str) -> int:
    number = _number(value, column)
    if not 0 <= number <= MAX_TIME:
        raise RequestError(
            f"{column} is {shown(value)}; Unix seconds from 0 to {MAX_TIME} are allowed"
        )
    return int(number)


def _times(values: Column) -> IntArray:
    if isinstance(values, np.ndarray):
        is_plain = values.dtype == np.int64 and values.min(initial=0) >= 0
        if is_plain and values.max(initial=0) <= MAX_TIME:
            return values
        values = values.tolist()
    is_plain = set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_TIME
    times = values if is_plain else [_time(value, f"history.{TIME}") for value in values]
    return np.array(times, dtype=np.int64)


def _number(value: Any, column: str) -> float:
    # Integers of any length are JSON; those beyond a float are no number of ours.
    if type(value) in (int, float) and abs(value) <= MAX_FLOAT and math.isfinite(value):
        return value
    raise RequestError(f"{column} holds {shown(value)}; a finite number is allowed")


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
    floats = [_floats(candidates[column], candidate_key(column)) for column in schema.item_floats]
    columns = np.array(floats, dtype=np.float64).reshape(len(floats), num_candidates).T
    return torch.from_numpy(np.concatenate([clock, squash(columns)], axis=1))
