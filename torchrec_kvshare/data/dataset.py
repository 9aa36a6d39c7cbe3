"""An interaction log, ordered, split, and encoded with the schema of its training split.

``splits`` says which events are for training, validation and testing. Events of a user at the same
time are a set, and none of them sees another: an event sees the ``num_earlier`` strictly earlier
events of its user and nothing else.

Nothing depends on the order of the log's rows: ids are numbered in sorted order, and events of a
user at the same time are ordered by item, attributes of the event, labels, attributes and floats of
their requests, and floats of the event.

A log larger than memory is cut into shards by user (``shards``). A ``Dataset`` is one or several of
them: some users with all their events. Items, actions, vocabularies and codes are the whole log's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.splits import (
    BY_TIME_SHARE,
    TRAIN,
    SplitRule,
    Splits,
    have_all_splits,
    splits_of,
)
from torchrec_kvshare.data.tables import IdColumn, ValueColumn
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.dense import squash
from torchrec_kvshare.features.ids import sorted_ids
from torchrec_kvshare.features.schema import (
    ACTION,
    ITEM,
    MISSING_ROW,
    UNKNOWN_ROW,
    USER,
    FeatureSchema,
    Hashed,
    History,
    IdMap,
    Vocabulary,
    context_key,
    event_key,
    item_key,
)

NO_MAPS: Mapping[str, IdMap] = MappingProxyType({})

Ints = NDArray[np.int64]
CodedColumn = TypeVar("CodedColumn", IdColumn, ValueColumn)


class JaggedRows(NamedTuple):
    """Table rows by owner: owner i has ``values[offsets[i]:offsets[i + 1]]``."""

    values: Ints
    offsets: Ints

    def take(self, owners: Ints) -> tuple[Ints, Ints]:
        """Return the values of the given owners in order, and the number of values of each."""
        lengths = self.offsets[owners + 1] - self.offsets[owners]
        return self.values[ranges(self.offsets[owners], lengths)], lengths


class CodedRows(NamedTuple):
    """Table rows by event: event t has those of ``rows`` whose owner is ``codes[t]``."""

    codes: Ints
    rows: JaggedRows

    def take(self, events: Ints) -> tuple[Ints, Ints]:
        """Return the values of the given events in order, and the number of values of each."""
        return self.rows.take(self.codes[events])


class CodedIds(NamedTuple):
    """Table rows by event, one each: event t has ``row_by_code[codes[t]]``."""

    codes: Ints
    row_by_code: Ints

    def take(self, events: Ints | slice) -> Ints:
        """Return the rows of the given events."""
        return self.row_by_code[self.codes[events]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Some users of a log: events ordered by user, then time, then as the module says.

    Users are numbered from 0 here; ``user_code`` has their codes in the whole log. All else that
    has a code (items, attributes) is the whole log's, and shards of one log share these arrays.

    Attributes:
        log: the same events in the same order, with raw ids and attributes; the codes below index
            its ids.
        schema: columns and vocabularies, built from the training split of the whole log.
        user_code: [U] code of each user in the whole log, ascending within a shard.
        first_event: [U] index of each user's first event in the whole log.
        user_offsets: [U + 1], in events.
        item: [T] item code of each event.
        time: [T] Unix seconds.
        labels: [T, tasks] float32, 1 for a positive event; NaN for none for a task.
        num_earlier: [T] number of events of the same user at strictly earlier times.
        split: [T] ``TRAIN``, ``VALID`` or ``TEST``.
        user_row: [U] table row of each user.
        item_row: [I] table row by item code.
        known_items: item codes of the training split: the catalogue.
        event_attributes: table row of each event, for each event attribute.
        item_attributes: table rows by item code, for each multi-valued item attribute.
        item_floats: [I, F] float32 by item code.
        context: table rows by user, for each user attribute.
        request_context: table rows by event, for each attribute of requests.
        user_floats: [U, F] float32 of each user, squashed.
        request_floats: [T, F] float32 of each event's request, squashed.
        event_floats: [T, F] float32 of each event, squashed.
        indices_by_history: indices of each history's events, ascending.
        num_before_by_history: [T + 1] number of a history's events before each event.
        known_ids: ids of the training split, by column.
        num_colliding_ids: of a hashed column, those of them that share a row with another.
        num_unknown_ids: of a vocabulary that was given, those of them that it does not have.
    """

    log: InteractionLog
    schema: FeatureSchema
    user_code: Ints
    first_event: Ints
    user_offsets: Ints
    item: Ints
    time: Ints
    labels: NDArray[np.float32]
    num_earlier: Ints
    split: NDArray[np.int8]
    user_row: Ints
    item_row: Ints
    known_items: Ints
    event_attributes: dict[str, CodedIds]
    item_attributes: dict[str, JaggedRows]
    item_floats: NDArray[np.float32]
    context: dict[str, JaggedRows]
    request_context: dict[str, CodedRows]
    user_floats: NDArray[np.float32]
    request_floats: NDArray[np.float32]
    event_floats: NDArray[np.float32]
    indices_by_history: dict[str, Ints]
    num_before_by_history: dict[str, Ints]
    known_ids: dict[str, list[str]]
    num_colliding_ids: dict[str, int]
    num_unknown_ids: dict[str, int]

    @property
    def num_users(self) -> int:
        """Number of users of the data set."""
        return len(self.user_offsets) - 1

    @property
    def event_user(self) -> Ints:
        """[T] user of each event, numbered from 0."""
        return self.log.users.codes

    @property
    def is_positive(self) -> NDArray[np.bool_]:
        """[T] whether each event is positive for the first task, which ranks."""
        return np.asarray(self.labels[:, 0] > 0)

    def keys_of(self, events: Ints) -> Ints:
        """Return the indices of events in the whole log, which are the same whatever its shards."""
        return events + (self.first_event - self.user_offsets[:-1])[self.event_user[events]]


