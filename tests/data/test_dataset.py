"""Order, splits and vocabularies of a data set, against plain loops."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.logs import (
    ACTIONS,
    Event,
    age_of,
    all_events,
    countries_of,
    event_lists,
    genres_of,
    impressions,
    in_order,
    log_of,
    one_user,
    price_of,
)
from tests.worlds import examples
from torchrec_kvshare.data.dataset import Dataset, JaggedRows, build_dataset, keep_users, ranges
from torchrec_kvshare.data.digest import DataDigest, data_digest, log_digest
from torchrec_kvshare.data.splits import TEST, TRAIN, VALID
from torchrec_kvshare.data.tables import IdColumn
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.features.dense import squash
from torchrec_kvshare.features.schema import (
    ITEM,
    MISSING_ROW,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    USER,
    Hashed,
    IdMap,
    Managed,
)

HISTORIES = all_events(8, 4)


def dataset_of(events: list[Event]) -> Dataset:
    return build_dataset(log_of(events), HISTORIES)


def digest_of(dataset: Dataset) -> DataDigest:
    return data_digest(log_digest(dataset.log), dataset.schema)


def events_of(dataset: Dataset) -> list[Event]:
    """The data set's events in its order, by their raw ids."""
    log = dataset.log
    actions, moods = log.event_attributes["action"], log.event_attributes["mood"]
    surfaces: list[tuple[str, ...]] = [()] * len(dataset.time)
    for codes, values in log.request_attributes.values():
        surfaces = [values[code] for code in codes.tolist()]
    return [
        Event(
            log.users.ids[user],
            log.items.ids[item],
            time,
            actions.ids[action],
            label,
            shown,
            moods.ids[mood],
            *floats,
        )
        for user, item, time, action, label, shown, mood, *floats in zip(
            dataset.event_user.tolist(),
            dataset.item.tolist(),
            dataset.time.tolist(),
            actions.codes.tolist(),
            dataset.labels[:, 0].astype(int).tolist(),
            surfaces,
            moods.codes.tolist(),
            log.request_floats["battery"].tolist(),
            log.event_floats["dwell"].tolist(),
            strict=True,
        )
    ]


def sets_by_user(dataset: Dataset) -> Iterator[list[list[int]]]:
    """For every user, the event indices of each time, oldest first."""
    for first, last in zip(dataset.user_offsets[:-1], dataset.user_offsets[1:], strict=True):
        indices = range(first, last)
        yield [list(equal) for _, equal in groupby(indices, key=lambda index: dataset.time[index])]


def split_counts(times: list[int]) -> list[int]:
    split = build_dataset(one_user(times), HISTORIES).split
    return [int((split == part).sum()) for part in (TRAIN, VALID, TEST)]


@given(event_lists | st.builds(impressions, st.integers(0, 99)))
def test_events_stand_by_user_then_time_then_item_and_the_rest(events: list[Event]) -> None:
    assert events_of(dataset_of(events)) == in_order(events)


