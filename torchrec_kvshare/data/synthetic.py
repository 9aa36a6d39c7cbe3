"""Synthetic interactions in which long histories matter, for tests and runs without a data set.

A user has four tastes (categories) at a time, and each is replaced after 120 events on average. An
embedding of the user id can learn only the average over all of a user's tastes. The present ones
show in the history, each about every seventh event, so it takes tens of events to see them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.interactions import ColumnMapping, InteractionLog, build_log
from torchrec_kvshare.data.tables import IdColumn, Part, RawTable
from torchrec_kvshare.errors import ConfigError

NUM_TASTES = 4
TASTE_LIFE = 120  # events, mean
TASTE_SHARE = 0.6  # of the events; the others follow global popularity
# Buys are 30 % of all events: 0.6 * 0.4 + 0.4 * 0.15.
BUY_SHARE_BY_TASTE = (0.15, 0.4)  # of the other events, of the taste events
EQUAL_TIME_SHARE = 0.05  # of the events, at the time of the user's previous event
SHORTEST, LONGEST = 0.25, 3.0  # history, in mean histories
# s of SHORTEST + min(Exp(s), LONGEST - SHORTEST) with mean 1: s * (1 - exp(-2.75 / s)) = 0.75.
LENGTH_SCALE = 0.772
START_TIME = 1_700_000_000  # Unix seconds, November 2023
START_SPREAD = 30 * 86_400  # seconds within which users' first events lie
MEAN_SPAN = 180 * 86_400  # seconds that a history of mean length spans
COUNTRIES = ("AT", "BR", "GB", "JP", "ZA")


def synthetic_world(
    num_users: int, events_per_user: int, num_items: int, num_categories: int, seed: int
) -> InteractionLog:
    """Draw interactions of users whose tastes change; the same seed gives the same log.

    Args:
        num_users: at least 1.
        events_per_user: mean length of a history, at least 1; lengths are between a quarter of it
            and three times it.
        num_items: at least ``num_categories``; items without events are not in the log.
        num_categories: at least 1; an item has one category.
        seed: at least 0.

    Returns:
        The log, all users' events merged by time: actions "view" and "buy", item attribute
        ``category``, item float ``price``, user attribute ``country`` (pure noise), label 1
        everywhere. A user's times increase, except that 5 % equal the time before.

    Raises:
        ConfigError: if a number is out of its range.

    Example:
        >>> log = synthetic_world(3, 20, num_items=50, num_categories=5, seed=0)
        >>> len(log.users.ids), sorted(log.item_attributes), sorted(log.item_floats)
        (3, ['category'], ['price'])
    """
    _check_at_least("num_users", num_users, 1)
    _check_at_least("events_per_user", events_per_user, 1)
    _check_at_least("num_categories", num_categories, 1)
    _check_at_least("num_items", num_items, num_categories)
    _check_at_least("seed", seed, 0)
    rng = np.random.default_rng(seed)
    lengths = _lengths(rng, num_users, events_per_user)  # [num_users]
    users = np.repeat(np.arange(num_users), lengths)  # [T]
    is_first = np.diff(users, prepend=-1) > 0
    # Items are numbered by global popularity.
    category_by_item = rng.permutation(num_items) % num_categories
    is_taste = rng.random(len(users)) < TASTE_SHARE
    wanted = _wanted_categories(rng, is_first, num_categories)
    liked = _items_of_categories(rng, wanted, category_by_item)
    items = np.where(is_taste, liked, _popular_items(rng, len(users), num_items))
    is_buy = rng.random(len(users)) < np.take(BUY_SHARE_BY_TASTE, is_taste.astype(np.int64))
    time = _times(rng, is_first, lengths, MEAN_SPAN / events_per_user)
    prices = np.round(1.0 + 20.0 * rng.standard_exponential(num_items), 2)
    countries = rng.integers(len(COUNTRIES), size=num_users)
    columns = {
        "user": _column(users, range(num_users)),
        "item": _column(items, range(num_items)),
        "time": _column(*_coded(time)),
        "action": _column(is_buy, ("view", "buy")),
        "category": _column(category_by_item[items], range(num_categories)),
        "price": _column(items, prices.tolist()),
        "country": _column(countries[users], COUNTRIES),
    }
    return _log(columns, np.argsort(time, kind="stable"), f"synthetic world {seed}")


def _lengths(
    rng: np.random.Generator, num_users: int, events_per_user: int
) -> NDArray[np.int64]:  # [num_users]
    above = np.minimum(LENGTH_SCALE * rng.standard_exponential(num_users), LONGEST - SHORTEST)
    lengths = np.rint(events_per_user * (SHORTEST + above)).astype(np.int64)
    return np.maximum(lengths, 1)


def _wanted_categories(
    rng: np.random.Generator, is_first: NDArray[np.bool_], num_categories: int
) -> NDArray[np.int64]:  # [T]
    """Draw one of the user's present tastes for each event."""
    num_events = len(is_first)
    is_replaced = rng.random((num_events, NUM_TASTES)) < 1 / TASTE_LIFE
    is_replaced |= is_first[:, None]
    drawn = rng.integers(num_categories, size=(num_events, NUM_TASTES))
    # A taste is the one drawn when it was last replaced.
    rows = np.where(is_replaced, np.arange(num_events)[:, None], 0)
    last = np.maximum.accumulate(rows)
    tastes: NDArray[np.int64] = np.take_along_axis(drawn, last, axis=0)  # [T, NUM_TASTES]
    return tastes[np.arange(num_events), rng.integers(NUM_TASTES, size=num_events)]


