"""Metrics against their definitions: pairs counted one by one, formulas written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_kvshare.training.metrics import (
    Measures,
    Values,
    classification_metrics,
    measures_of,
    num_ahead,
    rank_metrics,
)

# float32 sums of TorchRec against Python's; worst of 2000 draws: 2.1e-7.
TOLERANCE = 2e-6

Rows = list[tuple[int, float]]  # label and probability, of one user


def ordered_share(rows: Rows, value_of_tie: float) -> float | None:
    """Return the share of pairs of a positive and a negative with the positive ahead."""
    positives = [probability for label, probability in rows if label]
    negatives = [probability for label, probability in rows if not label]
    if not positives or not negatives:
        return None
    won = [
        value_of_tie if positive == negative else float(positive > negative)
        for positive in positives
        for negative in negatives
    ]
    return sum(won) / len(won)


def normalised_entropy(rows: Rows) -> float:
    mean_label = sum(label for label, _ in rows) / len(rows)

    def log_loss(label: int, probability: float) -> float:
        return -math.log(probability if label else 1 - probability)

    predicted = sum(log_loss(label, probability) for label, probability in rows)
    return predicted / sum(log_loss(label, mean_label) for label, _ in rows)


def measured(users: list[Rows]) -> Values:
    return measures_of_users(users).values


def measures_of_users(users: list[Rows]) -> Measures:
    rows = [row for user in users for row in user]
    return classification_metrics(
        torch.tensor([probability for _, probability in rows]),
        torch.tensor([float(label) for label, _ in rows]),
        torch.tensor([len(user) for user in users]),
    )


@st.composite
def users_without_ties(draw: st.DrawFn) -> list[Rows]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=70))
    ranks = draw(st.permutations(range(sum(sizes))))
    labels = draw(st.lists(st.integers(0, 1), min_size=sum(sizes), max_size=sum(sizes)))
    rows = [
        (label, (rank + 1) / (sum(sizes) + 1)) for label, rank in zip(labels, ranks, strict=True)
    ]
    return [rows[sum(sizes[:user]) : sum(sizes[: user + 1])] for user in range(len(sizes))]


@given(users_without_ties())
def test_auc_is_the_share_of_pairs_in_order(users: list[Rows]) -> None:
    expected = ordered_share([row for user in users for row in user], 0.5)
    assert measured(users)["AUC"] == (expected and pytest.approx(expected, abs=TOLERANCE))


@given(users_without_ties())
def test_gauc_is_the_mean_of_the_aucs_of_users_with_both_labels(users: list[Rows]) -> None:
    shares = [share for user in users if (share := ordered_share(user, 0.5)) is not None]
    expected = pytest.approx(sum(shares) / len(shares), abs=TOLERANCE) if shares else None
    assert measured(users)["GAUC"] == expected


@given(users_without_ties())
def test_ne_is_the_log_loss_over_that_of_the_mean_label(users: list[Rows]) -> None:
    rows = [row for user in users for row in user]
    if len({label for label, _ in rows}) == 2:
        assert measured(users)["NE"] == pytest.approx(normalised_entropy(rows), rel=TOLERANCE)


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.2, 0.5, 0.7])), min_size=2))
def test_ties_count_between_a_loss_and_a_win(rows: Rows) -> None:
    """TorchRec sorts, so the order of equal scores decides; a tie does not count one half."""
    worst, best = ordered_share(rows, 0.0), ordered_share(rows, 1.0)
    if worst is not None and best is not None and len({score for _, score in rows}) > 1:
        found = measured([rows])["AUC"]
        assert found is not None
        assert worst - TOLERANCE <= found <= best + TOLERANCE


def test_equal_scores_have_no_auc() -> None:
    """It was 1 if the positives came first and 0 if they came last."""
    found = measures_of_users([[(1, 0.4), (0, 0.4)], [(1, 0.4), (0, 0.4), (0, 0.4)]])
    assert found.undefined == {
        "AUC": "all 5 scores are equal",
        "GAUC": "no user has both labels and different scores",
    }
    assert found.values["NE"] == pytest.approx(1.0)
    assert found.values["calibration"] == pytest.approx(1.0)


def test_a_perfect_scorer_and_its_opposite() -> None:
    good: list[Rows] = [[(1, 0.9), (0, 0.1)], [(0, 0.2), (0, 0.3), (1, 0.8)]]
    bad: list[Rows] = [[(label, 1 - probability) for label, probability in u] for u in good]
    assert (measured(good)["AUC"], measured(good)["GAUC"]) == (1.0, pytest.approx(1.0))
    assert (measured(bad)["AUC"], measured(bad)["GAUC"]) == (0.0, pytest.approx(0.0, abs=TOLERANCE))
    ne_of_good, ne_of_bad = measured(good)["NE"], measured(bad)["NE"]
    assert ne_of_good is not None
    assert ne_of_bad is not None
    assert ne_of_good < 1 < ne_of_bad


def test_the_mean_label_for_all_has_an_ne_of_one() -> None:
    assert measured([[(1, 0.25), (0, 0.25), (0, 0.25), (0, 0.25)]])["NE"] == pytest.approx(1.0)


def test_certainty_is_finite() -> None:
    found = measured([[(1, 0.0), (0, 1.0), (1, 0.5)]])["NE"]
    assert found is not None
    assert math.isfinite(found)


def test_rank_metrics_by_hand() -> None:
    # Ranks from 0: 9 is the last of ten.
    found = rank_metrics([0, 9, 10, 2, 199], num_items=201).values
    hits = {1: [0], 5: [0, 2], 10: [0, 2, 9], 50: [0, 2, 9, 10], 200: [0, 2, 9, 10, 199]}
    for cutoff, ranks in hits.items():
        assert found[f"HR@{cutoff}"] == len(ranks) / 5
        gains = [1 / math.log2(rank + 2) for rank in ranks]
        assert found[f"NDCG@{cutoff}"] == pytest.approx(sum(gains) / 5)
        gains = [1 / (rank + 1) for rank in ranks]
        assert found[f"MRR@{cutoff}"] == pytest.approx(sum(gains) / 5)
    assert len(found) == 15


def test_rank_metrics_without_users_say_why() -> None:
    found = rank_metrics([], num_items=300)
    assert set(found.values.values()) == {None}
    assert found.undefined == dict.fromkeys(found.values, "no user has a held-out item")


def test_a_hit_among_all_items_is_undefined() -> None:
    """With ten items in a ranking HR@10 was 1, whatever the scores."""
    found = rank_metrics([0, 9], num_items=10)
    assert (found.values["HR@5"], found.values["HR@10"]) == (1 / 2, None)
    assert found.values["NDCG@10"] == pytest.approx((1 + 1 / math.log2(11)) / 2)
    reason = "a ranking has 10 items, and each is a hit"
    assert found.undefined == dict.fromkeys(("HR@10", "HR@50", "HR@200"), reason)
    assert rank_metrics([0, 9], num_items=11).values["HR@10"] == 1.0


def test_calibration_is_the_sum_of_predictions_over_that_of_labels() -> None:
    found = measured([[(1, 0.9), (0, 0.3)], [(1, 0.5), (1, 0.25), (0, 0.15)]])["calibration"]
    assert found == pytest.approx(2.1 / 3, rel=TOLERANCE)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_have_no_metrics(label: int, caplog: pytest.LogCaptureFixture) -> None:
    """Their NE was 4e11 and their AUC 0.5."""
    found = measures_of_users([[(label, 0.3), (label, 0.6)]])
    names = ["AUC", "GAUC", "NE", *(["calibration"] if label == 0 else [])]
    reason = f"all 2 labels are {'positive' if label else 'negative'}"
    assert found.undefined == dict.fromkeys(names, reason)
    assert [name for name, value in found.values.items() if value is None] == names
    found.log_undefined()
    assert f"no {', '.join(names)}: {reason}" in caplog.text


def test_no_target_is_a_reason() -> None:
    assert set(measures_of_users([]).undefined.values()) == {"there is no target"}


def test_reasons_are_beside_the_values() -> None:
    found = measures_of({"AUC": "all 3 labels are positive", "calibration": 0.5, "HR@1": 0.0})
    assert found.to_json() == {
        "AUC": None,
        "calibration": 0.5,
        "HR@1": 0.0,
        "undefined": {"AUC": "all 3 labels are positive"},
    }
    assert found.take("calibration").to_json() == {"calibration": 0.5}
    assert (found.take("HR@1") | found.take("AUC")).undefined == found.undefined


def test_users_of_one_class_each_have_no_gauc() -> None:
    """It was 0.5."""
    found = measures_of_users([[(1, 0.9), (1, 0.8)], [(0, 0.1), (0, 0.2)]])
    assert (found.values["AUC"], found.values["GAUC"]) == (1.0, None)
    assert found.undefined == {"GAUC": "no user has both labels and different scores"}


def rank(scores: list[float], target: int, excluded: list[int]) -> int:
    mask = torch.zeros(1, len(scores), dtype=torch.bool)
    mask[0, [target, *excluded]] = True
    return int(num_ahead(torch.tensor([scores]), torch.tensor([scores[target]]), mask))


@pytest.mark.parametrize(
    ("scores", "target", "excluded", "expected"),
    [
        ([0.9, 0.5, 0.1], 0, [], 0),
        ([0.9, 0.5, 0.1], 2, [], 2),
        ([0.9, 0.5, 0.1], 2, [0], 1),
        ([0.9, 0.5, 0.1], 2, [0, 1], 0),
        ([0.5, 0.5, 0.5, 0.1], 1, [], 2),  # Ties count against the target.
        ([0.5, 0.5, 0.5, 0.1], 1, [0], 1),
        ([0.9, 0.5, 0.1], 1, [1], 1),  # The target is not excluded, whatever is asked.
        ([0.9, 0.5, 0.1], 1, [0, 1, 2], 0),
    ],
)
def test_rank_of_the_target(
    scores: list[float], target: int, excluded: list[int], expected: int
) -> None:
    assert rank(scores, target, excluded) == expected


def test_a_nan_score_counts_against_the_target() -> None:
    """All logits of a diverged model were NaN, and its hit rate was 1."""
    nan = math.nan
    assert rank([nan, nan, nan], 1, []) == 2
    assert rank([0.1, nan, 0.2], 1, []) == 2
    assert rank([nan, 0.5, 0.2], 1, []) == 1


def brute_rank(scores: Tensor, target: int, excluded: Tensor) -> int:
    others = [item for item in range(len(scores)) if item != target and not excluded[item]]
    return sum(bool(scores[item] >= scores[target]) for item in others)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_ranks_are_those_of_counting(num_users: int, num_items: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (num_users, num_items), generator=generator).float()
    excluded = torch.rand(num_users, num_items, generator=generator) < 0.4
    target = torch.randint(num_items, (num_users,), generator=generator)
    expected = [
        brute_rank(scores[user], int(target[user]), excluded[user]) for user in range(num_users)
    ]
    own = scores.gather(1, target[:, None])
    excluded.scatter_(1, target[:, None], True)
    assert num_ahead(scores, own[:, 0], excluded).tolist() == expected
    # A catalogue in chunks: the counts add up.
    chunks = zip(scores.split(2, dim=1), excluded.split(2, dim=1), strict=True)
    counts = torch.stack([num_ahead(part, own[:, 0], hidden) for part, hidden in chunks])
    assert counts.sum(0).tolist() == expected
