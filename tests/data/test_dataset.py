"""Order, splits and vocabularies of a data set, each against its meaning in plain loops."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.worlds import examples
from tests.data.logs import (
    ACTIONS,
    Event,
    all_events,
    countries_of,
    event_lists,
    genres_of,
    log_of,
    one_user,
    price_of,
)
from torchrec_kvshare.data.batches import squash
from torchrec_kvshare.data.dataset import (
    TEST,
    TRAIN,
    VALID,
    Dataset,
    JaggedRows,
    build_dataset,
    ranges,
)
from torchrec_kvshare.data.schema import (
    ACTION,
    ITEM,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    USER,
)

HISTORIES = all_events(8, 4)


def dataset_of(events: list[Event]) -> Dataset:
    return build_dataset(log_of(events), HISTORIES)


def events_of(dataset: Dataset) -> list[Event]:
    """The data set's events in its order, by their raw ids."""
    log = dataset.log
    assert log.action is not None
    return [
        Event(log.users.ids[user], log.items.ids[item], time, log.action.ids[action], label)
        for user, item, time, action, label in zip(
            dataset.event_user.tolist(),
            dataset.item.tolist(),
            dataset.time.tolist(),
            dataset.action.tolist(),
            dataset.label.astype(int).tolist(),
            strict=True,
        )
    ]


def sets_by_user(dataset: Dataset) -> Iterator[list[list[int]]]:
    """Of every user, the places of the events of each time, oldest first."""
    for first, last in zip(dataset.user_offsets[:-1], dataset.user_offsets[1:], strict=True):
        places = range(first, last)
        yield [list(equal) for _, equal in groupby(places, key=lambda place: dataset.time[place])]


def split_counts(times: list[int]) -> list[int]:
    split = build_dataset(one_user(times), HISTORIES).split
    return [int((split == part).sum()) for part in (TRAIN, VALID, TEST)]


@given(event_lists)
def test_events_stand_by_user_then_time_then_place_in_the_log(events: list[Event]) -> None:
    users = list(dict.fromkeys(event.user for event in events))
    # Python's sort is stable: equal times keep the order of the log.
    expected = sorted(events, key=lambda event: (users.index(event.user), event.time))
    assert events_of(dataset_of(events)) == expected


@given(event_lists)
def test_strictly_earlier_events_are_counted(events: list[Event]) -> None:
    dataset = dataset_of(events)
    ordered = events_of(dataset)
    expected = [
        sum(other.user == event.user and other.time < event.time for other in ordered)
        for event in ordered
    ]
    assert dataset.num_earlier.tolist() == expected


@given(event_lists)
def test_equal_times_go_to_one_split(events: list[Event]) -> None:
    dataset = dataset_of(events)
    for sets in sets_by_user(dataset):
        assert all(len(set(dataset.split[places])) == 1 for places in sets)


@given(event_lists)
def test_no_event_of_a_user_stands_after_one_of_a_later_split(events: list[Event]) -> None:
    dataset = dataset_of(events)
    for sets in sets_by_user(dataset):
        parts = [int(dataset.split[place]) for places in sets for place in places]
        assert parts == sorted(parts)


@given(event_lists)
def test_three_sets_make_three_splits_and_fewer_are_for_training(events: list[Event]) -> None:
    dataset = dataset_of(events)
    for sets in sets_by_user(dataset):
        parts = {int(dataset.split[place]) for places in sets for place in places}
        assert parts == ({TRAIN, VALID, TEST} if len(sets) >= 3 else {TRAIN})


@given(st.lists(st.integers(1, 30), min_size=3, max_size=8))
def test_three_sets_make_three_splits_whatever_their_sizes(sizes: list[int]) -> None:
    times = [time for time, size in enumerate(sizes) for _ in range(size)]
    assert min(split_counts(times)) > 0


def test_a_large_set_leaves_the_validation_split_its_event() -> None:
    """Of 18 events at once and two more, all after the eighth tenth, both went to the test split.

    The validation split was empty then, and evaluating on it failed.
    """
    assert split_counts([1] * 18 + [2, 3]) == [18, 1, 1]


@pytest.mark.parametrize(
    ("num_events", "expected"),
    [(3, [1, 1, 1]), (4, [2, 1, 1]), (10, [8, 1, 1]), (100, [80, 10, 10]), (37, [30, 4, 3])],
)
def test_a_tenth_each_is_for_validation_and_for_testing(
    num_events: int, expected: list[int]
) -> None:
    assert split_counts(list(range(num_events))) == expected


@given(event_lists)
def test_vocabularies_know_the_training_split_alone(events: list[Event]) -> None:
    dataset = dataset_of(events)
    in_training = dataset.split == TRAIN
    trained = [e for e, t in zip(events_of(dataset), in_training, strict=True) if t]
    known = {
        USER: {event.user for event in trained},
        ITEM: {event.item for event in trained},
        ACTION: {event.action for event in trained},
        "genres": {genre for event in trained for genre in genres_of(event.item)},
        "country": {country for event in trained for country in countries_of(event.user)},
    }
    vocabularies = dataset.schema.vocabulary_by_column
    assert {column: set(vocabularies[column].ids) for column in vocabularies} == known
    assert {dataset.log.items.ids[code] for code in dataset.known_items} == known[ITEM]
    assert dataset.known_items.tolist() == sorted(dataset.known_items)


