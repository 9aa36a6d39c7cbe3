"""Ranks of held-out items by scorers that are known to be right, wrong or indifferent."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.data.logs import Event
from tests.training.worlds import (
    LAST_ITEM,
    NEVER_TRAINED,
    NUM_ITEMS,
    held_out_events,
    shards_of,
)
from tests.worlds import make_dlrm
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST, VALID
from torchrec_kvshare.features.schema import ITEM, REQUEST_TIME, USER, candidate_key
from torchrec_kvshare.training import ranking
from torchrec_kvshare.training.evaluate import Scorer, model_scorer
from torchrec_kvshare.training.metrics import CUTOFFS, MAX_CUTOFF, Values, rank_metrics
from torchrec_kvshare.training.ranking import Ranked, RankingSettings, _drawn, rank_held_out


@pytest.fixture(scope="module")
def shards() -> Shards:
    return shards_of(held_out_events())


def ranked(score: Scorer, shards: Shards, **settings: Any) -> Ranked:
    return rank_held_out(score, shards, RankingSettings(**settings))


def metrics_of(score: Scorer, shards: Shards, **settings: Any) -> Values:
    found = ranked(score, shards, **settings)
    return rank_metrics(found.position.tolist(), found.num_items).values


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
                [of_answer if answers[user] == item else of_seen if item in seen else 0.0]
                for user, item in zip(users, items, strict=True)
            ]
        )

    return score


def test_the_right_answer_is_found_unless_training_never_met_it(shards: Shards) -> None:
    found = metrics_of(scorer_of(shards, 9.0, 0.0), shards)
    # 30 items: the first 50 hold them all.
    assert {name: value for name, value in found.items() if name[:2] == "HR"} == {
        **dict.fromkeys(("HR@1", "HR@5", "HR@10"), 3 / 4),
        **dict.fromkeys(("HR@50", "HR@200"), None),
    }
    assert {found[f"{name}@{cutoff}"] for name in ("NDCG", "MRR") for cutoff in CUTOFFS} == {3 / 4}


def test_the_validation_split_has_held_out_items_of_its_own(shards: Shards) -> None:
    """Everyone's last validation event is of item 101, and of other items in the test split."""
    row = shards.schema.vocabulary_by_column[ITEM].row("101")

    def prefer_101(batch: Batch) -> Tensor:
        return (batch.sparse_features[candidate_key(ITEM)].values() == row).float()[:, None]

    found = rank_held_out(prefer_101, shards, RankingSettings(), split=VALID)
    assert found.position.tolist() == [0, 0, 0, 0]
    assert found.num_earlier.tolist() == [8, 8, 8, 8]
    assert 0 not in ranked(prefer_101, shards).position


def test_the_right_answer_ranked_last_is_not_found(shards: Shards) -> None:
    score = scorer_of(shards, -9.0, 0.0)
    # Users: new item, other, repurchase, unknown. The first two met seven of the thirty items.
    assert ranked(score, shards).position.tolist() == [22, 22, 29, MAX_CUTOFF]
    assert metrics_of(score, shards)["HR@10"] == 0.0


def test_an_indifferent_scorer_finds_nothing(shards: Shards) -> None:
    assert metrics_of(scorer_of(shards, 0.0, 0.0), shards)["HR@10"] == 0.0


def test_items_met_before_are_excluded_unless_the_answer_is_one_of_them(shards: Shards) -> None:
    """A repurchase competed with unmet items only: a scorer that preferred met items found it."""
    # All met items rank first: excluded for a new item, six ranks for the repurchase.
    found = metrics_of(scorer_of(shards, 1.0, 9.0), shards)
    assert found["NDCG@10"] == pytest.approx((2 + 1 / math.log2(6 + 2)) / 4)
    assert (found["HR@10"], found["HR@5"]) == (3 / 4, 2 / 4)


def test_items_met_before_compete_where_they_are_included(shards: Shards) -> None:
    found = ranked(scorer_of(shards, 1.0, 9.0), shards, exclude_seen=False)
    assert found.position.tolist() == [7, 7, 6, MAX_CUTOFF]


