"""Requests in the order in which they arrive: traces that are drawn, and their parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchrec_kvshare.benchmark.workload import draw_users, make_schema
from torchrec_kvshare.data.dataset import Ints
from torchrec_kvshare.features.bags import single
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Events, Request
from torchrec_kvshare.features.schema import (
    HISTORY,
    NUM_RESERVED_ROWS,
    TIME,
    FeatureSchema,
    Window,
    event_key,
    item_key,
)

ZIPF = "zipf"
BLOCKS_PER_WINDOW = 4  # as in configs/train.yaml: 256 events in blocks of 64
REQUESTS_PER_USER = 10  # mean
VISITS_PER_EVENT = 5  # visits of a user until the history has one more event
SECONDS_PER_REQUEST = 1.0  # mean
SHORTEST_SHARE = 8  # of a window, the shortest first history: an eighth
TWINS = 10  # every tenth user has the events of the user before: a second account of a household
ZIPF_START = 1_700_000_000  # Unix seconds
FIRST_EVENT_S = 365 * 86_400  # before that
SECONDS_PER_EVENT = 3600


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they arrive.

    Attributes:
        data: name of the data.
        schema: the columns; one history.
        requests: each has at least one event; equal histories share one ``Events``.
    """

    data: str
    schema: FeatureSchema
    requests: Sequence[Request]


def zipf_trace(max_history: int, num_requests: int, num_candidates: int, seed: int) -> Trace:
    """Draw requests by Zipf's law of users whose histories grow by an event every few visits.

    Args:
        max_history: of the window; a first history fills an eighth of it or more.
        num_requests: one a second, on average.
        num_candidates: candidates of every request, the same for all.
        seed: same seed, same trace.
    """
    num_users = max(1, num_requests // REQUESTS_PER_USER)
    rng = np.random.default_rng(seed)
    users = draw_users(rng, num_users, num_requests)
    times = ZIPF_START + rng.exponential(SECONDS_PER_REQUEST, num_requests).cumsum().astype(int)
    shortest = max(1, max_history // SHORTEST_SHARE)
    num_first = rng.integers(shortest, max_history + 1, num_users)
    is_twin = np.arange(num_users) % TWINS == TWINS - 1
    owner_by_user = np.arange(num_users) - is_twin
    schema = make_schema(max_history, num_users, window_block(max_history))
    window = schema.histories[0].window
    template = request_template(schema, num_candidates, seed)
    num_visits = [0] * num_users
    known: dict[tuple[int, int], dict[str, Events]] = {}
    requests = []
    for user, at in zip(users.tolist(), times.tolist(), strict=True):
        owner = int(owner_by_user[user])
        num_events = int(num_first[owner]) + num_visits[user] // VISITS_PER_EVENT
        num_visits[user] += 1
        if (owner, num_events) not in known:
            owner_rng = np.random.default_rng([seed, owner])
            events = draw_events(schema, window, owner_rng, num_events)
            known[owner, num_events] = {HISTORY: events}
        requests.append(
            replace(
                template,
                user_id=str(user),
                user_row=user + NUM_RESERVED_ROWS,
                time=at,
                events_by_history=known[owner, num_events],
            )
        )
    return Trace(ZIPF, schema, requests)


def window_block(max_history: int) -> int:
    """Return the block of windows of so many events."""
    return max_history // math.gcd(max_history, BLOCKS_PER_WINDOW)


def request_template(schema: FeatureSchema, num_candidates: int, seed: int) -> Request:
    """Return a request without events; the cost of candidates depends on their number only."""
    return parse_request(draw_raw_request(schema, 0, num_candidates, seed), schema)


def draw_events(
    schema: FeatureSchema, window: Window, rng: np.random.Generator, num_events: int
) -> Events:
    """Draw the window of a user's first events; a longer history begins like a shorter one."""
    start = window.start(num_events)
    numbers = rng.integers(2**31, size=num_events)[start:]

    def drawn(key: str) -> Ints:
        return NUM_RESERVED_ROWS + numbers % (schema.num_table_rows(key) - NUM_RESERVED_ROWS)

    rows = {column: drawn(event_key(column)) for column in schema.event_columns}
    bags = {c: single(torch.from_numpy(drawn(item_key(c)))) for c in schema.item_attributes}
    event = np.arange(start, num_events)
    rows[TIME] = ZIPF_START - FIRST_EVENT_S + SECONDS_PER_EVENT * event
    floats = {c: torch.from_numpy(numbers % 100 / np.float32(100)) for c in schema.event_floats}
    return Events(as_tensors(rows), bags, start, floats)


def as_tensors(columns: dict[str, Ints]) -> dict[str, Tensor]:
    """Return columns as tensors, which share their memory."""
    return {column: torch.from_numpy(values) for column, values in columns.items()}
