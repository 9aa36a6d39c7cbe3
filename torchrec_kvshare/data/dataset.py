"""An interaction log ordered by user and time, split, and encoded by its training part's schema.

Splits are by user and time: the last tenth of a user's events is the test split, the tenth before
it the validation split. Events of a user at the same time are a set: they go to one split together
and none of them sees another; ``num_earlier`` counts the strictly earlier ones and nothing else
decides what an event may see.

Nothing depends on the order of the log's rows: ids are numbered by their own order, and events of a
user at the same time stand by item, action and label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.tables import IdColumn
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.dense import squash
from torchrec_kvshare.features.ids import sorted_ids
from torchrec_kvshare.features.schema import (
    ACTION,
    ITEM,
    USER,
    FeatureSchema,
    History,
    Vocabulary,
    context_key,
    item_key,
)

TRAIN, VALID, TEST = 0, 1, 2
VALID_SHARE = TEST_SHARE = 0.1  # of a user's events
MIN_SETS_TO_SPLIT = 3  # sets of equal time; a user with fewer is for training only

Ints = NDArray[np.int64]


class JaggedRows(NamedTuple):
    """Table rows of several owners: owner i has ``values[offsets[i]:offsets[i + 1]]``."""

    values: Ints
    offsets: Ints

    def take(self, owners: Ints) -> tuple[Ints, Ints]:
        """Values of some owners one after the other, and how many each has."""
        lengths = self.offsets[owners + 1] - self.offsets[owners]
        return self.values[ranges(self.offsets[owners], lengths)], lengths


@dataclass(frozen=True, eq=False)
class Dataset:
    """Events ordered by user, then time, then item, action and label.

    Attributes:
        log: the same events in the same order, with raw ids and attributes; codes below are its
            codes.
        schema: columns and vocabularies, made from the training split.
        user_offsets: [U + 1], in events.
        item: [T] item code of each event.
        action: [T] action code of each event; empty where the log has none.
        time: [T] Unix seconds.
        label: [T] float32, 1 for a positive event.
        num_earlier: [T] events of the same user at strictly earlier times.
        split: [T] ``TRAIN``, ``VALID`` or ``TEST``.
        user_row: [U] table row by user code.
        item_row: [I] table row by item code.
        action_row: table row by action code; empty where the log has none.
        known_items: codes of the items of the training split: the catalogue.
        item_attributes: rows by item code, for each multi-valued item attribute.
        item_floats: [I, F] float32 by item code.
        context: rows by user code, for each user attribute.
        places_by_history: places of each history's events, ascending.
        before_by_history: [T + 1] how many of a history's events stand before each place.
    """

    log: InteractionLog
    schema: FeatureSchema
    user_offsets: Ints
    item: Ints
    action: Ints
    time: Ints
    label: NDArray[np.float32]
    num_earlier: Ints
    split: NDArray[np.int8]
    user_row: Ints
    item_row: Ints
    action_row: Ints
    known_items: Ints
    item_attributes: dict[str, JaggedRows]
    item_floats: NDArray[np.float32]
    context: dict[str, JaggedRows]
    places_by_history: dict[str, Ints]
    before_by_history: dict[str, Ints]

    @property
    def num_users(self) -> int:
        """Users of the log."""
        return len(self.user_offsets) - 1

    @cached_property
    def event_user(self) -> Ints:
        """[T] user code of each event."""
        return np.repeat(np.arange(self.num_users), np.diff(self.user_offsets))


def build_dataset(log: InteractionLog, histories: Sequence[History]) -> Dataset:
    """Order, split and encode a log.

    Args:
        log: as a reader gives it.
        histories: what the model reads of a user's events.

    Returns:
        The data set; vocabularies know the training split only.

    Raises:
        ConfigError: if a history is of actions that the log does not have.
        DataError: if a label is neither 0 nor 1, or a float column holds what is no finite number.
    """
    _check_numbers(log)
    log = in_canonical_order(log)
    user, time, item = log.users.codes, log.time, log.items.codes
    counts = np.bincount(user, minlength=len(log.users.ids))
    user_offsets = np.concatenate([[0], np.cumsum(counts)])
    num_earlier = count_earlier(user, time, user_offsets)
    split = split_events(user, num_earlier, counts)
    in_training = split == TRAIN
    known_users, known_items = np.unique(user[in_training]), np.unique(item[in_training])
    vocabularies = {
        USER: _vocabulary(log.users, known_users),
        ITEM: _vocabulary(log.items, known_items),
    }
    action = action_row = np.zeros(0, np.int64)
    if log.action is not None:
        action = log.action.codes
        vocabularies[ACTION] = _vocabulary(log.action, np.unique(action[in_training]))
        action_row = _rows(log.action.ids, vocabularies[ACTION])
    for owners, attributes, key_of in (
        (known_items, log.item_attributes, item_key),
        (known_users, log.user_attributes, context_key),
    ):
        for name, ids_by_owner in attributes.items():
            seen = {raw for owner in owners for raw in ids_by_owner[owner]}
            vocabularies[key_of(name)] = Vocabulary(sorted_ids(seen))
    schema = FeatureSchema(
        vocabularies,
        tuple(log.user_attributes),
        log.action is not None,
        tuple(log.item_attributes),
        tuple(log.item_floats),
        tuple(histories),
    )
    in_history = {history.name: _in_history(log, history, action) for history in histories}
    floats = [squash(log.item_floats[name].astype(np.float64)) for name in schema.item_floats]
    return Dataset(
        log,
        schema,
        user_offsets,
        item,
        action,
        time,
        log.label,
        num_earlier,
        split,
        _rows(log.users.ids, vocabularies[USER]),
        _rows(log.items.ids, vocabularies[ITEM]),
        action_row,
        known_items,
        _attribute_rows(log.item_attributes, vocabularies, item_key),
        np.stack(floats, axis=1) if floats else np.zeros((len(log.items.ids), 0), np.float32),
        _attribute_rows(log.user_attributes, vocabularies, context_key),
        {name: np.flatnonzero(chosen) for name, chosen in in_history.items()},
        {name: np.concatenate([[0], np.cumsum(chosen)]) for name, chosen in in_history.items()},
    )


def in_canonical_order(log: InteractionLog) -> InteractionLog:
    """The same events, whatever the order of their rows was: equal logs become identical.

    Users, items and actions are coded by ``sorted_ids``, those without events left out; rows stand
    by user, time, item, action and label.
    """
    users, old_users = _recoded(log.users)
    items, old_items = _recoded(log.items)
    action = None if log.action is None else _recoded(log.action)[0]
    of_action = () if action is None else (action.codes,)
    order = np.lexsort((log.label, *of_action, items.codes, log.time, users.codes))
    return replace(
        log,
        users=users._replace(codes=users.codes[order]),
        items=items._replace(codes=items.codes[order]),
        time=log.time[order],
        label=log.label[order],
        action=action and action._replace(codes=action.codes[order]),
        item_attributes=_taken(log.item_attributes, old_items),
        item_floats={name: values[old_items] for name, values in log.item_floats.items()},
        user_attributes=_taken(log.user_attributes, old_users),
    )


def users_to_test(log: InteractionLog, max_users: int) -> InteractionLog:
    """The same log with the events of a few users only.

    Args:
        log: as a reader gives it.
        max_users: how many at most: the first by id of those that have all three splits, and only
            if these are too few also others.
    """
    log = in_canonical_order(log)
    user = log.users.codes
    is_first = np.ones(len(user), bool)
    is_first[1:] = (np.diff(user) != 0) | (np.diff(log.time) != 0)
    num_sets = np.bincount(user[is_first], minlength=len(log.users.ids))
    chosen = np.argsort(num_sets < MIN_SETS_TO_SPLIT, kind="stable")[:max_users]
    kept = np.isin(user, chosen)
    return replace(
        log,
        users=log.users._replace(codes=user[kept]),
        items=log.items._replace(codes=log.items.codes[kept]),
        time=log.time[kept],
        label=log.label[kept],
        action=log.action and log.action._replace(codes=log.action.codes[kept]),
    )


def ranges(firsts: Ints, lengths: Ints) -> Ints:
    """The integers ``first .. first + length - 1`` of each pair, one after the other.

    Example:
        >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(firsts - (ends - lengths), lengths)