@given(event_lists | st.builds(impressions, st.integers(0, 99)), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(events: list[Event], chance: Random) -> None:
    """Reordered rows gave another vocabulary: a resumed run took rows of other ids."""
    dataset = dataset_of(events)
    shuffled = list(events)
    chance.shuffle(shuffled)
    other = dataset_of(shuffled)
    assert other.schema.to_json() == dataset.schema.to_json()
    assert events_of(other) == events_of(dataset)
    assert other.split.tolist() == dataset.split.tolist()
    assert digest_of(other) == digest_of(dataset)


def test_ids_are_numbered_by_their_own_order() -> None:
    items = ["9", "b", "10", "007", "-2", "a"]
    events = [Event("u", item, time) for time, item in enumerate([*items, *items[:3]])]
    log = log_of([event._replace(item="100") for event in events])
    codes = np.array([items.index(event.item) for event in events])
    attributes = {"genres": [(item,) for item in items]}
    changed = replace(
        log,
        items=IdColumn(codes, items),
        item_attributes=attributes,
        item_floats={"price": np.arange(6, dtype=np.float32)},
    )
    dataset = build_dataset(changed, HISTORIES)
    ordered = ["-2", "9", "10", "007", "a", "b"]
    assert dataset.log.items.ids == ordered
    for column in (ITEM, "items.genres"):
        assert list(dataset.schema.vocabulary_by_column[column].examples) == ordered
    assert dataset.log.item_attributes["genres"] == [(item,) for item in ordered]
    assert dataset.log.item_floats["price"].tolist() == [items.index(item) for item in ordered]


def other_data(events: list[Event]) -> list[str]:
    """How the digest of these events differs from that of ``WORLD``."""
    return digest_of(dataset_of(WORLD)).changes(digest_of(dataset_of(events)))


WORLD = [Event(user, str(100 + time), time) for user in ("u", "vv") for time in range(5)]


@pytest.mark.parametrize(
    ("events", "change"),
    [
        ([*WORLD, Event("www", "100", 1)], "1 user more, 1 event more, 1 positive event more, "),
        (WORLD[:-2], "2 events fewer, 2 positive events fewer, other events"),
        ([*WORLD[:-1], Event("vv", "107", 4)], "1 item more, other item ids, other events, other"),
        ([*WORLD[:-1], Event("vv", "104", 5)], "other events"),
        ([*WORLD[:-1], Event("vv", "104", 4, label=0)], "1 positive event fewer, other events"),
        ([*WORLD[:-1], Event("vv", "104", 4, "buy")], "other action of events, other events"),
        ([e._replace(user=e.user + "x") for e in WORLD], "other user ids, other country of users"),
        (WORLD[::-1], ""),
    ],
)
def test_other_data_is_told_by_what_is_different(events: list[Event], change: str) -> None:
    assert ", ".join(other_data(events)).startswith(change)
    assert bool(change) == bool(other_data(events))


def test_other_attributes_are_other_data() -> None:
    log = log_of(WORLD)
    before = digest_of(build_dataset(log, HISTORIES))
    genres = [("g9",), *log.item_attributes["genres"][1:]]
    changed = replace(log, item_attributes={"genres": genres})
    changes = before.changes(digest_of(build_dataset(changed, HISTORIES)))
    assert changes == ["other genres of items", "other schema"]
    prices = {"price": log.item_floats["price"] + 1}
    changed = replace(log, item_floats=prices)
    changes = before.changes(digest_of(build_dataset(changed, HISTORIES)))
    assert changes == ["other price of items"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_that_is_not_finite_is_refused_by_its_item(value: float) -> None:
    """It reached the dense features: every loss of its batch was NaN."""
    log = log_of(WORLD)
    prices = log.item_floats["price"].copy()
    prices[2] = value
    with pytest.raises(DataError, match=rf"price of item 102 is {value}; it must be finite"):
        build_dataset(replace(log, item_floats={"price": prices}), HISTORIES)


@pytest.mark.parametrize("value", [np.nan, 0.5, 2])
def test_a_label_is_0_or_1(value: float) -> None:
    log = log_of(WORLD)
    label = log.labels[""].copy()
    label[3] = value
    with pytest.raises(DataError, match=f"a label is {value}.*; 0 and 1 are allowed"):
        build_dataset(replace(log, labels={"": label}), HISTORIES)


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
        assert all(len(set(dataset.split[indices])) == 1 for indices in sets)


@given(event_lists)
def test_no_event_of_a_user_stands_after_one_of_a_later_split(events: list[Event]) -> None:
    dataset = dataset_of(events)
    for sets in sets_by_user(dataset):
        parts = [int(dataset.split[index]) for indices in sets for index in indices]
        assert parts == sorted(parts)


@given(event_lists)
def test_three_sets_make_three_splits_and_fewer_are_for_training(events: list[Event]) -> None:
    dataset = dataset_of(events)
    for sets in sets_by_user(dataset):
        parts = {int(dataset.split[index]) for indices in sets for index in indices}
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
        "events.action": {event.action for event in trained},
        "events.mood": {event.mood for event in trained} - {""},
        "items.genres": {genre for event in trained for genre in genres_of(event.item)},
        "context.country": {country for event in trained for country in countries_of(event.user)},
    }
    vocabularies = dataset.schema.vocabulary_by_column
    assert {column: set(vocabularies[column].examples) for column in vocabularies} == known
    assert {dataset.log.items.ids[code] for code in dataset.known_items} == known[ITEM]
    assert dataset.known_items.tolist() == sorted(dataset.known_items)


def test_what_only_the_test_split_has_is_unknown() -> None:
    trained = [Event("u", "100", time) for time in range(9)]
    dataset = dataset_of([*trained, Event("u", "104", 9, "buy")])
    known, unknown = (dataset.log.items.ids.index(item) for item in ("100", "104"))
    assert dataset.item_row[unknown] == UNKNOWN_ROW
    assert dataset.item_row[known] != UNKNOWN_ROW
    # "buy" stands before "view".
    actions = dataset.event_attributes["action"]
    assert actions.row_by_code.tolist() == [UNKNOWN_ROW, NUM_RESERVED_ROWS]
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
        assert rows.tolist() == vocabularies["items.genres"].rows(genres_of(item))
        assert dataset.item_row[code] == vocabularies[ITEM].row(item)
    for code, user in enumerate(log.users.ids):
        rows, _ = dataset.context["country"].take(np.array([code]))
        assert rows.tolist() == vocabularies["context.country"].rows(countries_of(user))
        assert dataset.user_row[code] == vocabularies[USER].row(user)
    prices = np.array([[price_of(item)] for item in log.items.ids])
    assert np.array_equal(dataset.item_floats, squash(prices))
    ages = np.array([[age_of(user)] for user in log.users.ids])
    assert np.array_equal(dataset.user_floats, squash(ages))
    batteries = np.array([[event.battery] for event in in_order(events)])
    assert np.array_equal(dataset.request_floats, squash(batteries))
    dwells = np.array([[event.dwell] for event in in_order(events)])
    assert np.array_equal(dataset.event_floats, squash(dwells))


def test_the_users_of_events_are_counted_out_once() -> None:
    """An array of all events was built again for every batch."""
    dataset = dataset_of(WORLD)
    assert dataset.event_user is dataset.event_user
    assert dataset.event_user.tolist() == [0] * 5 + [1] * 5


def test_a_log_of_ids_alone_has_no_further_columns() -> None:
    log = log_of([Event("u", "100", 1), Event("u", "101", 2)])
    bare = replace(
        log,
        event_attributes={},
        item_attributes={},
        item_floats={},
        user_attributes={},
        user_floats={},
        request_floats={},
        event_floats={},
    )
    dataset = build_dataset(bare, HISTORIES)
    schema = dataset.schema
    assert (schema.context, schema.event_columns, schema.item_attributes) == ((), (ITEM,), ())
    assert dataset.item_floats.shape == (2, 0)
    assert set(schema.vocabulary_by_column) == {USER, ITEM}


def test_ids_without_events_are_left_out() -> None:
    """``keep_users`` leaves ids without events in the log."""
    events = [Event("u", "100", 1), *[Event("vv", str(101 + time), time) for time in range(4)]]
    log = keep_users(log_of(events), 1)
    assert log.users.ids == ["u", "vv"]
    dataset = build_dataset(log, HISTORIES)
    assert dataset.log.users.ids == ["vv"]
    assert dataset.log.items.ids == ["101", "102", "103", "104"]
    assert dataset.user_offsets.tolist() == [0, 4]
    assert dataset.split.tolist() == [TRAIN, TRAIN, VALID, TEST]
    assert dataset.user_row.tolist() == [2]


@given(event_lists, st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_few_users_are_those_with_all_splits_whatever_the_order_of_rows(
    events: list[Event], max_users: int, chance: Random
) -> None:
    """A log that began with users of one event each had nothing to test on with ``max_users``."""
    times_by_user = {e.user: {o.time for o in events if o.user == e.user} for e in events}
    ranked = sorted(times_by_user, key=lambda user: (len(times_by_user[user]) < 3, user))
    shuffled = list(events)
    chance.shuffle(shuffled)
    dataset = build_dataset(keep_users(log_of(shuffled), max_users), HISTORIES)
    assert dataset.log.users.ids == sorted(ranked[:max_users])
    kept = [event for event in events if event.user in ranked[:max_users]]
    assert events_of(dataset) == events_of(dataset_of(kept))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5))))
