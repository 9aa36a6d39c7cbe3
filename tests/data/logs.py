"""Logs built event by event; an id alone determines its attributes."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from torchrec_kvshare.data.interactions import InteractionLog, ReadReport
from torchrec_kvshare.data.tables import ValueColumn, encode
from torchrec_kvshare.features.schema import HISTORY, UNNAMED_TASK, History, Window

ITEMS = tuple(str(number) for number in range(100, 112))
ACTIONS = ("view", "buy", "rate")
COUNTRIES = ("AT", "BR", "GB")
USERS = ("u", "vv", "www")
MOODS = ("", "calm", "glad")  # none is missing
SURFACES = ((), ("home",), ("search", "ads"))
START_TIME = 1_700_000_000


class Event(NamedTuple):
    """One row of a log."""

    user: str
    item: str
    time: int
    action: str = "view"
    label: int = 1
    surfaces: tuple[str, ...] = ()
    mood: str = ""
    battery: float = 0.0
    dwell: float = 0.0


def all_events(max_history: int, block: int) -> list[History]:
    """The one history of all events."""
    return [History(HISTORY, Window(max_history, block))]


def genres_of(item: str) -> tuple[str, ...]:
    """None, one or two genres."""
    return tuple(f"g{(int(item) + index) % 5}" for index in range(int(item) % 3))


def price_of(item: str) -> float:
    return float(int(item) % 7) + 0.25


def countries_of(user: str) -> tuple[str, ...]:
    return (COUNTRIES[len(user) % len(COUNTRIES)],)


def age_of(user: str) -> float:
    return 20.5 + 3 * len(user)


def log_of(events: list[Event]) -> InteractionLog:
    """A log of events, in their order."""
    users, items = encode(e.user for e in events), encode(e.item for e in events)
    return InteractionLog(
        users=users,
        items=items,
        time=np.array([event.time for event in events], np.int64),
        labels={UNNAMED_TASK: np.array([event.label for event in events], np.float32)},
        event_attributes={
            "action": encode(event.action for event in events),
            "mood": encode(event.mood for event in events),
        },
        item_attributes={"genres": [genres_of(item) for item in items.ids]},
        item_floats={"price": np.array([price_of(item) for item in items.ids], np.float32)},
        user_attributes={"country": [countries_of(user) for user in users.ids]},
        report=ReadReport(len(events), len(events), {}, []),
        request_attributes={"surface": _surfaces_of(events)}
        if any(event.surfaces for event in events)
        else {},
        user_floats={"age": np.array([age_of(user) for user in users.ids], np.float32)},
        request_floats={"battery": np.array([event.battery for event in events], np.float32)},
        event_floats={"dwell": np.array([event.dwell for event in events], np.float32)},
    )


def _surfaces_of(events: list[Event]) -> ValueColumn:
    values = list(dict.fromkeys(event.surfaces for event in events))
    return ValueColumn(np.array([values.index(event.surfaces) for event in events]), values)


def in_order(events: list[Event]) -> list[Event]:
    """Events in the order of a data set: by user, time, item, attributes, label and request."""
    return sorted(
        events,
        key=lambda e: (*(e.user, e.time, int(e.item), e.action, e.mood, e.label), *e[5:6], *e[7:]),
    )


def one_user(times: list[int], items: list[str] | None = None) -> InteractionLog:
    """A log of one user; without ``items``, its items cycle through ``ITEMS``."""
    items = items or [ITEMS[index % len(ITEMS)] for index in range(len(times))]
    return log_of([Event("u", item, time) for item, time in zip(items, times, strict=True)])


def drawn_events(counts: list[int], seed: int) -> list[Event]:
    """``counts`` events of each user, shuffled, with few distinct times."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(np.repeat(USERS[: len(counts)], counts))
    return [
        Event(
            user,
            str(rng.choice(ITEMS)),
            START_TIME + 3_000 * int(rng.integers(40)),
            str(rng.choice(ACTIONS)),
            int(rng.integers(2)),
            mood=str(rng.choice(MOODS)),
            battery=float(rng.integers(4)) / 4,
            dwell=float(rng.integers(4)) - 1.5,
        )
        for user in users.tolist()
    ]


def impressions(seed: int) -> list[Event]:
    """Events of three users in requests: several items at one time, on one surface or on two."""
    rng = np.random.default_rng(seed)
    shown = [
        Event(
            user, str(item), START_TIME + 3_000 * int(time), "view", int(rng.integers(2)), surface
        )
        for user, count in zip(USERS, (9, 4, 1), strict=True)
        for time in rng.integers(0, 30, count)
        for surface in (SURFACES[index] for index in rng.choice(3, 1 + int(rng.integers(2))))
        for item in rng.choice(ITEMS, 3, replace=False)
    ]
    return [event for event in shown if rng.random() < 0.8]


# A few events, which shrink well, or histories longer than any window of the tests.
event_lists = st.lists(
    st.builds(
        Event,
        st.sampled_from(USERS),
        st.sampled_from(ITEMS),
        st.integers(START_TIME, START_TIME + 5),
        st.sampled_from(ACTIONS),
        st.integers(0, 1),
        st.just(()),
        st.sampled_from(MOODS),
        st.sampled_from([0.0, 0.25, -1.5]),
        st.sampled_from([0.0, 3.5, -0.125]),
    ),
    min_size=1,
    max_size=12,
) | st.builds(
    drawn_events, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 2**32 - 1)
)
