"""Check raw requests: the one place where outside input is validated.

A request that passed ``parse_request`` holds only table rows and finite numbers, its histories cut
to their windows, so that no later code checks again. Raw ids are spelt as ``canonical_id`` does.
"""

import math
import re
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
from torchrec_kvshare.features.hashing import MAX_INT64, IntArray
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
    USER,
    FeatureSchema,
    History,
    candidate_key,
    context_key,
    event_key,
    item_key,
)

USERS, KV_VERSION = "user_ids", "kv_version"
_KV_VERSION = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
MAX_FIRST_EVENT = 2**62  # plus the number of events still an int64
MAX_CANDIDATES = 100_000
MAX_REQUEST_ID = 200  # characters
MAX_BITS = 14_000  # of an integer id, a few less than Python prints

UNKNOWN_IDS = "unknown_ids"
REPORTS = (UNKNOWN_IDS,)  # what a request may ask its answer to include
ID_KINDS = {str, int, float, bool, NoneType}

# A raw column: a list as in JSON, an array, or Ragged.
Column = Any


@dataclass(frozen=True, eq=False)
class Ragged:
    """A multi-valued raw column as values and lengths, which a request may hold instead of lists.

    Attributes:
        values: ids of all cells, in order.
        lengths: [rows] int64, number of ids of each cell.
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
        """Return the column as lists."""
        ends = self.lengths.cumsum().tolist()
        values = self.values if isinstance(self.values, list) else self.values.tolist()
        return [values[first:last] for first, last in pairwise([0, *ends])]


def parse_request(raw: Mapping[str, Any], schema: FeatureSchema) -> Request:
    """Check one request and turn it into table rows.

    Columns that the schema does not name are ignored, so that models that read different columns
    can share one request. Events must be given oldest first and be strictly before the request's
    time, as in training. A column is a list, an array or ``Ragged``; ids and times in int64 arrays
    are read without a Python object for each.

    Args:
        raw: the decoded request, in the project's one request format.
        schema: the model's columns.

    Returns:
        The request, its histories cut to their windows.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    return _request(raw, schema, _time(_need(raw, TIME, "the request"), TIME))


def parse_candidates(raw: Mapping[str, Any], user: Request, schema: FeatureSchema) -> Request:
    """Check candidates of a user that was parsed before.

    Args:
        raw: ``candidates`` as in a request, and optionally another ``time``.
        user: the parsed user.
        schema: the model's columns.

    Returns:
        The user's request with these candidates.

    Raises:
        RequestError: naming the column, what came and what was allowed; also if neither ``raw`` nor
            the user has a time, or the time is not after the user's events.
    """
    time = _time(raw[TIME], TIME) if TIME in raw else user.time
    if time == NO_TIME:
        raise RequestError(f"the candidates have no {TIME!r}, and neither has their user")
    if time <= user.newest:
        raise RequestError(f"time is {time}, not after the user's newest event at {user.newest}")
    candidates = _candidates(raw, schema, time, user.context_floats)
    return _checked(replace(user, time=time, **candidates))


def parse_user(raw: Mapping[str, Any], schema: FeatureSchema) -> Request:
    """Check a user whose history is to be encoded: a request without candidates.

    Args:
        raw: as a request; without ``time``, event times are not bounded; candidates are not read.
        schema: the model's columns.

    Returns:
        The request, its histories cut to their windows.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    columns = (ITEM, *schema.item_attributes, *schema.item_floats)
    time = _time(raw[TIME], TIME) if TIME in raw else NO_TIME
    return _request({**raw, "candidates": {c: [] for c in columns}}, schema, time)


def parse_forget(raw: Mapping[str, Any]) -> str:
    """Return the canonical id of the user to forget, from a message ``{"user_id": …}``.

    Raises:
        RequestError: naming the key, what came and what was allowed.
    """
    user_id = _id(_need(raw, USER, "the request"), USER)
    if len(raw) > 1:
        raise RequestError(f"the request has {cut(str(sorted(raw)))}; {USER!r} alone is allowed")
    return user_id


def append_events(user: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Append new events to a raw user, as a change feed tells them.

    Args:
        user: as ``user_columns`` returns it.
        raw: a message ``{"user_id": …, "history": {…}}`` with the columns of the user's history.

    Returns:
        The user with these events last, and without a time, which events may be after.

    Raises:
        RequestError: naming the column that is missing or no list.

    Example:
        >>> user = {"user_id": 7, "time": 50, "history": {"item_id": [3], "time": [40]}}
        >>> append_events(user, {"history": {"item_id": [9], "time": [60]}})
        {'user_id': 7, 'history': {'item_id': [3, 9], 'time': [40, 60]}}
    """
    added = _need(raw, "history", "the request")
    if not isinstance(added, Mapping):
        raise RequestError(f"history is {shown(added)}; an object of columns is allowed")
    history = {}
    for name, column in user["history"].items():
        if name == FIRST_EVENT:
            history[name] = column
            continue
        cells = _need(added, name, "history")
        if not isinstance(cells, list):
            raise RequestError(f"history.{name} holds {shown(cells)}; a list is allowed")
        known = column.cells() if isinstance(column, Ragged) else column
        history[name] = [*(known.tolist() if isinstance(known, np.ndarray) else known), *cells]
    return {name: value for name, value in user.items() if name != TIME} | {"history": history}


