"""Which events are for training, for validation and for testing.

``time_share``
    By user: the last tenth of the events is the test split, the tenth before it the validation
    split. Events at one time go to one split together. A user with fewer than three times is for
    training only.
``leave_one_out``
    By user: the last event is the test split, the one before it the validation split, as in SASRec
    and BERT4Rec. A user with fewer than three events is for training only. Of events at one time
    the last in canonical order is the last.
``time``
    The test split begins at one time for all users, the validation split at an earlier one.

Whatever the rule, an event sees the ``num_earlier`` strictly earlier events of its user and nothing
else, and no event of a user is before one of an earlier split: so no training target sees an event
of the validation or test split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.config import LEAVE_ONE_OUT, TIME_SHARE, TIME_SPLIT
from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.times import iso_of, iso_second
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.limits import MAX_TIME

TRAIN, VALID, TEST = 0, 1, 2
VALID_SHARE = TEST_SHARE = 0.1  # of a user's events
MIN_TO_SPLIT = 3  # sets of equal time or events; a user with fewer is for training only
KINDS = (TIME_SHARE, LEAVE_ONE_OUT, TIME_SPLIT)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SplitRule:
    """How a log is split.

    Attributes:
        kind: ``time_share``, ``leave_one_out`` or ``time``.
        times: of ``time``: the Unix seconds at which the validation and the test split begin.
    """

    kind: str = TIME_SHARE
    times: tuple[int, ...] = ()

    def __str__(self) -> str:
        times = f" split_times=[{','.join(map(iso_of, self.times))}]" if self.times else ""
        return f"split={self.kind}{times}"

    def to_json(self) -> dict[str, Any]:
        """Return the rule as the config has it, with times in seconds."""
        return {"split": self.kind, "split_times": list(self.times)}


BY_TIME_SHARE = SplitRule()


def split_rule(split: str, split_times: Sequence[Any] = ()) -> SplitRule:
    """Return the rule that a config names.

    Args:
        split: its kind.
        split_times: of ``time``: where the validation and the test split begin, in ISO 8601 (UTC
            without a zone) or Unix seconds.

    Raises:
        ConfigError: naming what cannot work.

    Example:
        >>> split_rule("time", ["2019-10-01", 1572566400])
        SplitRule(kind='time', times=(1569888000, 1572566400))
    """
    if split not in KINDS:
        raise ConfigError(f"split is {split!r}; one of {KINDS} is allowed")
    given = list(split_times)
    if split != TIME_SPLIT and given:
        raise ConfigError(f"split_times is {given}, and split is {split}; only split=time has them")
    if split != TIME_SPLIT:
        return SplitRule(split)
    if len(given) != 2:
        raise ConfigError(
            f"split_times is {given}; split=time needs two: where the validation split begins, and "
            "where the test split begins"
        )
    valid_from, test_from = map(_second, given)
    if valid_from >= test_from:
        raise ConfigError(
            f"split_times is {given}; the first, where the validation split begins, must be before "
            "the second, where the test split begins"
        )
    return SplitRule(split, (valid_from, test_from))


def _second(given: Any) -> int:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    second = float(given) if is_number else iso_second(given) if isinstance(given, str) else -1.0
    if not 0 <= second <= MAX_TIME:
        raise ConfigError(
            f"split_times has {given!r}; allowed: ISO 8601 such as 2019-10-01 or "
            "2019-10-01T00:00:00Z, and Unix seconds, of 1970 to 2100"
        )
    return int(second)


class Splits(NamedTuple):
    """How the events of a log are split; as the attributes of ``Dataset``."""

    user_offsets: Ints
    num_earlier: Ints
    split: NDArray[np.int8]


def splits_of(log: InteractionLog, rule: SplitRule) -> Splits:
    """Split the events of a log in canonical order."""
    counts = np.bincount(log.users.codes, minlength=len(log.users.ids))
    return split_events(log.users.codes, log.time, counts, rule)


def split_events(user: Ints, time: Ints, counts: Ints, rule: SplitRule) -> Splits:
    """Split events in canonical order; see the module's docstring.

    Args:
        user: [T] ascending.
        time: [T] ascending within a user.
        counts: [U] number of events of each user.
        rule: how to split them.
    """
    user_offsets = np.concatenate([[0], np.cumsum(counts)])
    num_earlier = count_earlier(user, time, user_offsets)
    if rule.kind == TIME_SPLIT:
        split = np.searchsorted(rule.times, time, side="right").astype(np.int8)
    elif rule.kind == LEAVE_ONE_OUT:
        split = _leave_one_out(user_offsets)
    else:
        split = _time_share(user, num_earlier, counts)
    return Splits(user_offsets, num_earlier, split)


def have_all_splits(user: Ints, splits: Splits) -> NDArray[np.bool_]:
    """Return by user whether it has events in all three splits."""
    found = np.zeros((len(splits.user_offsets) - 1, 3), bool)
    found[user, splits.split] = True
    return np.asarray(found.all(axis=1))


def count_earlier(user: Ints, time: Ints, user_offsets: Ints) -> Ints:
    """Count the events of the same user at strictly earlier times.

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
    is_first = np.ones(len(time), bool)
    is_first[1:] = (np.diff(time) != 0) | (np.diff(user) != 0)
    first_of_set = np.maximum.accumulate(np.where(is_first, np.arange(len(time)), 0))
    return first_of_set - user_offsets[user]


def _leave_one_out(user_offsets: Ints) -> NDArray[np.int8]:
    split = np.full(user_offsets[-1], TRAIN, np.int8)
    ends = user_offsets[1:][np.diff(user_offsets) >= MIN_TO_SPLIT]
    split[ends - 2], split[ends - 1] = VALID, TEST
    return split


def _time_share(user: Ints, num_earlier: Ints, counts: Ints) -> NDArray[np.int8]:
    """Split so that a user with at least three sets of equal time has all three splits."""
    is_first = np.ones(len(user), bool)
    is_first[1:] = (np.diff(num_earlier) != 0) | (np.diff(user) != 0)
    set_user, set_earlier = user[is_first], num_earlier[is_first]
    num_sets = np.bincount(set_user, minlength=len(counts))
    first_set = np.cumsum(num_sets) - num_sets
    has_splits = num_sets >= MIN_TO_SPLIT
    # The last set is always for testing, whatever its size; the first two never are.
    set_index = np.arange(len(set_user)) - first_set[set_user]
    late = set_earlier >= np.ceil(counts * (1 - TEST_SHARE))[set_user]
    tested = (late | (set_index == num_sets[set_user] - 1)) & (set_index >= 2)
    num_before_test = num_sets - np.bincount(set_user[tested], minlength=len(counts))
    # For users without splits these two point anywhere and are not used.
    first_tested = np.minimum(first_set + num_before_test, len(set_user) - 1)
    test_from, one_before = set_earlier[first_tested], set_earlier[first_tested - 1]
    valid_from = np.minimum(one_before, np.ceil(counts * (1 - TEST_SHARE - VALID_SHARE)))
    split = np.full(len(user), TRAIN, np.int8)
    split[has_splits[user] & (num_earlier >= valid_from[user])] = VALID
    split[has_splits[user] & (num_earlier >= test_from[user])] = TEST
    return split
