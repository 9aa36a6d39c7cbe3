"""Each rule of splitting against plain loops; what a training target may see under all of them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.logs import (
    START_TIME,
    Event,
    all_events,
    event_lists,
    impressions,
    in_order,
    log_of,
    one_user,
)
from tests.worlds import examples
from torchrec_kvshare.data.dataset import NO_MAPS, Dataset, build_dataset, keep_users, ranges
from torchrec_kvshare.data.splits import (
    BY_TIME_SHARE,
    TEST,
    TRAIN,
    VALID,
    SplitRule,
    split_rule,
)
from torchrec_kvshare.data.targets import windows_of
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import HISTORY

LEAVE_ONE_OUT = split_rule("leave_one_out")
# Logs of the tests begin at START_TIME; those of one second a step end five seconds later.
AT_TIMES = split_rule("time", [START_TIME + 2, START_TIME + 4])
rules = st.sampled_from([BY_TIME_SHARE, LEAVE_ONE_OUT, AT_TIMES])
any_events = event_lists | st.builds(impressions, st.integers(0, 99))


def dataset_of(events: list[Event], rule: SplitRule) -> Dataset:
    return build_dataset(log_of(events), all_events(6, 2), NO_MAPS, rule)


@given(any_events)
@examples(0.3)
def test_leaving_one_out_takes_the_last_event_of_a_user_and_the_one_before(
    events: list[Event],
) -> None:
    expected = []
    for user in sorted({event.user for event in events}):
        num_events = sum(event.user == user for event in events)
        expected += [TRAIN] * num_events if num_events < 3 else [TRAIN] * (num_events - 2) + [1, 2]
    assert dataset_of(events, LEAVE_ONE_OUT).split.tolist() == expected


@given(any_events)
@examples(0.3)
def test_cut_off_times_are_the_first_of_their_split(events: list[Event]) -> None:
    valid_from, test_from = AT_TIMES.times
    expected = [
        TRAIN if event.time < valid_from else VALID if event.time < test_from else TEST
        for event in in_order(events)
    ]
    assert dataset_of(events, AT_TIMES).split.tolist() == expected


@given(any_events, rules)
@examples(0.5)
def test_no_event_sees_one_of_a_later_split(events: list[Event], rule: SplitRule) -> None:
    dataset = dataset_of(events, rule)
    ordered = in_order(events)
    for index, event in enumerate(ordered):
        seen = [
            other
            for other, one in enumerate(ordered)
            if one.user == event.user and one.time < event.time
        ]
        assert len(seen) == dataset.num_earlier[index]
        assert max(dataset.split[seen], default=TRAIN) <= dataset.split[index]


@given(any_events, rules)
@examples(0.5)
def test_training_windows_hold_training_events_alone(events: list[Event], rule: SplitRule) -> None:
    dataset = dataset_of(events, rule)
    windows = windows_of(dataset, np.flatnonzero(dataset.split == TRAIN))
    read = ranges(windows.first_event[HISTORY], windows.num_events[HISTORY])
    assert (dataset.split[dataset.indices_by_history[HISTORY][read]] == TRAIN).all()


def test_of_events_at_one_time_the_last_by_item_is_left_out_and_does_not_see_the_others() -> None:
    # In canonical order, which the order of the rows does not change.
    events = [Event("u", item, time) for item, time in (("104", 9), ("102", 9), ("103", 9))]
    dataset = dataset_of([Event("u", "110", 5), *events], LEAVE_ONE_OUT)
    ids = [dataset.log.items.ids[code] for code in dataset.item]
    assert ids == ["110", "102", "103", "104"]
    assert dataset.split.tolist() == [TRAIN, TRAIN, VALID, TEST]
    assert dataset.num_earlier.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(("num_events", "split"), [(1, [0]), (2, [0, 0]), (3, [0, 1, 2])])
def test_three_events_at_one_time_can_be_left_out(num_events: int, split: list[int]) -> None:
    log = one_user([7] * num_events)
    assert build_dataset(log, all_events(8, 4), NO_MAPS, LEAVE_ONE_OUT).split.tolist() == split


@given(event_lists, st.integers(1, 3), rules)
@examples(0.5)
def test_users_that_are_kept_are_those_with_all_splits_first(
    events: list[Event], max_users: int, rule: SplitRule
) -> None:
    whole = dataset_of(events, rule)
    splits_by_user = {user: set[int]() for user in whole.log.users.ids}
    for user, split in zip(whole.event_user.tolist(), whole.split.tolist(), strict=True):
        splits_by_user[whole.log.users.ids[user]].add(split)
    ranked = sorted(splits_by_user, key=lambda user: (len(splits_by_user[user]) < 3, user))
    kept = keep_users(log_of(events), max_users, rule)
    assert {kept.users.ids[code] for code in kept.users.codes} == set(ranked[:max_users])


# --- the rule of a config


def test_times_are_iso_8601_or_unix_seconds() -> None:
    expected = SplitRule("time", (1_569_888_000, 1_572_566_400))
    assert split_rule("time", ["2019-10-01", "2019-11-01 02:00:00+02:00"]) == expected
    assert split_rule("time", [1_569_888_000, 1_572_566_400.0]) == expected
    assert str(expected) == "split=time split_times=[2019-10-01T00:00:00Z,2019-11-01T00:00:00Z]"
    assert split_rule(**expected.to_json()) == expected
    assert split_rule(**LEAVE_ONE_OUT.to_json()) == LEAVE_ONE_OUT


@pytest.mark.parametrize(
    ("split", "times", "message"),
    [
        ("random", [], "split is 'random'; one of .*'leave_one_out', 'time'"),
        ("time", [], r"split_times is \[\]; split=time needs two: where the validation"),
        ("time", [1, 2, 3], r"split_times is \[1, 2, 3\]; split=time needs two"),
        ("leave_one_out", [1, 2], r"split_times is \[1, 2\], and split is leave_one_out; only spl"),
        ("time", [5, 5], r"split_times is \[5, 5\]; the first, .* must be before the second"),
        ("time", ["10/1/2019", 5], "split_times has '10/1/2019'; allowed: ISO 8601 such as 2019-"),
        ("time", ["2019-02-30", 5], "split_times has '2019-02-30'; allowed"),
        ("time", [1_569_888_000_000, 5], "split_times has 1569888000000; .* of 1970 to 2100"),
        ("time", [True, 5], "split_times has True; allowed"),
        ("time", [float("nan"), 5], "split_times has nan; allowed"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(split: str, times: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_rule(split, times)