def _items_of_categories(
    rng: np.random.Generator, wanted: NDArray[np.int64], category_by_item: NDArray[np.int64]
) -> NDArray[np.int64]:  # [T]
    """Draw an item of each wanted category, popular ones a little more often."""
    by_category = np.argsort(category_by_item, kind="stable")
    counts = np.bincount(category_by_item)  # [num_categories]
    starts = np.cumsum(counts) - counts
    rank = rng.integers(counts[wanted])
    # A quarter of the events take the more popular of two draws: the first items come 1.25 times as
    # often as in a uniform draw, the last 0.75 times.
    other = np.where(rng.random(len(wanted)) < 0.25, rng.integers(counts[wanted]), rank)
    liked: NDArray[np.int64] = by_category[starts[wanted] + np.minimum(rank, other)]
    return liked


def _popular_items(
    rng: np.random.Generator, num_events: int, num_items: int
) -> NDArray[np.int64]:  # [T]
    """Draw items by Zipf's law with exponent 1."""
    weights = 1 / np.arange(1, num_items + 1)
    return rng.choice(num_items, size=num_events, p=weights / weights.sum())


def _times(
    rng: np.random.Generator,
    is_first: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    mean_gap: float,
) -> NDArray[np.int64]:  # [T]
    """Draw Unix seconds, increasing or equal within a user."""
    num_events = len(is_first)
    gaps = 1 + np.floor(mean_gap * rng.standard_exponential(num_events)).astype(np.int64)
    is_equal = rng.random(num_events) < EQUAL_TIME_SHARE
    gaps[is_equal | is_first] = 0
    elapsed = np.cumsum(gaps)
    starts = START_TIME + rng.integers(START_SPREAD, size=len(lengths))
    return elapsed + np.repeat(starts - elapsed[is_first], lengths)


def _coded(time: NDArray[np.int64]) -> tuple[NDArray[np.int64], Sequence[int]]:
    distinct, codes = np.unique(time, return_inverse=True)
    return codes, distinct.tolist()


def _column(codes: NDArray[np.int64] | NDArray[np.bool_], values: Sequence[object]) -> IdColumn:
    return IdColumn(codes.astype(np.int64), [str(value) for value in values])


def _log(columns: dict[str, IdColumn], order: NDArray[np.int64], source: str) -> InteractionLog:
    ordered = {name: IdColumn(codes[order], ids) for name, (codes, ids) in columns.items()}
    mapping = ColumnMapping(
        user="user",
        item="item",
        time="time",
        action="action",
        item_attributes=("category",),
        item_floats=("price",),
        user_attributes=("country",),
    )
    parts = (Part(source, "row", len(order)),)
    table = RawTable(source, ordered, np.arange(1, len(order) + 1), parts)
    return build_log(table, mapping)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; allowed: {least} or more")
