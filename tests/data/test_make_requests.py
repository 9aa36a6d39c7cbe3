"""Requests of a data set have the one request format, no future events, and are reproducible."""

import json
from typing import Any

import numpy as np
import pytest

from tests.data.logs import (
    ITEMS,
    MOODS,
    START_TIME,
    Event,
    age_of,
    all_events,
    countries_of,
    genres_of,
    in_order,
    log_of,
    one_user,
    price_of,
)
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.requests import make_requests, make_targeted_requests
from torchrec_kvshare.data.shards import in_memory
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.decode import decode_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import HISTORY

NUM_CANDIDATES = 6


@pytest.fixture(scope="module")
def events() -> list[Event]:
    rng = np.random.default_rng(4)
    return [
        Event(
            str(rng.choice(["7", "12", "007"])),
            str(rng.choice(ITEMS)),
            START_TIME + 10 * int(rng.integers(40)),
            str(rng.choice(["1", "2", "3.5"])),
            mood=str(rng.choice(MOODS)),
            battery=float(rng.integers(9)) / 8,
            dwell=float(rng.integers(9)) / 4,
        )
        for _ in range(90)
    ]


@pytest.fixture(scope="module")
def dataset(events: list[Event]) -> Dataset:
    return build_dataset(log_of(events), all_events(8, 4))


@pytest.fixture(scope="module")
def requests(dataset: Dataset) -> list[dict[str, Any]]:
    return list(make_requests(in_memory(dataset), 50, NUM_CANDIDATES, seed=1))


def past_of(user: str, time: int, events: list[Event]) -> list[Event]:
    return in_order([event for event in events if event.user == user and event.time < time])


def test_requests_have_the_one_format(requests: list[dict[str, Any]]) -> None:
    assert [request["request_id"] for request in requests] == [f"r{n}" for n in range(1, 51)]
    for request in requests:
        assert list(request) == [
            *("request_id", "user_id", "time", "context", "history", "candidates")
        ]
        assert list(request["context"]) == ["country", "age", "battery"]
        assert list(request["history"]) == [
            *("item_id", "action", "mood", "dwell", "genres", "time")
        ]
        assert list(request["candidates"]) == ["item_id", "genres", "price"]
        assert {len(column) for column in request["candidates"].values()} == {NUM_CANDIDATES}
        assert json.loads(json.dumps(request)) == request


def test_history_is_all_that_is_strictly_earlier(
    requests: list[dict[str, Any]], events: list[Event]
) -> None:
    longest = 0
    for request in requests:
        past = past_of(str(request["user_id"]), request["time"], events)
        history = request["history"]
        assert history["item_id"] == [int(event.item) for event in past]
        assert [str(action) for action in history["action"]] == [e.action for e in past]
        assert history["mood"] == [event.mood or None for event in past]
        assert history["dwell"] == [event.dwell for event in past]
        assert history["genres"] == [list(genres_of(event.item)) for event in past]
        assert history["time"] == [event.time for event in past]
        longest = max(longest, len(past))
    # Uncut: the model cuts the window.
    assert longest > 8


def test_an_action_that_training_never_met_is_given_as_it_is() -> None:
    """It became null, which the model reads as missing; training reads it as unknown."""
    events = [Event("u", "100", time, "view") for time in range(20)]
    events[18] = events[18]._replace(action="new")
    dataset = build_dataset(log_of(events), all_events(32, 8))
    requests = list(make_requests(in_memory(dataset), 20, 1, seed=0))
    actions = {request["time"]: request["history"]["action"] for request in requests}
    assert actions[19] == ["view"] * 18 + ["new"]


def test_the_item_of_the_event_is_among_distinct_candidates(
    requests: list[dict[str, Any]], events: list[Event], dataset: Dataset
) -> None:
    catalogue = {int(dataset.log.items.ids[code]) for code in dataset.known_items}
    indices = set()
    for request in requests:
        shown = request["candidates"]["item_id"]
        now = {
            int(event.item)
            for event in events
            if (event.user, event.time) == (str(request["user_id"]), request["time"])
        }
        assert now & set(shown)
        assert len(set(shown)) == NUM_CANDIDATES
        assert set(shown) - now <= catalogue
        indices |= {shown.index(item) for item in now & set(shown)}
    assert len(indices) > 2  # The index does not give the target away.