def build_dataset(
    log: InteractionLog,
    histories: Sequence[History],
    id_maps: Mapping[str, IdMap] = NO_MAPS,
    rule: SplitRule = BY_TIME_SHARE,
    schema: FeatureSchema | None = None,
) -> Dataset:
    """Order, split and encode a whole log.

    Args:
        log: as a reader returns it.
        histories: the histories that the model reads.
        id_maps: of columns without a vocabulary, by ``user_id``, ``item_id`` or the attribute's
            name; attributes of items, users and events that have one name share it.
        rule: how the events are split.
        schema: to encode with, of the same histories; None: the one that is made of the log.

    Returns:
        The data set; vocabularies that are made of it hold ids of the training split only.

    Raises:
        ConfigError: if a history keeps an action that the log does not have, or there is no such
            column to map.
        DataError: if a label is neither 0 nor 1, a value of a float column is not finite, or the
            log has other columns than the schema.
    """
    _check_numbers(log)
    log = in_canonical_order(log)
    splits = splits_of(log, rule)
    in_training = splits.split == TRAIN
    known_users = np.unique(log.users.codes[in_training])
    known_items = np.unique(log.items.codes[in_training])
    known = {USER: _ids(log.users, known_users), ITEM: _ids(log.items, known_items)}
    for name, ids in log.event_attributes.items():
        seen_ids = _ids(ids, np.unique(ids.codes[in_training]))
        known[event_key(name)] = [raw for raw in seen_ids if raw]
    for owners, attributes, key_of in (
        (known_items, log.item_attributes, item_key),
        (known_users, log.user_attributes, context_key),
    ):
        for name, ids_by_owner in attributes.items():
            seen = {raw for owner in owners for raw in ids_by_owner[owner]}
            known[key_of(name)] = sorted_ids(seen)
    for name, column in log.request_attributes.items():
        codes = np.unique(column.codes[in_training]).tolist()
        known[context_key(name)] = sorted_ids(
            {raw for code in codes for raw in column.values[code]}
        )
    shared = without_users(log, known, known_items, histories, id_maps, schema)
    return with_users(shared, log, splits, np.arange(len(log.users.ids)), splits.user_offsets[:-1])


