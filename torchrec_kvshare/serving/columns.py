"""Raw requests as named tensors, for protocols that carry tensors.

Ids stay raw, as in the JSON format; an empty text is JSON's null. This file checks names, datatypes
and lengths, so that the tensors can be cut into requests; ``parse_request`` checks the values.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features.decode import cut, shown
from torchrec_kvshare.features.parse import UNKNOWN_IDS, Ragged
from torchrec_kvshare.features.schema import (
    FIRST_EVENT,
    HISTORY,
    ITEM,
    RESERVED_TASK,
    TIME,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    event_key,
    history_key,
    item_key,
    score_name,
)
from torchrec_kvshare.scoring.engine import Answer

INT64, BYTES, FP32, FP64, BOOL = "INT64", "BYTES", "FP32", "FP64", "BOOL"
DTYPE_BY_DATATYPE: dict[str, np.dtype[Any]] = {
    INT64: np.dtype(np.int64),
    BYTES: np.dtype(object),  # each element is bytes
    FP32: np.dtype(np.float32),
    FP64: np.dtype(np.float64),
    BOOL: np.dtype(np.bool_),
}
DATATYPE_BY_DTYPE = {dtype: datatype for datatype, dtype in DTYPE_BY_DATATYPE.items()}

INTEGER_IDS, TEXT_IDS = (INT64, BYTES, FP64, BOOL), (BYTES, INT64, FP64, BOOL)
FLOATS = (FP32, FP64)
FIRST_EVENT_COLUMN = history_key(HISTORY, FIRST_EVENT)
SCORE_LENGTHS = score_name(RESERVED_TASK)


@dataclass(frozen=True)
class ColumnSpec:
    """One input or output tensor.

    Attributes:
        name: in messages.
        datatypes: allowed names of the Open Inference Protocol; the metadata name the first.
        shape: sizes, -1 for a size that depends on the request.
        is_optional: whether a message may omit it.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...] = (-1,)
    is_optional: bool = False


@dataclass(frozen=True)
class RequestLimits:
    """The most that one message or request may hold, whatever the model reads of it.

    Attributes:
        requests: of one message.
        candidates: of one request.
        events: of one request, before its history is cut to the window.
        values: ids of one request in one multi-valued column, over all events or candidates.
    """

    requests: int
    candidates: int
    events: int
    values: int


def column_specs(schema: FeatureSchema) -> list[ColumnSpec]:
    """Return the input tensors of a model.

    ::

        # B requests with T events and C candidates in all
        # user_id, time                                          [B]
        # context.<column>.values, .lengths                      [ids], [B]
        # context.<float>.values                                [B]
        # history.item_id.values, .lengths                       [T], [B]
        # history.<event attribute>, <event float>, time alike   [T], [B]
        # history.<attribute>.values, .lengths                   [ids], [T]
        # history.first_event, optional                          [B]
        # candidates.item_id.values, .lengths; floats alike      [C], [B]
        # candidates.<attribute>.values, .lengths                [ids], [C]

    Args:
        schema: the model's columns.

    Returns:
        The specifications, in the order above. The first datatype of ids is BYTES if the column may
        have a text that is no integer of 64 bits.
    """

    def ids(key: str) -> tuple[str, ...]:
        return TEXT_IDS if schema.vocabulary_by_column[key].has_text else INTEGER_IDS

    specs = [ColumnSpec(USER, ids(USER)), ColumnSpec(TIME, (INT64,))]

    def add(key: str, datatypes: tuple[str, ...]) -> None:
        specs.append(ColumnSpec(f"{key}.values", datatypes))
        specs.append(ColumnSpec(f"{key}.lengths", (INT64,)))

    for column in schema.context:
        add(context_key(column), ids(context_key(column)))
    for column in schema.context_floats:
        specs.append(ColumnSpec(f"{context_key(column)}.values", FLOATS))
    for column in schema.event_columns:
        add(history_key(HISTORY, column), ids(event_key(column)))
    for column in schema.event_floats:
        add(history_key(HISTORY, column), FLOATS)
    add(history_key(HISTORY, TIME), (INT64,))
    for column in schema.item_attributes:
        add(history_key(HISTORY, column), ids(item_key(column)))
    if not any(history.actions for history in schema.histories):
        specs.append(ColumnSpec(FIRST_EVENT_COLUMN, (INT64,), is_optional=True))
    add(candidate_key(ITEM), ids(ITEM))
    for column in schema.item_floats:
        add(candidate_key(column), FLOATS)
    for column in schema.item_attributes:
        add(candidate_key(column), ids(item_key(column)))
    return specs