def test_a_target_is_what_the_user_took_at_that_time(
    requests: list[dict[str, Any]], events: list[Event], dataset: Dataset
) -> None:
    targeted = list(make_targeted_requests(in_memory(dataset), 50, NUM_CANDIDATES, seed=1))
    assert [request.raw for request in targeted] == requests
    for raw, target in targeted:
        taken = str(raw["candidates"]["item_id"][target])
        assert any(
            (event.user, event.time, event.item) == (str(raw["user_id"]), raw["time"], taken)
            for event in events
        )
    assert {request.target for request in targeted} == set(range(NUM_CANDIDATES))


def test_attributes_of_candidates_and_users_are_those_of_the_log(
    requests: list[dict[str, Any]],
) -> None:
    for request in requests:
        candidates = request["candidates"]
        ids = [str(item) for item in candidates["item_id"]]
        assert candidates["genres"] == [list(genres_of(item)) for item in ids]
        assert candidates["price"] == [price_of(item) for item in ids]
        user = str(request["user_id"])
        assert request["context"]["country"] == list(countries_of(user))
        assert request["context"]["age"] == age_of(user)


def test_times_and_users_are_those_of_test_events(
    requests: list[dict[str, Any]], dataset: Dataset
) -> None:
    tested = np.flatnonzero(dataset.split == TEST)
    users = [dataset.log.users.ids[code] for code in dataset.event_user[tested]]
    expected = set(zip(users, dataset.time[tested].tolist(), strict=True))
    came = {(str(request["user_id"]), request["time"]) for request in requests}
    assert came <= expected


def test_every_request_parses(requests: list[dict[str, Any]], dataset: Dataset) -> None:
    for request in requests:
        parsed = parse_request(decode_request(json.dumps(request)), dataset.schema)
        assert parsed.num_candidates == NUM_CANDIDATES
        assert parsed.num_events == min(
            len(request["history"]["time"]), parsed.events_by_history[HISTORY].num_events
        )


def test_the_same_seed_gives_the_same_requests(
    requests: list[dict[str, Any]], dataset: Dataset
) -> None:
    assert list(make_requests(in_memory(dataset), 50, NUM_CANDIDATES, seed=1)) == requests
    assert list(make_requests(in_memory(dataset), 50, NUM_CANDIDATES, seed=2)) != requests


def test_integers_of_the_log_are_integers_and_other_ids_text(
    requests: list[dict[str, Any]],
) -> None:
    assert {type(request["user_id"]) for request in requests} == {int, str}
    assert {request["user_id"] for request in requests} <= {7, 12, "007"}
    actions = {action for request in requests for action in request["history"]["action"]}
    assert actions == {1, 2, "3.5"}


@pytest.mark.parametrize(
    ("count", "candidates", "message"),
    [
        (0, 5, "count is 0; it must be at least 1"),
        (-3, 5, "count is -3; it must be at least 1"),
        (5, 0, "candidates is 0; it must be at least 1"),
        (5, 13, "candidates is 13; the catalogue has 12 items"),
    ],
)
def test_counts_that_cannot_work_are_refused(
    dataset: Dataset, count: int, candidates: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        list(make_requests(in_memory(dataset), count, candidates, seed=0))


def test_without_test_events_there_are_no_requests() -> None:
    dataset = build_dataset(one_user([1, 2]), all_events(8, 4))
    with pytest.raises(DataError, match="no event in the test split"):
        list(make_requests(in_memory(dataset), 5, 1, seed=0))


def test_the_whole_catalogue_may_be_asked_for(dataset: Dataset) -> None:
    (request,) = make_requests(in_memory(dataset), 1, 12, seed=0)
    assert sorted(request["candidates"]["item_id"]) == [int(item) for item in ITEMS]
