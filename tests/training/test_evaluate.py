"""Evaluation of scorers that are known to be right, wrong or indifferent."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.data.logs import Event, all_events, log_of
from tests.worlds import make_dlrm
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.shards import Shards, in_memory
from torchrec_kvshare.data.splits import TEST, TRAIN, VALID
from torchrec_kvshare.features.bags import single
from torchrec_kvshare.features.batches import assemble
from torchrec_kvshare.features.schema import (
    ITEM,
    REQUEST_TIME,
    UNKNOWN_ROW,
    USER,
    candidate_key,
)
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec
from torchrec_kvshare.model.ranking import dlrm_with_history
from torchrec_kvshare.training import evaluate
from torchrec_kvshare.training.evaluate import (
    Scorer,
    evaluate_catalogue,
    evaluate_sampled,
    model_scorer,
    popularity_scorer,
)
from torchrec_kvshare.training.ranks import ALONE

NUM_ITEMS = 30
NEVER_TRAINED = "200"
# Last item of each user, and whether the user has met it before.
LAST_ITEM = {"new item": "112", "repurchase": "103", "unknown": NEVER_TRAINED, "other": "117"}


def histories() -> list[Event]:
    """Everyone meets items 100 to 106, one for validation and the last; one user meets all."""
    # All at one time: this user is in the training split only.
    events = [Event("all", str(100 + index), 50) for index in range(NUM_ITEMS)]
    for user, last in LAST_ITEM.items():
        seen = [*range(100, 107), 100]
        events += [Event(user, str(item), 100 + index) for index, item in enumerate(seen)]
        events += [Event(user, "101", 200), Event(user, last, 300)]
    return events


@pytest.fixture(scope="module")
def shards() -> Shards:
    return shards_of(histories())


def shards_of(events: list[Event]) -> Shards:
    return in_memory(build_dataset(log_of(events), all_events(8, 4)))


def by_row(shards: Shards) -> dict[int, int]:
    """Row of the held-out item by row of the user."""
    vocabularies = shards.schema.vocabulary_by_column
    return {
        vocabularies[USER].row(user): vocabularies[ITEM].row(item)
        for user, item in LAST_ITEM.items()
    }


def scorer_of(shards: Shards, of_answer: float, of_seen: float) -> Scorer:
    """Return a scorer with a logit for the held-out item, one for items 100 to 106, and 0 else."""
    answers = by_row(shards)
    vocabulary = shards.schema.vocabulary_by_column[ITEM]
    seen = {vocabulary.row(str(item)) for item in range(100, 107)}

    def score(batch: Batch) -> Tensor:
        features = batch.sparse_features
        keys, inverse = features.inverse_indices()
        users = features[USER].values()[inverse[keys.index(USER)]].tolist()
        items = features[candidate_key(ITEM)].values().tolist()
        return torch.tensor(
            [
                of_answer if answers[user] == item else of_seen if item in seen else 0.0
                for user, item in zip(users, items, strict=True)
            ]
        )

    return score


def test_the_right_answer_is_found_unless_training_never_met_it(shards: Shards) -> None:
    found = evaluate_catalogue(scorer_of(shards, 9.0, 0.0), shards, None)
    assert found == {"HR@10": 3 / 4, "NDCG@10": 3 / 4}


def test_the_right_answer_ranked_last_is_not_found(shards: Shards) -> None:
    found = evaluate_catalogue(scorer_of(shards, -9.0, 0.0), shards, None)
    assert found == {"HR@10": 0.0, "NDCG@10": 0.0}


def test_an_indifferent_scorer_finds_nothing(shards: Shards) -> None:
    assert evaluate_catalogue(scorer_of(shards, 0.0, 0.0), shards, None)["HR@10"] == 0.0


def test_items_met_before_are_excluded_unless_the_answer_is_one_of_them(shards: Shards) -> None:
    """A repurchase competed with unmet items only: a scorer that preferred met items found it."""
    # All met items rank first: excluded for a new item, six ranks for the repurchase.
    found = evaluate_catalogue(scorer_of(shards, 1.0, 9.0), shards, None)
    assert found["NDCG@10"] == pytest.approx((2 + 1 / math.log2(6 + 2)) / 4)
    assert found["HR@10"] == 3 / 4


def test_users_are_taken_evenly(shards: Shards) -> None:
    score = scorer_of(shards, 9.0, 0.0)
    # User order: new item, other, repurchase, unknown.
    assert evaluate_catalogue(score, shards, 1)["HR@10"] == 1.0
    assert evaluate_catalogue(score, shards, 2)["HR@10"] == 1 / 2
    assert evaluate_catalogue(score, shards, 3)["HR@10"] == 2 / 3
    assert evaluate_catalogue(score, shards, 4)["HR@10"] == 3 / 4
    assert evaluate_catalogue(score, shards, 99)["HR@10"] == 3 / 4


def test_how_many_users_are_ranked_at_a_time_does_not_matter(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    score = scorer_of(shards, 9.0, 0.0)

    def counting(batch: Batch) -> Tensor:
        sizes.append(batch.sparse_features[REQUEST_TIME].values().numel())
        return score(batch)

    monkeypatch.setattr(evaluate, "CATALOGUE_ROWS_AT_A_TIME", 2 * NUM_ITEMS)
    assert evaluate_catalogue(counting, shards, None)["HR@10"] == 3 / 4
    assert sizes == [2, 1]


@pytest.mark.parametrize("kind", ["a model", "ties"])
def test_a_catalogue_in_chunks_is_ranked_as_a_whole(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A million items at once took 8.6 GB for one user."""
    model = model_scorer(make_dlrm(3, shards.schema))
    sizes: list[int] = []

    def score(batch: Batch) -> Tensor:
        sizes.append(batch.labels.numel())
        if kind == "ties":
            return (batch.sparse_features[candidate_key(ITEM)].values() % 3).float()
        return model(batch)

    monkeypatch.setattr(evaluate, "CUTOFF", NUM_ITEMS + 1)  # Every position is exact.
    dataset = shards.read([0])
    known_items = dataset.known_items
    held_out = np.flatnonzero(dataset.split == TEST)[:3]
    found = [evaluate._positions(score, dataset, held_out, known_items, ALONE)]
    assert sizes == [3 * (NUM_ITEMS + 1)]  # The target is scored with the catalogue.
    assert len({*found[0]}) > 1
    sizes.clear()
    monkeypatch.setattr(evaluate, "FIRST_CHUNK_ITEMS", 4)
    monkeypatch.setattr(evaluate, "CATALOGUE_ROWS_AT_A_TIME", 12)
    found += [evaluate._positions(score, dataset, held_out, known_items, ALONE)]
    assert sizes == [3 * 5, 3 * 9, 3 * 13, 3 * 7]
    found += [evaluate._positions(score, dataset, held_out, known_items[::-1], ALONE)]
    assert found[0] == found[1] == found[2]


