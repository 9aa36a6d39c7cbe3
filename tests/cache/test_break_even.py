"""The break-even length of a tier, by hand."""

import pytest

from torchrec_kvshare.cache.break_even import break_even_events


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ({16: 0.5, 32: 0.4}, 16),
        ({32: 0.4, 16: 1.5}, 32),
        ({16: 0.5, 32: 1.0, 64: 0.9}, 64),
        ({16: 0.5, 32: 0.4, 64: 1.0}, 65),
        ({16: 0.5, 32: float("nan"), 64: 0.2}, 64),
        ({14: 2.0}, 15),
    ],
)
def test_break_even_is_where_all_longer_ones_are_cheaper(
    ratios: dict[int, float], least: int
) -> None:
    assert break_even_events(ratios) == least
