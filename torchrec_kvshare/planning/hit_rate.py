"""Hit rates of a cache that evicts the least recently used user and lets K/V expire: two ways.

``simulate`` counts the hits of drawn requests. ``hit_rate`` computes them by Che's approximation:
in a large cache, a user is evicted a fixed time T after the last request, whoever the user is. T
follows from the capacity, since the users asked for within the last T are those that fit. Both say
the same of ``KVCache``: K/V that has expired stays where it is until it is asked for or evicted,
every request counts as a use, and K/V that is encoded anew starts a new life.

A request is a hit if its user's last one was at most T ago, and the K/V was encoded at most
``ttl_s`` ago. Requests of one user are a renewal process (``traffic.py``), so a life of K/V starts
at a miss, and its hits are the renewals within ``ttl_s`` whose gaps are all at most T: a renewal
equation, solved on a grid.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.planning.traffic import (
    Floats,
    Ints,
    Requests,
    Traffic,
    Users,
    draw_requests,
    sampled_users,
)

# Four times as many of both change no hit rate by 0.001.
NUM_STEPS = 400  # of the renewal equation's grid
NUM_RATES = 32  # frequencies at which it is solved; between them the solution is interpolated
NUM_BISECTIONS = 60
FOREVER_S = 1e12

LEAST_SAMPLED = 1000  # users of a simulation
LEAST_HELD = 1000  # of them in the cache, so that chance is below a point
LIFE_RATIO = 20  # of a simulation's warm-up for K/V to expire, to the time that K/V is kept

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Lives:
    """How long K/V may be used.

    Attributes:
        ttl_s: seconds from encoding.
        idle_ttl_s: seconds from the last use.
    """

    ttl_s: float
    idle_ttl_s: float


# --- Che's approximation


def hit_rate(traffic: Traffic, users: Users, kept_s: float, lives: Lives) -> float:
    """Return the share of requests that find their user's K/V.

    Args:
        traffic: how users come.
        users: all of them.
        kept_s: T, seconds after its last use at which K/V is evicted.
        lives: when it expires.
    """
    kept_s = min(kept_s, lives.idle_ttl_s)
    rates = users.sessions_per_s
    low, high = float(rates.min()), float(rates.max())
    solved = np.geomspace(low, high, NUM_RATES) if high > low else np.array([low])
    hits = _hits_of_a_life(traffic, traffic.away_s(solved), kept_s, lives.ttl_s)
    shares = np.interp(np.log(rates), np.log(solved), hits / (1.0 + hits))
    return float(np.average(shares, weights=users.counts * rates))


def users_held(traffic: Traffic, users: Users, kept_s: float) -> float:
    """Return the mean number of users whose last request was at most ``kept_s`` ago."""
    think, away = traffic.think_share, traffic.away_s(users.sessions_per_s)
    thinking = think * traffic.think_s * -math.expm1(-kept_s / traffic.think_s)
    being_away = (1.0 - think) * away * -np.expm1(-kept_s / away)
    gap_s = think * traffic.think_s + (1.0 - think) * away
    return float(np.dot(users.counts, (thinking + being_away) / gap_s))


def kept_seconds(traffic: Traffic, users: Users, num_held: float) -> float:
    """Return how long K/V stays after its last use in a cache for ``num_held`` users: Che's T."""
    if num_held >= float(users.counts.sum()):
        return FOREVER_S
    low, high = math.log(1e-3), math.log(FOREVER_S)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if users_held(traffic, users, math.exp(middle)) < num_held:
            low = middle
        else:
            high = middle
    return math.exp(low)


def _hits_of_a_life(traffic: Traffic, away_s: Floats, kept_s: float, ttl_s: float) -> Floats:
    """Return [K] how many hits follow a miss on average, by how long a user stays away."""
    grid = np.linspace(0.0, ttl_s, NUM_STEPS + 1)
    within = np.minimum(grid, kept_s)[:, None]
    think = traffic.think_share
    # A gap is at most t and at most T; the probability that it is longer than T ends the life.
    gap_below = think * -np.expm1(-within / traffic.think_s)  # [S + 1, 1]
    gap_below = gap_below + (1.0 - think) * -np.expm1(-within / away_s)  # [S + 1, K]
    of_step = np.diff(gap_below, axis=0)
    hits = np.zeros_like(gap_below)
    for step in range(1, NUM_STEPS + 1):
        # The next gap ends in the middle of its step, the rest of the life is as a new one's.
        rest = (hits[:step] + np.vstack([hits[1:step], np.zeros((1, len(away_s)))])) / 2
        known = gap_below[step] + np.einsum("sk,sk->k", of_step[:step][::-1], rest)
        hits[step] = known / (1.0 - of_step[0] / 2)
    return np.asarray(hits[-1])


# --- simulation


