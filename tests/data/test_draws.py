"""Draws are uniform, and depend on their keys only."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.data.draws import Draws, Proposal

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


weights = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9)


@given(weights, st.integers(0, 2**40), st.data())
def test_items_are_drawn_by_their_weights_and_never_the_own_one(
    weights: list[float], seed: int, data: st.DataObject
) -> None:
    items = np.arange(len(weights)) * 3 + 5
    proposal = Proposal(items, np.array(weights))
    expected = np.array(weights) / sum(weights)
    assert np.abs(proposal.probability(items) - expected).max() < 1e-12
    assert proposal.probability(np.array([4, 6, 5 + 3 * len(weights)])).tolist() == [0.0] * 3
    uniform = Draws(seed).uniform(KEYS)
    own = int(data.draw(st.integers(0, len(weights) - 1)))
    of_others = np.where(np.arange(len(weights)) == own, 0.0, expected)
    of_others /= of_others.sum()
    for found, wanted in (
        (proposal.draw(uniform), expected),
        (proposal.draw_others(uniform, items[[own]]), of_others),
    ):
        counts = np.bincount((found - 5) // 3, minlength=len(weights))
        deviation = np.sqrt(len(KEYS) * wanted * (1 - wanted))
        # Bernstein's bound: further off has a chance below 1e-7, also where few are expected.
        likely = np.where(wanted > 0, 6 * deviation + 12, 0)
        assert (np.abs(counts - len(KEYS) * wanted) <= likely).all()


def test_rounding_at_the_edge_of_an_interval_never_gives_the_own_item() -> None:
    rng = np.random.default_rng(0)
    items = np.arange(40)
    proposal = Proposal(items, rng.random(40) + 1e-9)
    ends = np.cumsum(proposal.probability(items))
    for own in items.tolist():
        width = proposal.probability(np.array([own]))
        edge = np.array([ends[own] - width[0]]) / (1 - width)
        near = np.concatenate([np.nextafter(edge, 0), edge, np.nextafter(edge, 1)]).clip(0, 1)
        assert not (proposal.draw_others(np.append(near, 1 - 2**-53), np.array([own])) == own).any()