def output_specs(schema: FeatureSchema) -> list[ColumnSpec]:
    """Return the output tensors: each task's scores of all candidates, and what the cache did."""
    return [
        *(ColumnSpec(score_name(task), (FP64,)) for task in schema.tasks),
        ColumnSpec(SCORE_LENGTHS, (INT64,)),
        ColumnSpec("cache.status", (BYTES,)),
        ColumnSpec("cache.reason", (BYTES,)),
        ColumnSpec("cache.tier", (BYTES,)),
        ColumnSpec("cache.cached_events", (INT64,)),
        ColumnSpec("cache.computed_events", (INT64,)),
        ColumnSpec("cache.staleness_s", (FP64,)),
    ]


def column_tensors(
    raws: Sequence[Mapping[str, Any]], schema: FeatureSchema
) -> dict[str, NDArray[Any]]:
    """Convert raw requests to the tensors of ``column_specs``, in its order.

    Args:
        raws: as ``parse_request`` takes them; fractions of a second are cut off.
        schema: the model's columns.

    Returns:
        Tensors by name. A column of integers only is INT64; one with anything else, or an integer
        beyond 64 bits, is BYTES. ``history.first_event`` is there if any request has it.

    Raises:
        RequestError: if a text has no UTF-8 form, or an id is not a finite number.

    Example:
        >>> from torchrec_kvshare.features.schema import History, Vocabulary, Window
        >>> vocabularies = {"user_id": Vocabulary([]), "item_id": Vocabulary([])}
        >>> histories = (History("history", Window(8, 4)),)
        >>> schema = FeatureSchema(vocabularies, histories=histories)
        >>> raw = {"user_id": 7, "time": 50, "history": {"item_id": [3, 9], "time": [10, 40]},
        ...        "candidates": {"item_id": ["new", None]}}
        >>> for name, tensor in column_tensors([raw], schema).items():
        ...     print(name, tensor.tolist())
        user_id [7]
        time [50]
        history.item_id.values [3, 9]
        history.item_id.lengths [2]
        history.time.values [10, 40]
        history.time.lengths [2]
        candidates.item_id.values [b'new', b'']
        candidates.item_id.lengths [2]
    """
    tensors: dict[str, NDArray[Any]] = {}

    def add(key: str, rows: list[list[Any]]) -> None:
        tensors[f"{key}.values"] = _tensor([value for row in rows for value in row], key, schema)
        tensors[f"{key}.lengths"] = _integers([len(row) for row in rows])

    def add_group(group: str, columns: Sequence[str]) -> None:
        for column in columns:
            add(f"{group}.{column}", [raw[group][column] for raw in raws])
        for column in schema.item_attributes:
            cells = [_cell(value) for raw in raws for value in raw[group][column]]
            add(f"{group}.{column}", cells)

    tensors[USER] = _ids([raw[USER] for raw in raws], USER)
    tensors[TIME] = _integers([raw[TIME] for raw in raws])
    for column in schema.context:
        add(context_key(column), [_cell(raw["context"][column]) for raw in raws])
    for column in schema.context_floats:
        numbers = [raw["context"][column] for raw in raws]
        tensors[f"{context_key(column)}.values"] = np.array(numbers, dtype=np.float64)
    add_group(HISTORY, (*schema.event_columns, *schema.event_floats, TIME))
    if any(FIRST_EVENT in raw[HISTORY] for raw in raws):
        first_events = [raw[HISTORY].get(FIRST_EVENT) or 0 for raw in raws]
        tensors[FIRST_EVENT_COLUMN] = _integers(first_events)
    add_group("candidates", (ITEM, *schema.item_floats))
    return tensors