def without_users(
    log: InteractionLog,
    known_ids: dict[str, list[str]],
    known_items: Ints,
    histories: Sequence[History],
    id_maps: Mapping[str, IdMap] = NO_MAPS,
    given: FeatureSchema | None = None,
) -> Dataset:
    """Return what all shards of a log share, as a data set that has no users.

    Args:
        log: items and attributes of the whole log; its events and users are left out.
        known_ids: of the training split of the whole log, by column, in the order of their rows.
        known_items: item codes of the training split, ascending.
        histories: the histories that the model reads.
        id_maps: as in ``build_dataset``.
        given: as ``schema`` in ``build_dataset``.

    Raises:
        ConfigError: as ``build_dataset`` does.
        DataError: if the log has other columns than the given schema.
    """
    vocabularies = given.vocabulary_by_column if given else _id_maps(known_ids, id_maps)
    schema = FeatureSchema(
        vocabularies,
        context=(*log.user_attributes, *log.request_attributes),
        context_floats=(*log.user_floats, *log.request_floats),
        event_attributes=tuple(log.event_attributes),
        event_floats=tuple(log.event_floats),
        item_attributes=tuple(log.item_attributes),
        item_floats=tuple(log.item_floats),
        histories=tuple(histories),
        tasks=tuple(log.labels),
    )
    if given:
        _check_columns(schema, given)
    for history in histories:
        _check_actions(history, log)
    none = np.zeros(0, np.int64)
    return Dataset(
        log=log,
        schema=schema,
        user_code=none,
        first_event=none,
        user_offsets=np.zeros(1, np.int64),
        item=none,
        time=none,
        labels=np.zeros((0, len(log.labels)), np.float32),
        num_earlier=none,
        split=np.zeros(0, np.int8),
        user_row=none,
        item_row=vocabularies[ITEM].rows_of_ids(log.items.ids),
        known_items=known_items,
        event_attributes={
            name: CodedIds(none, _event_rows(column.ids, vocabularies[event_key(name)]))
            for name, column in log.event_attributes.items()
        },
        item_attributes=_attribute_rows(log.item_attributes, vocabularies, item_key),
        item_floats=_squashed(log.item_floats, len(log.items.ids)),
        context={},
        request_context={
            name: CodedRows(none, _jagged_rows(column.values, vocabularies[context_key(name)]))
            for name, column in log.request_attributes.items()
        },
        user_floats=np.zeros((0, len(log.user_floats)), np.float32),
        request_floats=np.zeros((0, len(log.request_floats)), np.float32),
        event_floats=np.zeros((0, len(log.event_floats)), np.float32),
        indices_by_history={history.name: none for history in histories},
        num_before_by_history={history.name: np.zeros(1, np.int64) for history in histories},
        known_ids=known_ids,
        num_colliding_ids={
            column: count_colliding(ids.rows_of_ids(known_ids[column]))
            for column, ids in vocabularies.items()
            if isinstance(ids, Hashed)
        },
        num_unknown_ids={
            column: int((ids.rows_of_ids(known_ids[column]) == UNKNOWN_ROW).sum())
            for column, ids in (given.vocabulary_by_column if given else {}).items()
            if isinstance(ids, Vocabulary)
        },
    )


def with_users(
    shared: Dataset, log: InteractionLog, splits: Splits, user_code: Ints, first_event: Ints
) -> Dataset:
    """Return users with their events, beside what all shards share.

    Args:
        shared: as ``without_users`` returns it.
        log: the users' events, in canonical order; its items and attributes are those of
            ``shared``.
        splits: of these events.
        user_code: [U] code of each user in the whole log.
        first_event: [U] index of each user's first event in the whole log.
    """
    vocabularies = shared.schema.vocabulary_by_column
    in_history = {history.name: _in_history(log, history) for history in shared.schema.histories}
    return replace(
        shared,
        log=log,
        user_code=user_code,
        first_event=first_event,
        user_offsets=splits.user_offsets,
        item=log.items.codes,
        time=log.time,
        labels=np.stack([*log.labels.values()], axis=1),
        num_earlier=splits.num_earlier,
        split=splits.split,
        user_row=vocabularies[USER].rows_of_ids(log.users.ids),
        event_attributes={
            name: shared.event_attributes[name]._replace(codes=column.codes)
            for name, column in log.event_attributes.items()
        },
        context=_attribute_rows(log.user_attributes, vocabularies, context_key),
        request_context={
            name: shared.request_context[name]._replace(codes=column.codes)
            for name, column in log.request_attributes.items()
        },
        user_floats=_squashed(log.user_floats, len(log.users.ids)),
        request_floats=_squashed(log.request_floats, len(log.time)),
        event_floats=_squashed(log.event_floats, len(log.time)),
        indices_by_history={name: np.flatnonzero(kept) for name, kept in in_history.items()},
        num_before_by_history={
            name: np.concatenate([[0], np.cumsum(kept)]) for name, kept in in_history.items()
        },
    )


