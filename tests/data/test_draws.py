"""Draws are uniform, and depend on their keys only."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.data.draws import Draws

KEYS = np.arange(20_000)
# Standard deviation of the mean of 20,000 uniform numbers: 0.002.
FIVE_SIGMA = 0.0103


@given(st.integers(0, 2**40), st.integers(0, 99), st.sampled_from([1, 3, 500]))
def test_a_draw_depends_on_its_seed_and_keys_only(seed: int, epoch: int, step: int) -> None:
    keys, slots = KEYS[:600, None], np.arange(3)
    drawn = Draws(seed, epoch).uniform(keys, slots)
    parts = [
        Draws(seed, epoch).uniform(keys[first : first + step], slots)
        for first in range(0, len(keys), step)
    ]
    assert np.array_equal(np.concatenate(parts), drawn)
    assert Draws(seed, epoch).uniform(KEYS[599:601], np.array([2]))[0] == drawn[599, 2]


@given(st.integers(-5, 2**62))
def test_draws_are_uniform(seed: int) -> None:
    drawn = Draws(seed).uniform(KEYS)
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < FIVE_SIGMA
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / np.sqrt(len(drawn))


@given(st.integers(0, 2**62))
def test_other_keys_and_other_seeds_give_other_numbers(seed: int) -> None:
    drawn = [
        Draws(seed).uniform(KEYS),
        Draws(seed + 1).uniform(KEYS),
        Draws(seed, 0).uniform(KEYS),
        Draws(seed).uniform(KEYS, np.array([0])),
        Draws(seed).uniform(KEYS, np.array([-1])),
    ]
    for index, ours in enumerate(drawn):
        for theirs in drawn[:index]:
            assert abs(np.corrcoef(ours, theirs)[0, 1]) < 5 / np.sqrt(len(KEYS))


def test_integers_below_a_limit_are_all_drawn_alike() -> None:
    counts = np.bincount(Draws(3).below(7, KEYS), minlength=7)
    assert len(counts) == 7
    # A count has a standard deviation of 49.5.
    assert np.abs(counts - len(KEYS) / 7).max() < 250