def raw_requests(
    tensors: Mapping[str, NDArray[Any]], schema: FeatureSchema, max_requests: int
) -> list[dict[str, Any]]:
    """Cut tensors into raw requests, whose values ``parse_request`` checks.

    Args:
        tensors: by the names of ``column_specs``; elements of an object array are bytes.
        schema: the model's columns.
        max_requests: of one message.

    Returns:
        One request per element of ``user_id``, without a ``request_id``. Columns of texts are
        lists, others arrays or ``Ragged``.

    Raises:
        RequestError: naming the tensor, what came and what was allowed.
    """
    _check_inputs(tensors, column_specs(schema))
    num_requests = tensors[USER].size
    first_events = tensors.get(FIRST_EVENT_COLUMN, np.zeros(num_requests, np.int64))
    if not 1 <= num_requests <= max_requests:
        raise RequestError(
            f"{USER} has {num_requests} elements; 1 to {max_requests} are allowed, one per request"
        )
    floats = {c: tensors[f"{context_key(c)}.values"] for c in schema.context_floats}
    one_each = {TIME: tensors[TIME], FIRST_EVENT_COLUMN: first_events}
    one_each |= {f"{context_key(column)}.values": values for column, values in floats.items()}
    for name, tensor in one_each.items():
        if tensor.size != num_requests:
            raise RequestError(
                f"{name} has {tensor.size} elements; {USER} has {num_requests}, one per request"
            )
    context = {c: _rows(tensors, context_key(c), num_requests) for c in schema.context}
    columns = (*schema.event_columns, *schema.event_floats, TIME)
    history = _group(tensors, HISTORY, columns, schema, num_requests)
    columns = (ITEM, *schema.item_floats)
    candidates = _group(tensors, "candidates", columns, schema, num_requests)
    return [
        {
            USER: user_id,
            TIME: time,
            "context": {column: _as_list(rows[row]) for column, rows in context.items()}
            | {column: values[row].item() for column, values in floats.items()},
            "history": {column: rows[row] for column, rows in history.items()}
            | {FIRST_EVENT: int(first_events[row])},
            "candidates": {column: rows[row] for column, rows in candidates.items()},
        }
        for row, (user_id, time) in enumerate(
            zip(_as_list(_listed(tensors, USER)), tensors[TIME].tolist(), strict=True)
        )
    ]


def raw_candidates(tensors: Mapping[str, NDArray[Any]], schema: FeatureSchema) -> dict[str, Any]:
    """Convert the tensors of one group of candidates, whose user came before.

    Args:
        tensors: by the names of ``column_specs``, of candidates only.
        schema: the model's columns.

    Returns:
        A raw request's ``candidates``, for ``parse_candidates``.

    Raises:
        RequestError: naming the tensor, what came and what was allowed.
    """
    prefix = candidate_key("")
    _check_inputs(tensors, [s for s in column_specs(schema) if s.name.startswith(prefix)])
    columns = _group(tensors, "candidates", (ITEM, *schema.item_floats), schema, 1)
    return {"candidates": {column: rows[0] for column, rows in columns.items()}}