def parse_events_user(raw: Mapping[str, Any]) -> str:
    """Return the canonical id of the user of a message of ``append_events``.

    Raises:
        RequestError: naming the key, what came and what was allowed.
    """
    return _id(_need(raw, USER, "the request"), USER)


def parse_pin(raw: Mapping[str, Any]) -> list[str]:
    """Return the canonical ids of users to pin or unpin, from a message ``{"user_ids": […]}``.

    Raises:
        RequestError: naming the key, what came and what was allowed.
    """
    user_ids = _need(raw, USERS, "the request")
    if len(raw) > 1:
        raise RequestError(f"the request has {cut(str(sorted(raw)))}; {USERS!r} alone is allowed")
    if not isinstance(user_ids, list):
        raise RequestError(f"{USERS} holds {shown(user_ids)}; a list of ids is allowed")
    return [_id(user_id, USERS) for user_id in user_ids]


def parse_clear(raw: Mapping[str, Any]) -> str:
    """Return the version of K/V to clear, from a message ``{"kv_version": "<model>-<tables>"}``.

    Raises:
        RequestError: naming the key, what came and what was allowed.
    """
    version = _need(raw, KV_VERSION, "the request")
    if len(raw) > 1:
        raise RequestError(
            f"the request has {cut(str(sorted(raw)))}; {KV_VERSION!r} alone is allowed"
        )
    if not isinstance(version, str) or not _KV_VERSION.fullmatch(version):
        raise RequestError(
            f"{KV_VERSION} holds {shown(version)}; two digests of 16 digits are allowed, as "
            "/v1/state shows them"
        )
    return version


def user_columns(raw: Mapping[str, Any], schema: FeatureSchema) -> dict[str, Any]:
    """Return the raw columns that ``parse_user`` reads.

    Args:
        raw: a request that passed ``parse_request``.
        schema: the model's columns.

    Returns:
        The user, the time, the context, and all events with the schema's columns.
    """
    names = (*schema.event_columns, *schema.event_floats, *schema.item_attributes)
    names = (*names, TIME, FIRST_EVENT)
    history = {name: raw["history"][name] for name in names if name in raw["history"]}
    columns = (*schema.context, *schema.context_floats)
    context = {name: raw["context"][name] for name in columns}
    return {USER: raw[USER], TIME: raw[TIME], "context": context, "history": history}


def check_request_id(request_id: str | int, name: str) -> None:
    """Refuse an id of a request or a message with more than ``MAX_REQUEST_ID`` characters.

    Args:
        request_id: as it came.
        name: the field that holds it, for the error.

    Raises:
        RequestError: naming the length and the limit.
    """
    _check_length(request_id, name, MAX_REQUEST_ID)


def request_id_of(raw: Any) -> str | int | None:
    """Return the request id for the answer, also where the request itself is refused.

    Args:
        raw: what came as a request.

    Returns:
        The id, or None if it is missing or invalid.
    """
    try:
        return _request_id(raw.get("request_id") if isinstance(raw, dict) else None)
    except RequestError:
        return None


