"""Hit rates: the simulation against a cache, Che's approximation against the simulation."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.cache.kv_cache import KVCache, Rules
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import HISTORY, TIME, FeatureSchema, History, Window
from torchrec_kvshare.planning import hit_rate as ours
from torchrec_kvshare.planning.hit_rate import (
    FOREVER_S,
    Lives,
    hit_rate,
    kept_seconds,
    misses,
    simulated_hit_rate,
    users_held,
)
from torchrec_kvshare.planning.traffic import (
    Requests,
    Traffic,
    users_by_rank,
)

SECOND, MINUTE, HOUR, DAY = 1.0, 60.0, 3600.0, 86_400.0

# Traffic, seconds that K/V is kept, its lives: sessions or none, any unevenness, lives that end
# within a session, between sessions, or never.
SETTINGS = {
    "lives within a session": (Traffic(10**6, 2.0, 0.8, 5.0, 20.0), 40.0, Lives(300.0, 300.0)),
    "idle before evicted": (Traffic(10**6, 2.0, 0.8, 5.0, 20.0), HOUR, Lives(HOUR, 120.0)),
    "kept between sessions": (Traffic(10**6, 2.0, 0.8, 5.0, 20.0), 6 * HOUR, Lives(DAY, DAY)),
    "no sessions": (Traffic(10**5, 3.0, 1.1, 1.0, 30.0), 6 * HOUR, Lives(DAY, DAY)),
    "all come equally often": (Traffic(10**5, 4.0, 0.0, 3.0, 60.0), HOUR, Lives(2 * HOUR, HOUR)),
    "a few come all the time": (Traffic(10**7, 1.0, 1.2, 10.0, 5.0), 2 * HOUR, Lives(HOUR, DAY)),
    "expires before it is evicted": (Traffic(10**6, 5.0, 0.6, 4.0, 30.0), DAY, Lives(HOUR, HOUR)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_che_and_the_simulation_agree_within_two_points(name: str) -> None:
    traffic, kept_s, lives = SETTINGS[name]
    users = users_by_rank(traffic)
    che = hit_rate(traffic, users, kept_s, lives)
    num_held = users_held(traffic, users, kept_s)
    simulated = simulated_hit_rate(traffic, num_held, kept_s, lives, 200_000, seed=1)
    assert 0.1 < che < 0.99
    assert simulated == pytest.approx(che, abs=0.02)


def test_a_sample_stands_for_a_population_at_two_scales() -> None:
    """One user in two hundred, and one in twenty: the same traffic has the same hit rate."""
    traffic, kept_s, lives = SETTINGS["kept between sessions"]
    num_held = users_held(traffic, users_by_rank(traffic), kept_s)
    small, large = (
        simulated_hit_rate(traffic, num_held, kept_s, lives, num_requests, seed=2)
        for num_requests in (10_000, 1_000_000)
    )
    assert small == pytest.approx(large, abs=0.01)


def test_che_says_the_same_of_a_hundred_million_users_as_of_a_million() -> None:
    """If all come equally often, the share of users that fits decides alone."""
    lives = Lives(DAY, DAY)
    shares = []
    for num_users in (10**6, 10**8):
        traffic = Traffic(num_users, 2.0, 0.0, 5.0, 20.0)
        users = users_by_rank(traffic)
        kept_s = kept_seconds(traffic, users, 0.3 * num_users)
        shares.append(hit_rate(traffic, users, kept_s, lives))
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


@given(
    visits=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=60),
    num_held=st.integers(1, 6),
    ttl_s=st.integers(1, 60),
    idle_ttl_s=st.integers(1, 60),
)
def test_the_simulation_misses_where_the_cache_misses(
    visits: list[tuple[int, int]], num_held: int, ttl_s: int, idle_ttl_s: int
) -> None:
    users = np.array([user for user, _ in visits])
    times = np.cumsum([gap for _, gap in visits]).astype(np.float64)
    lives = Lives(float(ttl_s), float(idle_ttl_s))
    found = misses(Requests(users, times), num_held, lives)
    assert found.tolist() == cache_misses(users.tolist(), times.tolist(), num_held, lives)


def cache_misses(users: list[int], times: list[float], num_held: int, lives: Lives) -> list[bool]:
    """Look up and put one event of each user, in a ``KVCache`` of as many pages as users fit."""
    schema = FeatureSchema({}, histories=(History(HISTORY, Window(1, 1)),))
    identity = identity_of(UNNAMED, NO_CONTEXT, HISTORY, 1)
    one = PrefixDigests(Events({TIME: torch.zeros(1, dtype=torch.int64)}, {}, 0), schema, identity)
    now = 0.0
    pool = PagePool(4 * (num_held + 1), 1, 1, 1, 1)  # One page for the request in flight.
    rules = Rules(lives.ttl_s, lives.idle_ttl_s)
    cache = KVCache(pool, rules, LruPolicy(4 * num_held), clock=lambda: now)
    found = []
    for user, at in zip(users, times, strict=True):
        now = at
        lookup = cache.lookup(str(user), one)
        entry = lookup.entry
        if lookup.reason != HIT:
            entry = cache.put(str(user), one.content, torch.zeros(1, 1, 1, 1), encoded_at=at)
        assert entry is not None
        cache.release(entry)
        found.append(lookup.reason != HIT)
    return found


def test_the_simulation_of_a_large_cache_is_an_ordered_dict() -> None:
    """Without expiry it is plain LRU; at this size each pass over the bits has something to do."""
    rng = np.random.default_rng(4)
    users = rng.zipf(1.2, 20_000) % 3_000
    held: OrderedDict[int, None] = OrderedDict()
    expected = []
    for user in users.tolist():
        expected.append(user not in held)
        held[user] = None
        held.move_to_end(user)
        if len(held) > 250:
            held.popitem(last=False)
    requests = Requests(users.astype(np.int64), np.arange(20_000.0))
    assert misses(requests, 250, Lives(FOREVER_S, FOREVER_S)).tolist() == expected


@given(st.permutations(range(33)))
def test_smaller_values_before_each_are_counted(values: list[int]) -> None:
    expected = [sum(other < one for other in values[:at]) for at, one in enumerate(values)]
    assert ours._smaller_before(np.array(values)).tolist() == expected


@pytest.mark.parametrize("kept_s", [5.0, 300.0, 5 * HOUR])
def test_the_time_that_kv_is_kept_follows_from_the_capacity(kept_s: float) -> None:
    traffic = Traffic(10**6, 2.0, 0.8, 5.0, 20.0)
    users = users_by_rank(traffic)
    found = kept_seconds(traffic, users, users_held(traffic, users, kept_s))
    assert found == pytest.approx(kept_s, rel=1e-6)
    assert kept_seconds(traffic, users, 10**6) == FOREVER_S


def test_without_expiry_a_hit_is_a_gap_that_is_short_enough() -> None:
    """The renewal equation's limit: hits of a life are a geometric number."""
    traffic = Traffic(1000, 20.0, 0.0, 3.0, 60.0)
    users = users_by_rank(traffic)
    away_s = float(traffic.away_s(users.sessions_per_s)[0])
    gap_below = 2 / 3 * -math.expm1(-600 / 60) + 1 / 3 * -math.expm1(-600 / away_s)
    found = hit_rate(traffic, users, 600.0, Lives(FOREVER_S, FOREVER_S))
    assert found == pytest.approx(gap_below, abs=1e-6)