def output_tensors(answers: Sequence[Answer]) -> dict[str, NDArray[Any]]:
    """Convert answers of one model to the tensors of ``output_specs``, in its order.

    ``unknown_ids``, one JSON object per request, comes last if any request asked for it.
    """
    uses = [answer.cache for answer in answers]
    unknown_ids = [answer.unknown_ids for answer in answers]
    report = {}
    if any(ids is not None for ids in unknown_ids):
        objects = [json.dumps(ids or {}) for ids in unknown_ids]
        report = {UNKNOWN_IDS: byte_elements(objects, UNKNOWN_IDS)}
    by_task = [answer.scores_by_task for answer in answers]
    scores = {
        score_name(task): np.concatenate([np.array(one[task]) for one in by_task])
        for task in by_task[0]
    }
    return {
        **scores,
        SCORE_LENGTHS: _integers([len(answer.ranking_scores) for answer in answers]),
        "cache.status": byte_elements([use.status for use in uses], "cache.status"),
        "cache.reason": byte_elements([use.reason for use in uses], "cache.reason"),
        "cache.tier": byte_elements([use.tier for use in uses], "cache.tier"),
        "cache.cached_events": _integers([use.cached_events for use in uses]),
        "cache.computed_events": _integers([use.computed_events for use in uses]),
        "cache.staleness_s": np.array([use.staleness_s for use in uses], dtype=np.float64),
    } | report


def check_limits(raw: Mapping[str, Any], limits: RequestLimits) -> None:
    """Refuse a request that is too long, before its columns are parsed.

    Args:
        raw: a raw request, or a part of one; ``parse_request`` refuses anything that is no column.
        limits: of one request.

    Raises:
        RequestError: naming the column, what came and what was allowed.
    """
    for name, ids in _columns(raw, "context"):
        _check_limit(name, len(ids), limits.values, "ids")
    for name, cells in _columns(raw, HISTORY):
        _check_limit(name, len(cells), limits.events, "events")
        _check_limit(name, _num_ids(cells), limits.values, "ids")
    for name, cells in _columns(raw, "candidates"):
        _check_limit(name, len(cells), limits.candidates, "candidates")
        _check_limit(name, _num_ids(cells), limits.values, "ids")


def datatype_of(tensor: NDArray[Any]) -> str:
    """Return the protocol's name of an array's dtype, or NumPy's name if the protocol has none."""
    return DATATYPE_BY_DTYPE.get(tensor.dtype) or str(tensor.dtype)


def byte_elements(texts: Sequence[str], name: str) -> NDArray[Any]:
    """Convert texts to a BYTES tensor.

    Args:
        texts: one per element.
        name: of the tensor, for the error.

    Returns:
        [len(texts)] object, the texts in UTF-8.

    Raises:
        RequestError: if a text has a lone surrogate.
    """
    try:
        return np.array([text.encode() for text in texts], dtype=object)
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        raise RequestError(f"{name} holds {letter!r}, which UTF-8 cannot encode") from error


# --- raw requests to tensors


def _tensor(values: list[Any], key: str, schema: FeatureSchema) -> NDArray[Any]:
    if key == history_key(HISTORY, TIME):
        return _integers(values)
    floats = [*map(candidate_key, schema.item_floats)]
    floats += [history_key(HISTORY, column) for column in schema.event_floats]
    if key in floats:
        return np.array(values, dtype=np.float64)
    return _ids(values, key)