def sort_history(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sort the events of a raw request by time, stably.

    Args:
        raw: a request, or what came as one; ``parse_request`` checks it afterwards.

    Returns:
        The request with all columns of its history sorted; ``raw`` itself if the events are in
        order or the times cannot be compared.

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
    order = sorted(range(len(times)), key=lambda index: times[index] // 1)  # in whole seconds
    if order == list(range(len(times))):
        return raw
    columns = {
        name: _taken(column, order)
        if isinstance(column, list | np.ndarray | Ragged) and len(column) == len(order)
        else column
        for name, column in history.items()
    }
    return {**raw, "history": columns}


def _taken(values: Column, indices: list[int]) -> Column:
    if isinstance(values, np.ndarray):
        return values[indices]
    cells = values.cells() if isinstance(values, Ragged) else values
    return [cells[index] for index in indices]


def _request(raw: Mapping[str, Any], schema: FeatureSchema, time: int) -> Request:
    """Parse a request; ``time`` may be ``NO_TIME``."""
    user_id = _id(_need(raw, USER, "the request"), USER)
    context = _group(raw, "context", (*schema.context, *schema.context_floats))
    context_floats = _squashed(
        [[_number(context[c], context_key(c))] for c in schema.context_floats], 1
    ).flatten()
    names = (*schema.event_columns, *schema.event_floats, *schema.item_attributes, TIME)
    group = _group(raw, "history", names)
    history = _columns(group, "history", names)
    history[TIME] = times = _times(history[TIME])
    _check_order(times, MAX_TIME + 1 if time == NO_TIME else time)
    first_event = _first_event(group.get(FIRST_EVENT), schema)
    return _checked(
        Request(
            request_id=_request_id(raw.get("request_id")),
            user_id=user_id,
            user_row=schema.vocabulary_by_column[USER].row(user_id),
            time=time,
            context={c: _bag(context[c], schema, context_key(c)) for c in schema.context},
            context_floats=context_floats,
            events_by_history={
                one.name: _events(one, history, first_event, schema) for one in schema.histories
            },
            newest=int(times[-1]) if times.size else NO_TIME,
            report=_report(raw.get("report")),
            **_candidates(raw, schema, time, context_floats),
        )
    )


def _checked(request: Request) -> Request:
    """Return the request; refuse one whose bags hold too many ids together."""
    if request.num_bag_ids > MAX_REQUEST_IDS:
        raise RequestError(
            f"the request has {request.num_bag_ids} ids in multi-valued columns; at most "
            f"{MAX_REQUEST_IDS} are allowed"
        )
    return request


def _events(
    history: History, columns: dict[str, Column], first_event: int, schema: FeatureSchema
) -> Events:
    """Return one history of a request, as rows."""
    if history.actions:
        indices = _indices(history, columns[ACTION])
        start = history.window.start(len(indices))
        read = {column: _taken(values, indices[start:]) for column, values in columns.items()}
    else:
        start = history.window.start_among(first_event, len(columns[TIME]))
        read = {column: values[start - first_event :] for column, values in columns.items()}
    floats = {
        c: _squashed([_floats(read[c], f"history.{c}")], len(read[TIME])).flatten()
        for c in schema.event_floats
    }
    return Events(
        {c: _rows(read[c], schema, event_key(c), f"history.{c}") for c in schema.event_columns}
        | {TIME: torch.from_numpy(read[TIME].copy())},  # It may be read-only.
        {c: _bags(read[c], schema, item_key(c), f"history.{c}") for c in schema.item_attributes},
        start,
        floats,
    )


def _indices(history: History, actions: Column) -> list[int]:
    """Return the indices of the events whose action the history keeps."""
    listed = actions.tolist() if isinstance(actions, np.ndarray) else actions
    if not set(map(type, listed)) <= {str, NoneType}:
        listed = [None if raw is None else _id(raw, f"history.{ACTION}") for raw in listed]
    chosen = {raw for raw in set(listed) if raw and canonical_id(raw) in history.actions}
    return [index for index, raw in enumerate(listed) if raw in chosen]


def _check_order(times: IntArray, before: int) -> None:
    """Refuse events out of order or not before the request: training never sees such histories."""
    steps_back = times[1:] < times[:-1]
    num_ordered = int(steps_back.argmax()) + 1 if steps_back.any() else times.size
    late = int(np.searchsorted(times[:num_ordered], before))
    if late < num_ordered:
        raise RequestError(
            f"history.{TIME}[{late}] is {times[late]}, not before the request's time {before}"
        )
    if num_ordered < times.size:
        raise RequestError(
            f"history.{TIME}[{num_ordered}] is {times[num_ordered]}, before history.{TIME}"
            f"[{num_ordered - 1}] = {times[num_ordered - 1]}: events are given oldest first"
        )


def _first_event(value: Any, schema: FeatureSchema) -> int:
    """Return the index of the first given event among all of the user's; 0 if not stated."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_FIRST_EVENT:
        raise RequestError(
            f"history.{FIRST_EVENT} is {shown(value)}; an integer from 0 to {MAX_FIRST_EVENT} is "
            "allowed: how many of the user's events are older than those given"
        )
    filtered = [history.name for history in schema.histories if history.actions]
    if value and filtered:
        raise RequestError(
            f"history.{FIRST_EVENT} is {value}; the model's histories {filtered} keep some actions "
            "only, so how many of their events came before is unknown: send all events"
        )
    return value


def _report(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(one in REPORTS for one in value):
        return tuple(value)
    raise RequestError(f"report is {cut(shown(value))}; a list of {list(REPORTS)} is allowed")


def _candidates(
    raw: Mapping[str, Any], schema: FeatureSchema, time: int, context_floats: Tensor
) -> dict[str, Any]:
    """Return the candidates as keyword arguments of ``Request``."""
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
        "dense": _dense(columns, schema, time, context_floats),
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
    """Return the wanted columns, all of the same length."""
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
    """Return the canonical form of a raw id."""
    _check_id(value, column)
    return canonical_id(value)


def _check_id(value: Any, column: str) -> None:
    # The exact type: an instance of a subclass, such as np.float64, is not an id.
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
    """Refuse a text, or an integer as printed, that has too many characters."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        length = int(math.log10(abs(value))) + 1  # too long for Python to print
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

    def check(new: list[Any]) -> None:
        # A history has thousands of ids: usual ones are checked together.
        kinds = set(map(type, new))
        is_usual = kinds == {int} and max(new) < MAX_INT64 and min(new) > -MAX_INT64
        if kinds == {str}:
            text = "".join(new)
            is_short = len(max(new, key=len)) <= MAX_ID_CHARACTERS
            is_usual = is_short and all(map(str.strip, new)) and "e+" not in text
        if not is_usual:
            for value in new:
                _check_id(value, name)

    return torch.from_numpy(np.array(vocabulary.rows(values, check), dtype=np.int64))


def _integers(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))  # twice as fast as torch.tensor


def _bag(value: Any, schema: FeatureSchema, column: str) -> Tensor:
    """Return the rows of one multi-valued cell; a single id is a list of one, null is empty."""
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
    # JSON has integers of any length; those beyond MAX_FLOAT are refused.
    if type(value) in (int, float) and abs(value) <= MAX_FLOAT and math.isfinite(value):
        return value
    raise RequestError(f"{column} holds {shown(value)}; a finite number is allowed")


def _floats(values: Column, column: str) -> Column:
    if isinstance(values, np.ndarray):
        is_good = np.abs(values) <= MAX_FLOAT
        return values if is_good.all() else [_number(value, column) for value in values.tolist()]
    is_plain = values and set(map(type, values)) <= {int, float}
    # A comparison misses NaN; a sum does not.
    if is_plain and max(map(abs, values)) <= MAX_FLOAT and not math.isnan(sum(values)):
        return values
    return [_number(value, column) for value in values]


def _dense(
    candidates: dict[str, list[Any]], schema: FeatureSchema, time: int, context_floats: Tensor
) -> Tensor:
    num_candidates = len(candidates[ITEM])
    clock = torch.from_numpy(clock_features(np.array([time])))
    of_request = torch.cat([clock, context_floats[None]], dim=1)
    floats = [_floats(candidates[column], candidate_key(column)) for column in schema.item_floats]
    of_items = _squashed(floats, num_candidates)
    return torch.cat([of_request.expand(num_candidates, -1), of_items], dim=1)


def _squashed(columns: list[Column], num_rows: int) -> Tensor:
    """Return checked columns of floats as [rows, columns] float32."""
    values = np.array(columns, dtype=np.float64).reshape(len(columns), num_rows)
    return torch.from_numpy(squash(values.T))
