"""Evaluation of scorers that are known to be right, wrong or indifferent."""

import math

import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.data.logs import Event
from tests.training.worlds import LAST_ITEM, held_out_events, shards_of
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST, TRAIN, VALID
from torchrec_kvshare.features.bags import single
from torchrec_kvshare.features.batches import assemble
from torchrec_kvshare.features.schema import (
    ITEM,
    UNKNOWN_ROW,
    USER,
    candidate_key,
)
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec
from torchrec_kvshare.model.ranking import dlrm_with_history
from torchrec_kvshare.training import evaluate
from torchrec_kvshare.training.evaluate import (
    Scorer,
    evaluate_sampled,
    model_scorer,
    popularity_scorer,
    score_split,
)
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out
from torchrec_kvshare.training.ranks import ALONE, Ranks


@pytest.fixture(scope="module")
def shards() -> Shards:
    return shards_of(held_out_events())


def test_without_a_positive_target_no_metric_of_labels_is_defined() -> None:
    shards = shards_of([event._replace(label=int(event.time < 300)) for event in held_out_events()])
    sampled = evaluate_sampled(lambda batch: batch.dense_features[:, :1], shards, TEST, 5)
    assert sampled == {"AUC": None, "GAUC": None, "NE": None, "calibration": None}


def test_popularity_without_positive_events_is_finite() -> None:
    """Its log odds were infinite and its NE was NaN."""
    events = [event._replace(label=0) for event in held_out_events()]
    shards = shards_of(events)
    known = shards.schema.vocabulary_by_column[ITEM].rows(["100", "101"])
    assert all(map(math.isfinite, scores_of_rows(popularity_scorer(shards, 3), known)))


def test_sampled_metrics_of_a_scorer_that_knows(shards: Shards) -> None:
    for split in (VALID, TEST):
        found = evaluate_sampled(lambda batch: 20 * batch.labels - 10, shards, split, 5)
        assert (found["AUC"], found["GAUC"]) == (1.0, pytest.approx(1.0))
        assert 0 < found["NE"] < 1e-3


def test_every_scorer_meets_the_same_negatives(shards: Shards) -> None:
    met: list[list[int]] = []

    def score(batch: Batch) -> Tensor:
        met.append(batch.sparse_features[candidate_key(ITEM)].values().tolist())
        return batch.labels

    for _ in range(2):
        evaluate_sampled(score, shards, TEST, 5)
    assert met[0] == met[1]
    assert len(met[0]) == len(LAST_ITEM) * 6


def test_how_many_targets_are_scored_at_a_time_does_not_matter(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_item(batch: Batch) -> Tensor:
        return torch.sin(batch.sparse_features[candidate_key(ITEM)].values().float())

    together = evaluate_sampled(by_item, shards, TEST, 5)
    monkeypatch.setattr(evaluate, "TARGETS_AT_A_TIME", 1)
    assert evaluate_sampled(by_item, shards, TEST, 5) == together


def test_progress_is_shown_by_the_first_rank_alone(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test of some minutes said nothing."""

    def shown(rank: int) -> str:
        ranks = Ranks(rank, 1, 1, ALONE.device)
        score_split(lambda batch: batch.labels, shards, TEST, 5, ranks=ranks)
        rank_held_out(lambda batch: batch.labels, shards, RankingSettings(), ranks)
        return capsys.readouterr().err

    assert shown(0) == ""  # They are done before a bar is shown.
    monkeypatch.setattr(evaluate, "BAR_DELAY_S", 0.0)
    first = shown(0)
    assert "test: 100%" in first
    assert "ranking: 100%" in first
    assert "4/4" in first
    assert shown(1) == ""


def test_of_a_large_split_evenly_drawn_users_are_scored(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of torchrec.metrics are in float32: beyond 16.8 M rows its AUC counts no further."""
    users: list[list[int]] = []

    def score(batch: Batch) -> Tensor:
        users.append(batch.sparse_features[USER].values().tolist())
        return batch.labels

    evaluate_sampled(score, shards, TEST, 5)
    # Four users, six rows each: two and four of them are expected.
    for rows in (12, 24):
        monkeypatch.setattr(evaluate, "MAX_ROWS", rows)
        evaluate_sampled(score, shards, TEST, 5)
    everyone, some, all_again = users
    assert sorted(all_again) == sorted(everyone)
    assert 0 < len(some) < len(everyone)
    assert set(some) < set(everyone)


def scores_of_rows(score: Scorer, item_rows: list[int]) -> list[float]:
    rows = torch.tensor(item_rows)
    bags = {USER: single(torch.zeros(1, dtype=torch.int64)), candidate_key(ITEM): single(rows)}
    return score(
        assemble(bags, torch.zeros_like(rows), torch.zeros(len(rows), 4), torch.zeros(len(rows)))
    )[:, 0].tolist()


def test_popularity_is_the_log_odds_of_training_counts() -> None:
    events = [Event("u", item, time) for time, item in enumerate(["100"] * 6 + ["101"] * 2)]
    events += [Event("u", "102", 8, label=0), Event("u", "102", 9), Event("u", "103", 10)]
    shards = shards_of([*events, Event("vv", "102", 1, label=0)])
    assert shards.read([0]).split.tolist() == [TRAIN] * 9 + [VALID, TEST] + [TRAIN]
    known = shards.schema.vocabulary_by_column[ITEM].rows(["100", "101", "102"])
    score = popularity_scorer(shards, num_negatives=3)
    # Eight positives and three times as many negatives over a catalogue of three items.
    expected = [math.log((count + 1) / (3 * 8 / 3)) for count in (0, 6, 2, 0)]
    assert scores_of_rows(score, [UNKNOWN_ROW, *known]) == pytest.approx(expected, rel=1e-6)


def test_a_model_is_scored_in_eval_mode_and_without_gradients(shards: Shards) -> None:
    spec = TowerSpec(CAUSAL, dim=8, num_layers=1, num_heads=2, dropout=0.5)
    model = dlrm_with_history(shards.schema, spec, [4, 1]).train()
    score = model_scorer(model)
    assert not model.training
    logits: list[Tensor] = []

    def keeping(batch: Batch) -> Tensor:
        logits.append(score(batch))
        return logits[-1]

    for _ in range(2):
        evaluate_sampled(keeping, shards, TEST, 3)
    assert torch.equal(logits[0], logits[1])  # Without dropout.
    assert not logits[0].requires_grad