def _cell(value: Any) -> list[Any]:
    """Return a multi-valued cell as a list; a single id is a list of one, null an empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _integers(values: list[Any]) -> NDArray[Any]:
    return np.array(values, dtype=np.int64)


def _ids(values: list[Any], name: str) -> NDArray[Any]:
    if set(map(type, values)) <= {int}:
        try:
            return _integers(values)
        except OverflowError:
            pass  # An integer and its text are the same id.
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{name} holds {value}; an id must be finite")
    return byte_elements(["" if value is None else str(value) for value in values], name)


# --- tensors to raw requests


def _check_inputs(tensors: Mapping[str, NDArray[Any]], specs: list[ColumnSpec]) -> None:
    datatypes_by_name = {spec.name: spec.datatypes for spec in specs}
    for name, tensor in tensors.items():
        if name not in datatypes_by_name:
            raise RequestError(
                f"{shown(name)} is no input of the model; its inputs are {list(datatypes_by_name)}"
            )
        datatypes = datatypes_by_name[name]
        if datatype_of(tensor) not in datatypes:
            raise RequestError(
                f"{name} is {datatype_of(tensor)}; {' or '.join(datatypes)} is allowed"
            )
        if tensor.ndim != 1:
            raise RequestError(f"{name} has {tensor.ndim} dimensions; 1 is allowed")
    missing = [spec.name for spec in specs if spec.name not in tensors and not spec.is_optional]
    if missing:
        raise RequestError(f"the input {missing[0]} is missing; these came: {list(tensors)}")


def _group(
    tensors: Mapping[str, NDArray[Any]],
    group: str,
    columns: Sequence[str],
    schema: FeatureSchema,
    num_requests: int,
) -> dict[str, list[Any]]:
    """Cut the columns of events or candidates into requests."""
    rows = {column: _rows(tensors, f"{group}.{column}", num_requests) for column in columns}
    item_offsets = _offsets(tensors, f"{group}.{ITEM}", num_requests)
    for column in schema.item_attributes:
        key = f"{group}.{column}"
        offsets = _offsets(tensors, key, item_offsets[-1])
        values, lengths = _listed(tensors, f"{key}.values"), tensors[f"{key}.lengths"]
        rows[column] = [
            Ragged(values[offsets[first] : offsets[last]], lengths[first:last])
            for first, last in pairwise(item_offsets)
        ]
    return rows


def _rows(tensors: Mapping[str, NDArray[Any]], key: str, num_rows: int) -> list[Any]:
    """Cut the values of one feature into rows by its lengths."""
    values = _listed(tensors, f"{key}.values")
    return [values[first:last] for first, last in pairwise(_offsets(tensors, key, num_rows))]


def _offsets(tensors: Mapping[str, NDArray[Any]], key: str, num_rows: int) -> list[int]:
    """Return the offsets of a feature's rows, starting at 0."""
    num_values, lengths = tensors[f"{key}.values"].size, tensors[f"{key}.lengths"]
    if lengths.size != num_rows:
        raise RequestError(
            f"{key}.lengths has {lengths.size} elements; {num_rows} are allowed, one per request, "
            "event or candidate"
        )
    if lengths.min(initial=0) < 0:
        raise RequestError(f"{key}.lengths holds {lengths.min()}; a length is 0 or more")
    offsets = list(accumulate(lengths.tolist(), initial=0))  # NumPy's integers would wrap.
    if offsets[-1] != num_values:
        raise RequestError(
            f"{key}.lengths sums to {offsets[-1]}; {key}.values has {num_values} elements"
        )
    return offsets


def _listed(tensors: Mapping[str, NDArray[Any]], name: str) -> Any:
    """Return texts as a list, as in JSON, and numbers as an array."""
    tensor = tensors[name]
    return _texts(tensor.tolist(), name) if tensor.dtype == object else tensor


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else values.tolist()


def _texts(elements: list[bytes], name: str) -> list[Any]:
    try:
        # Decoding all at once takes half the time; the count tells if a text has the separator.
        texts: list[Any] = b"\0".join(elements).decode().split("\0")
        if len(texts) != len(elements):
            texts = [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        raise RequestError(f"{name} holds the byte {byte!r}, which is not UTF-8") from error
    return [text or None for text in texts] if "" in texts else texts


# --- limits


def _columns(raw: Mapping[str, Any], group: str) -> list[tuple[str, Any]]:
    """Return the columns of a group that are lists or arrays."""
    columns = raw.get(group)
    if not isinstance(columns, dict):
        return []
    return [
        (f"{group}.{cut(str(name))}", column)
        for name, column in columns.items()
        if isinstance(column, list | np.ndarray | Ragged)
    ]


def _num_ids(column: Any) -> int:
    """Return the number of ids in a multi-valued column."""
    if isinstance(column, Ragged):
        return len(column.values)
    cells = column if isinstance(column, list) else []
    return sum(len(cell) for cell in cells if type(cell) is list)


def _check_limit(name: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise RequestError(f"{name} has {count} {unit}; at most {most} are allowed")