def test_ranges_are_those_of_python(pairs: list[tuple[int, int]]) -> None:
    firsts, lengths = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    expected = [number for first, length in pairs for number in range(first, first + length)]
    assert ranges(firsts, lengths).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1), st.data())
def test_jagged_rows_are_taken_by_owner(rows: list[list[int]], data: st.DataObject) -> None:
    offsets = np.cumsum([0, *map(len, rows)])
    jagged = JaggedRows(np.array([value for row in rows for value in row], np.int64), offsets)
    owners = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    values, lengths = jagged.take(np.array(owners, np.int64))
    assert values.tolist() == [value for owner in owners for value in rows[owner]]
    assert lengths.tolist() == [len(rows[owner]) for owner in owners]


@pytest.mark.parametrize("kind", ["vocabulary", "hashed", "managed"])
def test_attributes_of_events_have_a_row_each_and_a_missing_one_has_its_own(kind: str) -> None:
    moods = ["calm", "", "glad", "calm", "glad", "", "calm", "calm", "calm", "new"]
    events = [
        Event("u", "100", time, ACTIONS[time % 3], mood=mood) for time, mood in enumerate(moods)
    ]
    maps: dict[str, dict[str, IdMap]] = {
        "hashed": {"mood": Hashed(50, salt=1)},
        "managed": {"mood": Managed(4)},
    }
    dataset = build_dataset(log_of(events), HISTORIES, maps.get(kind, {}))
    vocabularies = dataset.schema.vocabulary_by_column
    actions = dataset.event_attributes["action"].take(np.arange(10)).tolist()
    assert actions == vocabularies["events.action"].rows(event.action for event in events)
    rows = dataset.event_attributes["mood"].take(np.arange(10)).tolist()
    assert rows == vocabularies["events.mood"].rows(mood or None for mood in moods)
    assert [row == MISSING_ROW for row in rows] == [not mood for mood in moods]
    assert (rows[-1] == UNKNOWN_ROW) == (kind == "vocabulary")