def test_ranking_stops_once_the_held_out_item_is_beyond_the_cutoff(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def score(batch: Batch) -> Tensor:
        sizes.append(batch.labels.numel())
        return scorer(batch)

    monkeypatch.setattr(evaluate, "FIRST_CHUNK_ITEMS", 20)
    monkeypatch.setattr(evaluate, "CATALOGUE_ROWS_AT_A_TIME", 20)
    scorer = scorer_of(shards, -9.0, 0.0)
    behind = evaluate_catalogue(score, shards, 1)
    assert sizes == [21]
    scorer = scorer_of(shards, 9.0, 0.0)
    ahead = evaluate_catalogue(score, shards, 1)
    assert sizes == [21, 21, 11]
    assert (behind["HR@10"], ahead["HR@10"]) == (0.0, 1.0)


def test_a_user_without_positive_test_events_has_no_rank() -> None:
    """Its hit rate was 0, which lowered the mean."""
    events = [event._replace(label=int(event.time < 300)) for event in histories()]
    shards = shards_of(events)
    found = evaluate_catalogue(scorer_of(shards, 9.0, 0.0), shards, None)
    assert found == {"HR@10": None, "NDCG@10": None}
    sampled = evaluate_sampled(lambda batch: batch.dense_features[:, 0], shards, TEST, 5)
    assert sampled == {"AUC": None, "GAUC": None, "NE": None}


def test_an_item_that_training_never_met_is_not_found_in_a_small_catalogue() -> None:
    """Its rank was the size of the catalogue: below ten items that was a hit."""
    events = [Event("u", str(100 + time % 3), time) for time in range(9)]
    shards = shards_of([*events, Event("u", NEVER_TRAINED, 9)])
    assert len(shards.shared.known_items) == 3
    found = evaluate_catalogue(lambda batch: batch.labels, shards, None)
    assert found == {"HR@10": 0.0, "NDCG@10": 0.0}


def test_popularity_without_positive_events_is_finite() -> None:
    """Its log odds were infinite and its NE was NaN."""
    events = [event._replace(label=0) for event in histories()]
    shards = shards_of(events)
    known = shards.schema.vocabulary_by_column[ITEM].rows(["100", "101"])
    assert all(map(math.isfinite, scores_of_rows(popularity_scorer(shards, 3), known)))


def test_the_last_of_equal_test_events_is_held_out(shards: Shards) -> None:
    both = shards_of([*histories(), Event("other", "118", 300)])
    # The scorer finds 117, which the user bought at the same time; 118 ties with what is left.
    assert evaluate_catalogue(scorer_of(shards, 9.0, 0.0), both, None)["HR@10"] == 2 / 4


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
    ).tolist()


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


def test_the_held_out_events_are_those_of_users_with_a_test_split(shards: Shards) -> None:
    dataset = shards.read([0])
    tested = np.unique(dataset.event_user[dataset.split == TEST])
    assert [dataset.log.users.ids[code] for code in tested] == sorted(LAST_ITEM)