def count_earlier(user: Ints, time: Ints, user_offsets: Ints) -> Ints:
    """Events of the same user at strictly earlier times.

    Args:
        user: [T] ascending.
        time: [T] ascending within a user.
        user_offsets: [U + 1].

    Returns:
        [T].

    Example:
        >>> count_earlier(np.zeros(4, int), np.array([3, 5, 5, 9]), np.array([0, 4])).tolist()
        [0, 1, 1, 3]
    """
    place = np.arange(len(time))
    is_first = np.ones(len(time), bool)
    is_first[1:] = (np.diff(time) != 0) | (np.diff(user) != 0)
    first_of_set = np.maximum.accumulate(np.where(is_first, place, 0))
    return first_of_set - user_offsets[user]


def split_events(user: Ints, num_earlier: Ints, counts: Ints) -> NDArray[np.int8]:
    """Which split each event belongs to; see the module's text.

    Args:
        user: [T] ascending.
        num_earlier: [T].
        counts: [U] events of each user.

    Returns:
        [T] ``TRAIN``, ``VALID`` or ``TEST``. Whoever has three sets of equal time or more has all
        three.
    """
    is_first = np.ones(len(user), bool)
    is_first[1:] = (np.diff(num_earlier) != 0) | (np.diff(user) != 0)
    set_user, set_earlier = user[is_first], num_earlier[is_first]
    num_sets = np.bincount(set_user, minlength=len(counts))
    first_set = np.cumsum(num_sets) - num_sets
    has_splits = num_sets >= MIN_SETS_TO_SPLIT
    # The last set is for testing, however large it is; the first two never are.
    set_place = np.arange(len(set_user)) - first_set[set_user]
    late = set_earlier >= np.ceil(counts * (1 - TEST_SHARE))[set_user]
    tested = (late | (set_place == num_sets[set_user] - 1)) & (set_place >= 2)
    num_before_test = num_sets - np.bincount(set_user[tested], minlength=len(counts))
    # Of users without splits these two look anywhere; nothing is made of it.
    first_tested = np.minimum(first_set + num_before_test, len(set_user) - 1)
    test_from, one_before = set_earlier[first_tested], set_earlier[first_tested - 1]
    valid_from = np.minimum(one_before, np.ceil(counts * (1 - TEST_SHARE - VALID_SHARE)))
    split = np.full(len(user), TRAIN, np.int8)
    split[has_splits[user] & (num_earlier >= valid_from[user])] = VALID
    split[has_splits[user] & (num_earlier >= test_from[user])] = TEST
    return split