def count_colliding(rows: Ints) -> int:
    """Count the ids that share a row with another one.

    Example:
        >>> count_colliding(np.array([5, 3, 5, 4, 5]))
        3
    """
    counts = np.unique(rows, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def in_canonical_order(log: InteractionLog) -> InteractionLog:
    """Return the log independent of the order of its rows: equal logs become identical.

    Ids are coded by ``sorted_ids``, without those that have no event; rows are ordered by user,
    time, item, attributes of the event, labels, attributes and floats of the request, and floats of
    the event.
    """
    users, old_users = _recoded(log.users)
    items, old_items = _recoded(log.items)
    events = {name: _recoded(column)[0] for name, column in log.event_attributes.items()}
    requests = {name: _sorted_values(one) for name, one in log.request_attributes.items()}
    keys: list[NDArray[Any]] = [users.codes, log.time, items.codes]
    keys += [column.codes for column in events.values()]
    keys += [*log.labels.values(), *(column.codes for column in requests.values())]
    keys += (*log.request_floats.values(), *log.event_floats.values())
    order = np.lexsort(keys[::-1])  # The last key counts most.
    return replace(
        log,
        users=users._replace(codes=users.codes[order]),
        items=items._replace(codes=items.codes[order]),
        time=log.time[order],
        labels=rows_of_floats(log.labels, order),
        event_attributes=rows_of_columns(events, order),
        item_attributes=_taken(log.item_attributes, old_items),
        item_floats=rows_of_floats(log.item_floats, old_items),
        user_attributes=_taken(log.user_attributes, old_users),
        request_attributes=rows_of_columns(requests, order),
        user_floats=rows_of_floats(log.user_floats, old_users),
        request_floats=rows_of_floats(log.request_floats, order),
        event_floats=rows_of_floats(log.event_floats, order),
    )


def keep_users(
    log: InteractionLog, max_users: int, rule: SplitRule = BY_TIME_SHARE
) -> InteractionLog:
    """Return the log with the events of a few users only.

    Args:
        log: as a reader returns it.
        max_users: maximum number of users, as ``first_users`` chooses them.
        rule: how the events will be split.
    """
    log = in_canonical_order(log)
    user = log.users.codes
    can_test = have_all_splits(user, splits_of(log, rule))
    kept = np.isin(user, first_users(can_test, max_users))
    return replace(
        log,
        users=log.users._replace(codes=user[kept]),
        items=log.items._replace(codes=log.items.codes[kept]),
        time=log.time[kept],
        labels=rows_of_floats(log.labels, kept),
        event_attributes=rows_of_columns(log.event_attributes, kept),
        request_attributes=rows_of_columns(log.request_attributes, kept),
        request_floats=rows_of_floats(log.request_floats, kept),
        event_floats=rows_of_floats(log.event_floats, kept),
    )


def rows_of_columns(
    columns: Mapping[str, CodedColumn], rows: Ints | NDArray[np.bool_]
) -> dict[str, CodedColumn]:
    """Return coded columns with some of their rows."""
    return {name: column._replace(codes=column.codes[rows]) for name, column in columns.items()}


def rows_of_floats(
    columns: Mapping[str, NDArray[np.float32]], rows: Ints | NDArray[np.bool_]
) -> dict[str, NDArray[np.float32]]:
    """Return float columns with some of their rows."""
    return {name: values[rows] for name, values in columns.items()}


def first_users(can_test: NDArray[np.bool_], max_users: int) -> Ints:
    """Choose users: the first by id that have all three splits, then others if these are too few.

    Args:
        can_test: [U] whether each user has all three splits, by code.
        max_users: number of users to choose, at most.
    """
    return np.argsort(~can_test, kind="stable")[:max_users]


def ranges(firsts: Ints, lengths: Ints) -> Ints:
    """Return the integers ``first .. first + length - 1`` of each pair, concatenated.

    Example:
        >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(firsts - (ends - lengths), lengths)


def _check_numbers(log: InteractionLog) -> None:
    several = len(log.labels) > 1
    for labels in log.labels.values():
        wrong = ~np.isin(labels, (0, 1)) & ~(np.isnan(labels) & several)
        if wrong.any():
            allowed = "0, 1 and NaN for none" if several else "0 and 1"
            raise DataError(f"a label is {labels[wrong][0]}; {allowed} are allowed")
    without = np.flatnonzero(np.isnan(np.stack([*log.labels.values()])).all(axis=0))
    if len(without):
        raise DataError(
            f"row {without[0]} has no label for any of the tasks {list(log.labels)}; at least one "
            "is needed"
        )
    for name, values in log.item_floats.items():
        _check_finite(name, values, lambda row: f"item {log.items.ids[row]}")
    for name, values in log.user_floats.items():
        _check_finite(name, values, lambda row: f"user {log.users.ids[row]}")
    for name, values in (*log.request_floats.items(), *log.event_floats.items()):
        _check_finite(name, values, lambda row: f"row {row}")


def _check_finite(name: str, values: NDArray[np.float32], owner: Callable[[int], str]) -> None:
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{name} of {owner(row)} is {values[row]}; it must be finite")


def _recoded(column: IdColumn) -> tuple[IdColumn, Ints]:
    """Recode a column by its sorted ids that occur; also return the old code of each id."""
    occurring = np.unique(column.codes)
    ids = sorted_ids(column.ids[code] for code in occurring.tolist())
    code_by_id = {spelt: code for code, spelt in enumerate(ids)}
    new = np.array([code_by_id[column.ids[code]] for code in occurring.tolist()], np.int64)
    new_by_old = np.zeros(len(column.ids), np.int64)
    new_by_old[occurring] = new
    return IdColumn(new_by_old[column.codes], ids), occurring[np.argsort(new)]


def _sorted_values(column: ValueColumn) -> ValueColumn:
    """Recode a column by its sorted values that occur."""
    occurring, codes = np.unique(column.codes, return_inverse=True)
    values = [column.values[code] for code in occurring.tolist()]
    order = sorted(range(len(values)), key=values.__getitem__)
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values))
    return ValueColumn(rank[codes], [values[index] for index in order])


def _taken(
    values_by_name: dict[str, list[tuple[str, ...]]], owners: Ints
) -> dict[str, list[tuple[str, ...]]]:
    return {
        name: [values[owner] for owner in owners.tolist()]
        for name, values in values_by_name.items()
    }


def _check_columns(of_log: FeatureSchema, given: FeatureSchema) -> None:
    for field in fields(FeatureSchema):
        here, there = (getattr(schema, field.name) for schema in (of_log, given))
        if here != there:
            raise DataError(
                f"{field.name} of the log are {here}; the schema that it is to be encoded with has "
                f"{there}"
            )


def _check_actions(history: History, log: InteractionLog) -> None:
    actions = log.event_attributes.get(ACTION)
    if actions is not None and (unknown := sorted(set(history.actions) - set(actions.ids))):
        raise ConfigError(
            f"history {history.name} keeps actions {unknown}; the log has {sorted(actions.ids)}"
        )


def _in_history(log: InteractionLog, history: History) -> NDArray[np.bool_]:
    if not history.actions:
        return np.ones(len(log.time), bool)
    actions = log.event_attributes[ACTION]
    codes = [code for code, raw in enumerate(actions.ids) if raw in history.actions]
    return np.isin(actions.codes, codes)


def _ids(column: IdColumn, codes: Ints) -> list[str]:
    return [column.ids[code] for code in codes.tolist()]


def _id_maps(known: Mapping[str, list[str]], given: Mapping[str, IdMap]) -> dict[str, IdMap]:
    """Return the map of each column: the given one, or a vocabulary of the known ids."""
    name_by_column = {column: column.partition(".")[2] or column for column in known}
    if unknown := sorted(set(given) - set(name_by_column.values())):
        raise ConfigError(
            f"ids has the columns {unknown}; {sorted({*name_by_column.values()})} are allowed"
        )
    return {
        column: given[name] if name in given else Vocabulary(known[column])
        for column, name in name_by_column.items()
    }


def _squashed(columns: Mapping[str, NDArray[np.float32]], num_rows: int) -> NDArray[np.float32]:
    """Return float columns side by side, [rows, columns], as the model reads them."""
    squashed = [squash(values.astype(np.float64)) for values in columns.values()]
    return np.stack(squashed, axis=1) if squashed else np.zeros((num_rows, 0), np.float32)


def _event_rows(ids: Sequence[str], id_map: IdMap) -> Ints:
    """Return the row of each id; an empty one is a missing value."""
    is_missing = np.fromiter((not raw for raw in ids), np.bool_, len(ids))
    return np.where(is_missing, MISSING_ROW, id_map.rows_of_ids(ids))


def _attribute_rows(
    attributes: Mapping[str, Sequence[tuple[str, ...]]],
    vocabularies: dict[str, IdMap],
    key_of: Callable[[str], str],
) -> dict[str, JaggedRows]:
    return {
        name: _jagged_rows(ids_by_owner, vocabularies[key_of(name)])
        for name, ids_by_owner in attributes.items()
    }


def _jagged_rows(ids_by_owner: Sequence[tuple[str, ...]], vocabulary: IdMap) -> JaggedRows:
    lengths = [len(ids) for ids in ids_by_owner]
    flat = [raw for ids in ids_by_owner for raw in ids]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return JaggedRows(vocabulary.rows_of_ids(flat), offsets)