def test_what_only_the_test_split_has_is_unknown() -> None:
    trained = [Event("u", "100", time) for time in range(9)]
    dataset = dataset_of([*trained, Event("u", "104", 9, "buy")])
    known, unknown = (dataset.log.items.ids.index(item) for item in ("100", "104"))
    assert dataset.item_row[unknown] == UNKNOWN_ROW
    assert dataset.item_row[known] != UNKNOWN_ROW
    assert dataset.action_row.tolist() == [NUM_RESERVED_ROWS, UNKNOWN_ROW]
    # Of the two genres of 104 the second is that of 100.
    assert (genres_of("100"), genres_of("104")) == (("g0",), ("g4", "g0"))
    values, lengths = dataset.item_attributes["genres"].take(np.array([unknown, known]))
    assert values.tolist() == [UNKNOWN_ROW, NUM_RESERVED_ROWS, NUM_RESERVED_ROWS]
    assert lengths.tolist() == [2, 1]


@given(event_lists)
@examples(0.5)
def test_attributes_and_floats_stand_by_code(events: list[Event]) -> None:
    dataset = dataset_of(events)
    log, vocabularies = dataset.log, dataset.schema.vocabulary_by_column
    for code, item in enumerate(log.items.ids):
        rows, _ = dataset.item_attributes["genres"].take(np.array([code]))
        assert rows.tolist() == vocabularies["genres"].rows(genres_of(item))
        assert dataset.item_row[code] == vocabularies[ITEM].row(item)
    for code, user in enumerate(log.users.ids):
        rows, _ = dataset.context["country"].take(np.array([code]))
        assert rows.tolist() == vocabularies["country"].rows(countries_of(user))
        assert dataset.user_row[code] == vocabularies[USER].row(user)
    prices = np.array([[price_of(item)] for item in log.items.ids])
    assert np.array_equal(dataset.item_floats, squash(prices))


def test_a_log_of_ids_alone_has_no_further_columns() -> None:
    log = log_of([Event("u", "100", 1), Event("u", "101", 2)])
    bare = type(log)(log.users, log.items, log.time, log.label, None, {}, {}, {}, log.report)
    dataset = build_dataset(bare, HISTORIES)
    schema = dataset.schema
    assert (schema.context, schema.has_action, schema.item_attributes) == ((), False, ())
    assert dataset.item_floats.shape == (2, 0)
    assert set(schema.vocabulary_by_column) == {USER, ITEM}


def test_a_user_without_events_keeps_the_others_in_place() -> None:
    """``first_users`` leaves users in the vocabulary of the log whose events are all gone."""
    log = log_of([Event("u", "100", 1), *[Event("vv", "101", time) for time in range(4)]])
    users = log.users._replace(ids=["u", "nobody", "vv", "nobody else"])
    codes = np.where(users.codes == 1, 2, users.codes)
    attributes = {"country": [("AT",)] * 4}
    changed = type(log)(
        users._replace(codes=codes),
        log.items,
        log.time,
        log.label,
        log.action,
        log.item_attributes,
        log.item_floats,
        attributes,
        log.report,
    )
    dataset = build_dataset(changed, HISTORIES)
    assert dataset.user_offsets.tolist() == [0, 1, 1, 5, 5]
    assert dataset.split.tolist() == [TRAIN, TRAIN, TRAIN, VALID, TEST]
    assert dataset.user_row.tolist() == [2, UNKNOWN_ROW, 3, UNKNOWN_ROW]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5))))
def test_ranges_are_those_of_python(pairs: list[tuple[int, int]]) -> None:
    firsts, lengths = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    expected = [place for first, length in pairs for place in range(first, first + length)]
    assert ranges(firsts, lengths).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1), st.data())
def test_jagged_rows_are_taken_by_owner(rows: list[list[int]], data: st.DataObject) -> None:
    offsets = np.cumsum([0, *map(len, rows)])
    jagged = JaggedRows(np.array([value for row in rows for value in row], np.int64), offsets)
    owners = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    values, lengths = jagged.take(np.array(owners, np.int64))
    assert values.tolist() == [value for owner in owners for value in rows[owner]]
    assert lengths.tolist() == [len(rows[owner]) for owner in owners]


def test_actions_keep_their_own_row() -> None:
    events = [Event("u", "100", time, ACTIONS[time % 3]) for time in range(6)]
    dataset = dataset_of(events)
    rows = dataset.action_row[dataset.action]
    expected = dataset.schema.vocabulary_by_column[ACTION].rows(e.action for e in events)
    assert rows.tolist() == expected
