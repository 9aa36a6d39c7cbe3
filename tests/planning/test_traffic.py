"""Traffic: its rates are the ones that were asked for, and the drawn requests follow them."""

import numpy as np
import pytest

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.planning.traffic import (
    DAY_S,
    Traffic,
    draw_requests,
    sampled_users,
    users_by_rank,
)


@pytest.mark.parametrize("zipf", [0.0, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("num_users", [1, 7, 5_000, 10**8])
def test_all_classes_together_come_as_often_as_asked(zipf: float, num_users: int) -> None:
    traffic = Traffic(num_users, 2.0, zipf, 5.0, 20.0)
    users = users_by_rank(traffic)
    assert users.counts.sum() == num_users
    sessions = float(users.counts @ users.sessions_per_s)
    assert sessions == pytest.approx(num_users * 2.0 / DAY_S)
    assert users.sessions_per_s.max() <= traffic.most_sessions_per_s
    assert (np.diff(users.sessions_per_s) <= 1e-12).all()


def test_a_sample_comes_as_often_per_user_as_all() -> None:
    traffic = Traffic(10**7, 2.0, 0.9, 5.0, 20.0)
    sample = sampled_users(traffic, 500)
    assert sample.sessions_per_s.mean() == pytest.approx(2.0 / DAY_S)


def test_drawn_requests_are_as_many_and_as_far_apart_as_asked() -> None:
    traffic = Traffic(2000, 6.0, 0.0, 4.0, 30.0)
    requests = draw_requests(traffic, sampled_users(traffic, 2000), 2.0 * DAY_S, seed=1)
    expected = traffic.requests_per_s * 2.0 * DAY_S
    # Of 96,000 requests in sessions of 4: four times the deviation of as many draws.
    assert len(requests.times) == pytest.approx(expected, rel=0.02)
    assert (np.diff(requests.times) >= 0).all()
    by_user = np.lexsort((requests.times, requests.users))
    users, times = requests.users[by_user], requests.times[by_user]
    gaps = np.diff(times)[users[1:] == users[:-1]]
    # A gap below 3 minutes is a think time but for one in a hundred.
    assert (gaps < 180.0).mean() == pytest.approx(0.75, abs=0.02)


def test_requests_are_under_way_from_the_first_moment_on() -> None:
    traffic = Traffic(40_000, 6.0, 0.0, 4.0, 30.0)
    requests = draw_requests(traffic, sampled_users(traffic, 40_000), 3600.0, seed=1)
    in_ten_minutes = np.histogram(requests.times, 6)[0]
    assert in_ten_minutes.min() > 0.9 * in_ten_minutes.max()


def test_the_same_seed_gives_the_same_requests() -> None:
    traffic = Traffic(50, 6.0, 0.7, 4.0, 30.0)
    one, same, other = (
        draw_requests(traffic, sampled_users(traffic, 50), DAY_S, seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.times, same.times)
    assert not np.array_equal(one.times[:20], other.times[:20])


def test_sessions_that_do_not_fit_into_a_day_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sessions_per_day is 900; .* at most 864.0 sessions"):
        Traffic(10, 900, 0.8, 5.0, 20.0)
