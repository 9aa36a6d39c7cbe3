"""Measures of what a codec does to scores, by hand, and the error that a codec may make."""

import pytest
import torch

from torchrec_kvshare.cache.codecs import CODECS, get_codec
from torchrec_kvshare.verify.codecs import (
    Effect,
    effect_figures,
    effect_on,
    is_within_error,
    request_auc,
    top_overlap,
)


@pytest.mark.parametrize(
    ("scores", "target", "expected"),
    [
        ([0.9, 0.1], 0, 1.0),
        ([0.9, 0.1], 1, 0.0),
        ([0.5, 0.5], 1, 0.5),
        # Below 0.4 stands one of four, beside it two, above it one.
        ([0.4, 0.7, 0.4, 0.4, 0.1], 2, (1 + 2 / 2) / 4),
        ([0.2, 0.2, 0.2], 0, 0.5),
    ],
)
def test_auc_of_a_request_is_the_share_below_its_target(
    scores: list[float], target: int, expected: float
) -> None:
    assert request_auc(scores, target) == expected


@pytest.mark.parametrize(
    ("scores", "exact", "top", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], [40.0, 30.0, 20.0, 10.0], 2, 1.0),
        ([3.0, 4.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], 2, 1.0),  # The order among the best is free.
        ([4.0, 2.0, 3.0, 1.0], [4.0, 3.0, 2.0, 1.0], 2, 0.5),
        ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], 2, 0.0),
        ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], 10, 1.0),  # Fewer than ten: all are best.
        ([1.0, 1.0, 1.0], [7.0, 7.0, 7.0], 1, 1.0),  # Of equal ones the first, on both sides.
        ([1.0, 1.0, 1.0], [6.0, 7.0, 7.0], 1, 0.0),
    ],
)
def test_overlap_is_the_share_of_the_exact_best_that_is_kept(
    scores: list[float], exact: list[float], top: int, expected: float
) -> None:
    assert top_overlap(scores, exact, top) == expected


def test_figures_are_means_and_the_worst_and_a_ratio_of_sums() -> None:
    exact = [Effect(0.5, 1.0, 0.0, 1000), Effect(0.75, 1.0, 0.0, 3000)]
    effects = [Effect(0.25, 0.5, 0.125, 500), Effect(0.75, 1.0, 0.25, 700)]
    assert effect_figures(effects, exact) == {
        "auc_change": -0.125,
        "top10_overlap": 0.75,
        "max_score_difference": 0.25,
        "bytes_ratio": 0.3,  # Not the mean of 0.5 and 0.233.
    }


def test_a_codec_against_itself_changes_nothing() -> None:
    effects = [Effect(1 / number, 1.0, 0.0, number) for number in range(1, 9)]
    assert list(effect_figures(effects, effects).values()) == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("head_dim", [1, 4, 5])
def test_what_a_codec_reads_is_within_its_error_and_no_further(
    name: str, num_rows: int, head_dim: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    kv = torch.randn(2, num_rows, 3, head_dim, generator=generator)
    kv *= torch.logspace(-2, 2, head_dim)
    codec = CODECS[name]
    read = codec.decode(codec.encode(kv))
    assert is_within_error(codec, kv, read)
    spoiled = read.clone()
    last = (1, num_rows - 1, 2, head_dim - 1)
    spoiled[last] += 3 * codec.relative_error * kv.abs().max() + 1e-6
    assert not is_within_error(codec, kv, spoiled)
    spoiled[last] = torch.nan
    assert not is_within_error(codec, kv, spoiled)


def test_the_error_allowed_is_that_of_the_own_block() -> None:
    """Of the greatest number of all K/V it would be a hundred times as much here."""
    kv = torch.ones(1, 128, 1, 4)
    kv[:, :, :, 2:] = 100.0
    read = kv.clone()
    read[0, 5, 0, 1] += 0.1
    assert not is_within_error(get_codec("int8"), kv, read)
    read = kv.clone()
    read[0, 5, 0, 3] += 0.1
    assert is_within_error(get_codec("int8"), kv, read)


def test_float32_is_compared_bit_by_bit() -> None:
    kv = torch.tensor([0.0, torch.nan]).view(1, 1, 1, 2)
    codec = get_codec("float32")
    assert is_within_error(codec, kv, kv.clone())
    assert not is_within_error(codec, kv, torch.tensor([-0.0, torch.nan]).view(1, 1, 1, 2))


def test_the_effect_on_scores_is_of_the_worst_task_and_the_ranking_of_the_first() -> None:
    """A codec within its budget for the first task could move the scores of another by more."""
    exact = torch.tensor([[0.5, 0.1], [0.25, 0.2], [0.75, 0.3]], dtype=torch.float64)
    moved = exact.clone()
    moved[1, 1] += 0.125
    assert effect_on(moved, exact, 2, 7) == Effect(1.0, 1.0, 0.125, 7)
    moved[2, 0] = 0.375
    assert effect_on(moved, exact, 2, 7) == Effect(0.5, 1.0, 0.375, 7)
