"""Traffic of a population: users come in sessions, some of them far more often than others.

A user asks for a ranking, thinks, asks again, and leaves after a random number of requests. All
times are exponential, so the requests of one user are a renewal process whose gap is a think time
with probability ``1 - 1 / session_requests`` and the time until the next session otherwise. How
often a user comes follows Zipf's law, up to users who never leave: one user has one session at a
time.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_S = 86_400
EXACT_RANKS = 1000  # the most frequent users, each a class of its own
CLASS_RATIO = 1.02  # of the last rank of a class of users to its first one
MAX_DRAWN = 1 << 20  # gaps drawn at a time
MAX_GAPS = 4096  # of one user, drawn at a time


@dataclass(frozen=True)
class Traffic:
    """Users, and how they come.

    Attributes:
        num_users: users who may come.
        sessions_per_day: sessions of a user, mean over all users.
        zipf: exponent of the users' frequencies over their ranks; 0: all come equally often.
        session_requests: requests of a session, mean; their number is geometric.
        think_s: seconds from a request to the next one of a session, mean.

    Raises:
        ConfigError: if the users' days are too short for their sessions.
    """

    num_users: int
    sessions_per_day: float
    zipf: float
    session_requests: float
    think_s: float

    def __post_init__(self) -> None:
        if not self.sessions_per_day <= self.most_sessions_per_s * DAY_S:
            raise ConfigError(
                f"sessions_per_day is {self.sessions_per_day}; {self.session_requests} requests, "
                f"each {self.think_s} s apart, allow at most "
                f"{self.most_sessions_per_s * DAY_S:.1f} sessions in a day"
            )

    @property
    def requests_per_s(self) -> float:
        """Requests of all users, mean."""
        return self.num_users * self.sessions_per_day * self.session_requests / DAY_S

    @property
    def most_sessions_per_s(self) -> float:
        """Sessions of a user who is never away for longer than a think time."""
        return 1.0 / (self.session_requests * self.think_s)

    @property
    def think_share(self) -> float:
        """Share of the gaps between two requests of a user that are think times."""
        return 1.0 - 1.0 / self.session_requests

    def away_s(self, sessions_per_s: Floats) -> Floats:
        """Mean seconds from a user's last request of a session to the first of the next."""
        return 1.0 / sessions_per_s - (self.session_requests - 1.0) * self.think_s


@dataclass(frozen=True, eq=False)
class Users:
    """Classes of users who come equally often.

    Attributes:
        counts: [K] users of each class.
        sessions_per_s: [K] sessions of one user of the class.
    """

    counts: Floats
    sessions_per_s: Floats


def users_by_rank(traffic: Traffic) -> Users:
    """Return all users in classes of neighbouring ranks, the most frequent ones in their own."""
    edges = [*range(min(EXACT_RANKS, traffic.num_users) + 1)]
    while edges[-1] < traffic.num_users:
        edges.append(min(traffic.num_users, math.ceil(edges[-1] * CLASS_RATIO)))
    return _users_between(traffic, np.array(edges, dtype=np.float64))


def sampled_users(traffic: Traffic, num_sampled: int) -> Users:
    """Return so many users who stand for all: each has the mean frequency of one part of the ranks.

    Hits depend on the users' frequencies and on the share of them that fits. Both are those of the
    whole population, so a cache for the sample that is smaller by the same ratio has its hit rate;
    what remains is chance, which falls with the square root of ``num_sampled``.
    """
    sample = _users_between(traffic, np.linspace(0.0, traffic.num_users, num_sampled + 1))
    return Users(np.ones(num_sampled), sample.sessions_per_s)


def _users_between(traffic: Traffic, edges: Floats) -> Users:
    """Return the users between ranks, each class with the mean frequency of its users."""
    counts = np.diff(edges)
    weights = np.diff(_zipf_integral(edges + 0.5, traffic.zipf)) / counts
    total = traffic.num_users * traffic.sessions_per_day / DAY_S
    most = traffic.most_sessions_per_s
    is_capped = np.zeros(len(counts), dtype=bool)
    while True:  # What a capped user leaves goes to the others, of whom some are capped then.
        rest = max(0.0, total - most * float(counts[is_capped].sum()))
        others = float((counts * weights)[~is_capped].sum())
        rates = np.where(is_capped, most, weights * (rest / others if others else 0.0))
        if not (beyond := ~is_capped & (rates > most)).any():
            return Users(counts, rates)
        is_capped |= beyond


def _zipf_integral(ranks: Floats, exponent: float) -> Floats:
    if abs(exponent - 1.0) < 1e-9:
        return np.log(ranks)
    return np.asarray(ranks ** (1.0 - exponent) / (1.0 - exponent))


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests in the order of their times.

    Attributes:
        users: [R] the user of each, a number from 0.
        times: [R] seconds, never decreasing.
    """

    users: Ints
    times: Floats


def draw_requests(traffic: Traffic, users: Users, horizon_s: float, seed: int) -> Requests:
    """Draw the requests of users from a random moment of their lives on.

    Args:
        traffic: how they come.
        users: one user per class.
        horizon_s: seconds from the first to the last.
        seed: the same seed gives the same requests.
    """
    rng = np.random.default_rng(seed)
    away_s = traffic.away_s(users.sessions_per_s)
    # At a random moment a user is more often in a long gap; what is left of it is exponential.
    think_weight = traffic.think_share * traffic.think_s
    away_weight = (1.0 - traffic.think_share) * away_s
    is_thinking = rng.random(len(away_s)) < think_weight / (think_weight + away_weight)
    now = rng.exponential(np.where(is_thinking, traffic.think_s, away_s))
    coming = np.flatnonzero(now < horizon_s)
    drawn_users, drawn_times = [coming], [now[coming]]
    while len(coming):
        num_gaps = max(1, min(MAX_GAPS, MAX_DRAWN // len(coming)))
        is_thinking = rng.random((len(coming), num_gaps)) < traffic.think_share
        means = np.where(is_thinking, traffic.think_s, away_s[coming, None])
        times = now[coming, None] + rng.exponential(means).cumsum(axis=1)
        is_inside = times < horizon_s
        drawn_users.append(np.repeat(coming, is_inside.sum(axis=1)))
        drawn_times.append(times[is_inside])
        now[coming] = times[:, -1]
        coming = coming[is_inside[:, -1]]
    all_users, all_times = np.concatenate(drawn_users), np.concatenate(drawn_times)
    order = np.argsort(all_times, kind="stable")
    return Requests(all_users[order], all_times[order])