def test_users_are_taken_evenly(shards: Shards) -> None:
    score = scorer_of(shards, 9.0, 0.0)
    # User order: new item, other, repurchase, unknown.
    assert metrics_of(score, shards, max_users=1)["HR@10"] == 1.0
    assert metrics_of(score, shards, max_users=2)["HR@10"] == 1 / 2
    assert metrics_of(score, shards, max_users=3)["HR@10"] == 2 / 3
    assert metrics_of(score, shards, max_users=4)["HR@10"] == 3 / 4
    assert metrics_of(score, shards, max_users=99)["HR@10"] == 3 / 4


def test_how_many_users_are_ranked_at_a_time_does_not_matter(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    score = scorer_of(shards, 9.0, 0.0)

    def counting(batch: Batch) -> Tensor:
        sizes.append(batch.sparse_features[REQUEST_TIME].values().numel())
        return score(batch)

    monkeypatch.setattr(ranking, "CATALOGUE_ROWS_AT_A_TIME", 2 * NUM_ITEMS)
    assert metrics_of(counting, shards)["HR@10"] == 3 / 4
    assert sizes == [2, 1]


@pytest.mark.parametrize("kind", ["a model", "ties"])
@pytest.mark.parametrize("drawn", [None, 27])
def test_items_in_chunks_are_ranked_as_a_whole(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, kind: str, drawn: int | None
) -> None:
    """A million items at once took 8.6 GB for one user."""
    model = model_scorer(make_dlrm(3, shards.schema))
    sizes: list[int] = []

    def score(batch: Batch) -> Tensor:
        sizes.append(batch.labels.numel())
        if kind == "ties":
            return (batch.sparse_features[candidate_key(ITEM)].values() % 3).float().unsqueeze(1)
        return model(batch)

    monkeypatch.setattr(ranking, "MAX_CUTOFF", NUM_ITEMS + 1)  # Every position is exact.
    found = [ranked(score, shards, num_candidates=drawn).position.tolist()]
    num_items = drawn or NUM_ITEMS
    assert sizes == [3 * (num_items + 1)]  # The target is scored with the others.
    assert len({*found[0]}) > 1
    sizes.clear()
    monkeypatch.setattr(ranking, "FIRST_CHUNK_ITEMS", 4)
    monkeypatch.setattr(ranking, "CATALOGUE_ROWS_AT_A_TIME", 12)
    found += [ranked(score, shards, num_candidates=drawn).position.tolist()]
    # Each of three users alone, with up to twelve items.
    assert sizes == [5, 9, 13, num_items - 24 + 1] * 3
    assert found[0] == found[1]


def test_ranking_stops_once_the_held_out_item_is_beyond_the_cutoff(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def score(batch: Batch) -> Tensor:
        sizes.append(batch.labels.numel())
        return scorer(batch)

    monkeypatch.setattr(ranking, "MAX_CUTOFF", 10)
    monkeypatch.setattr(ranking, "FIRST_CHUNK_ITEMS", 20)
    monkeypatch.setattr(ranking, "CATALOGUE_ROWS_AT_A_TIME", 20)
    scorer = scorer_of(shards, -9.0, 0.0)
    behind = metrics_of(score, shards, max_users=1)
    assert sizes == [21]
    scorer = scorer_of(shards, 9.0, 0.0)
    ahead = metrics_of(score, shards, max_users=1)
    assert sizes == [21, 21, 11]
    assert (behind["HR@10"], ahead["HR@10"]) == (0.0, 1.0)


def test_a_user_without_positive_test_events_has_no_rank() -> None:
    """Its hit rate was 0, which lowered the mean."""
    events = [event._replace(label=int(event.time < 300)) for event in held_out_events()]
    shards = shards_of(events)
    found = metrics_of(scorer_of(shards, 9.0, 0.0), shards)
    assert len(found) == 3 * len(CUTOFFS)
    assert set(found.values()) == {None}


def test_an_item_that_training_never_met_is_not_found_in_a_small_catalogue() -> None:
    """Its rank was the size of the catalogue: below ten items that was a hit."""
    events = [Event("u", str(100 + time % 3), time) for time in range(9)]
    shards = shards_of([*events, Event("u", NEVER_TRAINED, 9)])
    assert len(shards.shared.known_items) == 3
    found = ranked(lambda batch: batch.labels, shards)
    assert (found.position.tolist(), found.num_items) == ([MAX_CUTOFF], 3)


def test_the_last_of_equal_test_events_is_held_out(shards: Shards) -> None:
    both = shards_of([*held_out_events(), Event("other", "118", 300)])
    # The scorer finds 117, which the user bought at the same time; 118 ties with what is left.
    assert metrics_of(scorer_of(shards, 9.0, 0.0), both)["HR@10"] == 2 / 4


def test_the_held_out_events_are_those_of_users_with_a_test_split(shards: Shards) -> None:
    dataset = shards.read([0])
    tested = np.unique(dataset.event_user[dataset.split == TEST])
    assert [dataset.log.users.ids[code] for code in tested] == sorted(LAST_ITEM)


# --- candidates that are drawn


def candidates_of(shards: Shards, **settings: Any) -> Iterator[list[str]]:
    """The ids of each known held-out item's candidates, the item itself last."""
    ids = shards.shared.log.items.ids
    id_by_row = dict(zip(shards.shared.item_row.tolist(), ids, strict=True))
    rows: list[list[int]] = []

    def score(batch: Batch) -> Tensor:
        num_users = batch.sparse_features[REQUEST_TIME].values().numel()
        rows.extend(
            batch.sparse_features[candidate_key(ITEM)].values().view(num_users, -1).tolist()
        )
        return batch.labels

    ranked(score, shards, **settings)
    return ([id_by_row[row] for row in of_user] for of_user in rows)


SEEN = {str(item) for item in range(100, 107)}


def test_candidates_are_distinct_and_neither_the_own_item_nor_one_met_before(
    shards: Shards,
) -> None:
    for num_candidates in (1, 9, 22):
        for user, drawn in enumerate(candidates_of(shards, num_candidates=num_candidates)):
            *others, own = drawn
            assert len({*others}) == len(others) == num_candidates
            assert own not in others
            # The third is a repurchase, which competes with all others.
            assert not SEEN & {*others} or user == 2
    met = [SEEN & {*drawn[:-1]} for drawn in candidates_of(shards, num_candidates=22)]
    assert [bool(items) for items in met] == [False, False, True]
    met = [
        SEEN & {*drawn[:-1]}
        for drawn in candidates_of(shards, num_candidates=22, exclude_seen=False)
    ]
    assert all(met)


def test_every_scorer_meets_the_same_candidates_whoever_else_is_ranked(shards: Shards) -> None:
    everyone = list(candidates_of(shards, num_candidates=8))
    assert list(candidates_of(shards, num_candidates=8)) == everyone
    assert list(candidates_of(shards, num_candidates=8, max_users=1)) == everyone[:1]
    assert len({tuple(drawn[:-1]) for drawn in everyone}) == 3


def test_where_fewer_items_are_left_than_asked_for_all_are_ranked(shards: Shards) -> None:
    """Of the thirty items 22 are left for users who met seven others."""
    model = model_scorer(make_dlrm(3, shards.schema))
    for exclude_seen in (True, False):
        whole = ranked(model, shards, exclude_seen=exclude_seen)
        drawn = ranked(model, shards, exclude_seen=exclude_seen, num_candidates=29)
        assert drawn.position.tolist() == whole.position.tolist()
        assert (drawn.num_items, whole.num_items) == (NUM_ITEMS, NUM_ITEMS)
    assert ranked(model, shards, num_candidates=5).num_items == 6


def test_candidates_are_drawn_evenly() -> None:
    catalogue, left_out = np.arange(40, 60), np.array([43, 51])
    counts: Counter[int] = Counter()
    for key in range(600):
        counts.update(_drawn(catalogue, left_out, 6, Draws(3), key).tolist())
    assert set(counts) == {*range(40, 60)} - {43, 51}
    # 200 of each are expected, with a standard deviation of 12.
    assert all(140 < count < 260 for count in counts.values())