def _check_numbers(log: InteractionLog) -> None:
    wrong = ~np.isin(log.label, (0, 1))
    if wrong.any():
        raise DataError(f"a label is {log.label[wrong][0]}; 0 and 1 are allowed")
    for name, values in log.item_floats.items():
        if not np.isfinite(values).all():
            item = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                f"{name} of item {log.items.ids[item]} is {values[item]}; it must be finite"
            )


def _recoded(column: IdColumn) -> tuple[IdColumn, Ints]:
    """The column coded by the order of the ids that occur, and the old code of each of them."""
    occurring = np.unique(column.codes)
    ids = sorted_ids(column.ids[code] for code in occurring.tolist())
    code_by_id = {spelt: code for code, spelt in enumerate(ids)}
    new = np.array([code_by_id[column.ids[code]] for code in occurring.tolist()], np.int64)
    new_by_old = np.zeros(len(column.ids), np.int64)
    new_by_old[occurring] = new
    return IdColumn(new_by_old[column.codes], ids), occurring[np.argsort(new)]


def _taken(
    values_by_name: dict[str, list[tuple[str, ...]]], owners: Ints
) -> dict[str, list[tuple[str, ...]]]:
    return {
        name: [values[owner] for owner in owners.tolist()]
        for name, values in values_by_name.items()
    }


def _in_history(log: InteractionLog, history: History, action: Ints) -> NDArray[np.bool_]:
    if not history.actions or log.action is None:
        return np.ones(len(log.time), bool)
    unknown = sorted(set(history.actions) - set(log.action.ids))
    if unknown:
        raise ConfigError(
            f"history {history.name} is of actions {unknown}; the log has {sorted(log.action.ids)}"
        )
    codes = [code for code, raw in enumerate(log.action.ids) if raw in history.actions]
    return np.isin(action, codes)


def _vocabulary(column: IdColumn, codes: Ints) -> Vocabulary:
    return Vocabulary([column.ids[code] for code in codes])


def _rows(ids: Sequence[str], vocabulary: Vocabulary) -> Ints:
    return np.array(vocabulary.rows(ids), dtype=np.int64)


def _attribute_rows(
    attributes: dict[str, list[tuple[str, ...]]],
    vocabularies: dict[str, Vocabulary],
    key_of: Callable[[str], str],
) -> dict[str, JaggedRows]:
    rows_by_name = {}
    for name, ids_by_owner in attributes.items():
        lengths = [len(ids) for ids in ids_by_owner]
        flat = [raw for ids in ids_by_owner for raw in ids]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows_by_name[name] = JaggedRows(_rows(flat, vocabularies[key_of(name)]), offsets)
    return rows_by_name