def simulated_hit_rate(
    traffic: Traffic, num_held: float, kept_s: float, lives: Lives, num_requests: int, seed: int
) -> float:
    """Simulate a cache on a sample of the users, once it has filled up.

    Args:
        traffic: how users come.
        num_held: of all users, those whose K/V fits.
        kept_s: how long K/V stays after its last use, which decides how long the cache takes to
            fill.
        lives: when K/V expires.
        num_requests: roughly, if that is enough to hold ``LEAST_HELD`` users of the sample.
        seed: of the requests.
    """
    # K/V of users who come more often than that seldom lives until it expires.
    warm_up_s = 1.5 * kept_s + min(lives.ttl_s, LIFE_RATIO * kept_s)
    horizon_s = 1.5 * warm_up_s
    per_user = traffic.requests_per_s / traffic.num_users * horizon_s
    enough = max(LEAST_SAMPLED, num_requests / per_user, LEAST_HELD * traffic.num_users / num_held)
    num_sampled = math.ceil(min(traffic.num_users, enough))
    requests = draw_requests(traffic, sampled_users(traffic, num_sampled), horizon_s, seed)
    held_of_sample = num_held * num_sampled / traffic.num_users
    return simulate(requests, held_of_sample, lives, warm_up_s)


def simulate(requests: Requests, num_held: float, lives: Lives, warm_up_s: float) -> float:
    """Return the share of requests after the warm-up that hit, in an LRU cache of equal entries.

    Args:
        requests: in the order of their times; the cache is empty at the first.
        num_held: users whose K/V fits.
        lives: when K/V expires.
        warm_up_s: seconds in which hits are not counted.
    """
    is_miss = misses(requests, num_held, lives)
    counted = requests.times >= warm_up_s
    return 1.0 - float(is_miss[counted].mean()) if counted.any() else math.nan


def misses(requests: Requests, num_held: float, lives: Lives) -> Bools:
    """Return [R] whether each request misses, as ``simulate`` counts them."""
    users, times = requests.users, requests.times
    previous = _previous_of_same(users)
    num_between = _distinct_since(previous)
    is_cold = previous < 0
    gaps = times - times[np.maximum(previous, 0)]
    is_new = is_cold | (num_between >= math.floor(num_held)) | (gaps > lives.idle_ttl_s)
    by_user = np.argsort(users, kind="stable")  # each user's requests side by side, oldest first
    is_miss = np.empty(len(users), dtype=bool)
    is_miss[by_user] = _with_expiry(times[by_user], is_new[by_user], lives.ttl_s)
    return is_miss


def _previous_of_same(users: Ints) -> Ints:
    """Return [R] the index of the same user's request before each, -1 for the first."""
    by_user = np.argsort(users, kind="stable")
    previous = np.full(len(users), -1)
    is_same = users[by_user[1:]] == users[by_user[:-1]]
    previous[by_user[1:][is_same]] = by_user[:-1][is_same]
    return previous


def _distinct_since(previous: Ints) -> Ints:
    """Return [R] how many other users came since the same user's last request: LRU's depth.

    A user came since then if and only if one of the requests since then is the user's first since:
    its own ``previous`` is earlier.
    """
    is_cold = previous < 0
    again = np.flatnonzero(~is_cold)
    num_cold = np.cumsum(is_cold)
    depth = np.zeros(len(previous), dtype=np.int64)
    num_earlier = num_cold[again] + _smaller_before(previous[again])
    depth[again] = num_earlier - (previous[again] + 1)
    return depth


def _smaller_before(values: Ints) -> Ints:
    """Return for each of distinct values how many of those before it are smaller.

    From the highest bit of the values' ranks to the lowest, values are parted stably by that bit,
    as in a radix sort: a value with a one comes behind the zeros of its part that stood before it.
    """
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values)] = np.arange(len(values))
    found = np.zeros(len(values), dtype=np.int64)
    placed, places = ranks, np.arange(len(values))  # ranks as parted so far, and where they stood
    for bit in range(max(len(values) - 1, 0).bit_length() - 1, -1, -1):
        is_one = (placed >> bit & 1).astype(bool)
        num_zeros = np.cumsum(~is_one) - ~is_one
        start = placed >> (bit + 1) << (bit + 1)
        zeros_before = num_zeros - num_zeros[start]
        found[places[is_one]] += zeros_before[is_one]
        ones_before = np.arange(len(values)) - start - zeros_before
        target = np.where(is_one, start + (1 << bit) + ones_before, start + zeros_before)
        parted, moved = np.empty_like(placed), np.empty_like(places)
        parted[target], moved[target] = placed, places
        placed, places = parted, moved
    return found


def _with_expiry(times: Floats, is_new: Bools, ttl_s: float) -> Bools:
    """Return the misses, given those for other reasons: K/V of a miss is used for ``ttl_s``."""
    starts = np.flatnonzero(is_new)
    life = np.cumsum(is_new) - 1
    # One sorted key: lives one after another, each from its own start on.
    span = float(times.max(initial=0.0)) + 1.0
    ends = np.append(starts[1:], len(times))
    is_miss = is_new.copy()
    base = life * span
    keys = base + times
    current, last = starts, ends
    while len(current):
        expired = np.searchsorted(keys, base[current] + (times[current] + ttl_s), side="right")
        expired = np.minimum(expired, last)
        is_inside = expired < last
        current, last = expired[is_inside], last[is_inside]
        is_miss[current] = True
    return is_miss
