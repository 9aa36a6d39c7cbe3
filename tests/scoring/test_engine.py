"""The engine's answers do not depend on what the cache holds, and say what it did."""

import copy
import json
import threading
import time
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.models.dlrm import DLRM
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.oracle import reference_logits
from tests.worlds import (
    HEAD_DIM,
    LOGIT_TOLERANCE,
    NUM_HEADS,
    NUM_PLANES,
    PAGE_BYTES,
    PAGE_SIZE,
    PROBABILITY_TOLERANCE,
    SCHEMA,
    assert_same_scores,
    draw_raw,
    examples,
    oldest_first,
    parse_all,
)
from torchrec_kvshare.cache.identity import version_of
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine

RawRequest = dict[str, Any]


def make_engine(model: RankingModel, num_pages: int) -> Engine:
    """An engine over so many pages, or without a cache; what was never written is NaN."""
    if num_pages == 0:
        return Engine(model, SCHEMA, None)
    pool = PagePool(num_pages * PAGE_BYTES, PAGE_SIZE, NUM_PLANES, NUM_HEADS, HEAD_DIM)
    pool.kv_pages.fill_(torch.nan)
    return Engine(model, SCHEMA, KVStore([KVCache(pool)]))


def cache_of(engine: Engine) -> KVCache:
    """The cache of the one history."""
    assert engine.store is not None
    [cache] = engine.store.caches
    return cache


def raw_of(user: str, num_events: int, num_candidates: int, seed: int) -> RawRequest:
    return draw_raw(num_events, num_candidates, seed) | {"user_id": user}


def rank(engine: Engine, *raws: RawRequest) -> list[Answer]:
    return engine.rank(parse_all(list(raws)))


def uses(answers: list[Answer]) -> list[tuple[str, str, int, int, str]]:
    return [astuple(answer.cache)[:-1] for answer in answers]  # all but how old it is


def assert_nothing_pinned(engine: Engine) -> None:
    cache = cache_of(engine)
    kept = cache._entry_by_user.values()
    assert all(entry.num_leases == 0 for entry in kept)
    held = sum(len(entry.pages) for entry in kept)
    assert held == cache.pool.num_pages - cache.pool.num_free


def edited(raw: RawRequest) -> RawRequest:
    """The same request, the item of the newest event replaced."""
    changed = copy.deepcopy(raw)
    changed["history"]["item_id"][-1] = "110" if raw["history"]["item_id"][-1] != "110" else "109"
    return changed


def cut(raw: RawRequest, num_events: int) -> RawRequest:
    return raw | {"history": {name: cells[:num_events] for name, cells in raw["history"].items()}}


def test_scores_are_the_references_probabilities(ranking_model: RankingModel, dlrm: DLRM) -> None:
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 0, 2, 2), raw_of("c", 25, 4, 3)]
    logits = [reference_logits(dlrm, SCHEMA, raw) for raw in raws]
    expected = [torch.sigmoid(of_request).flatten().tolist() for of_request in logits]
    engine = make_engine(ranking_model, 20)
    for _ in range(2):
        for answer, scores in zip(rank(engine, *raws), expected, strict=True):
            assert answer.scores == pytest.approx(scores, rel=0.0, abs=LOGIT_TOLERANCE)


def test_the_first_time_is_a_miss_and_the_second_a_hit(ranking_model: RankingModel) -> None:
    engine = make_engine(ranking_model, 4)
    first = rank(engine, raw_of("a", 11, 3, 1))
    second = rank(engine, raw_of("a", 11, 3, 1))
    assert uses(first) == [("miss", "cold", 0, 11, "none")]
    assert uses(second) == [("hit", "", 11, 0, "pages")]
    assert second[0].scores == first[0].scores


def test_a_hit_needs_neither_the_same_candidates_nor_the_same_time(
    ranking_model: RankingModel,
) -> None:
    engine = make_engine(ranking_model, 4)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    other = oldest_first(raw_of("a", 0, 5, 2) | {"history": raw["history"]})
    assert uses(rank(engine, other)) == [("hit", "", 11, 0, "pages")]
    assert_same_scores(rank(engine, other), rank(make_engine(ranking_model, 0), other))


@pytest.mark.parametrize("spelling", [7, "7", 7.0, "7.0", " 7 "])
def test_a_user_is_found_pinned_and_forgotten_in_every_spelling(
    ranking_model: RankingModel, spelling: Any
) -> None:
    """``7.0`` was refused, and ``forget(7)`` dropped nothing of user ``"7"``."""
    engine = make_engine(ranking_model, 4)
    rank(engine, raw_of("7", 11, 3, 1))
    again = raw_of("7", 11, 3, 1) | {"user_id": spelling}
    assert uses(rank(engine, again)) == [("hit", "", 11, 0, "pages")]
    assert engine.store is not None
    engine.store.pin([spelling])
    assert cache_of(engine)._pinned_users == {"7"}
    engine.store.unpin([spelling])
    assert cache_of(engine)._pinned_users == set()
    assert engine.forget(spelling) == {"pages": 3 * PAGE_BYTES}
    assert uses(rank(engine, again)) == [("miss", "cold", 0, 11, "none")]


def test_without_a_cache_every_history_is_computed(ranking_model: RankingModel) -> None:
    engine = make_engine(ranking_model, 0)
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 0, 2, 2)]
    for _ in range(2):
        assert uses(rank(engine, *raws)) == [
            ("bypass", "cache_off", 0, 11, "none"),
            ("bypass", "cache_off", 0, 0, "none"),
        ]


def test_a_stale_entry_is_never_used(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raw = raw_of("a", 11, 3, 1)
    before = rank(engine, raw)
    after = rank(engine, edited(raw))
    assert uses(after) == [("partial", "edited", 10, 1, "pages")]
    assert_same_scores(after, rank(uncached, edited(raw)))
    moved = np.abs(np.subtract(after[0].scores, before[0].scores)).max()
    assert moved > 100 * PROBABILITY_TOLERANCE
    assert uses(rank(engine, raw)) == [("partial", "edited", 10, 1, "pages")]
    assert_same_scores(rank(engine, raw), before)


@pytest.mark.parametrize(("place", "num_kept"), [(0, 0), (4, 0), (5, 5), (9, 5)])
def test_what_stands_before_an_edit_is_used_again(
    ranking_model: RankingModel, place: int, num_kept: int
) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    changed = copy.deepcopy(raw)
    changed["history"]["item_id"][place] = "110" if place else "109"
    after = rank(engine, changed)
    status, tier = ("partial", "pages") if num_kept else ("miss", "none")
    assert uses(after) == [(status, "edited", num_kept, 11 - num_kept, tier)]
    assert_same_scores(after, rank(uncached, changed))


@pytest.mark.parametrize(("num_events", "num_kept"), [(4, 0), (7, 5), (10, 10)])
def test_a_shortened_history_keeps_whole_blocks(
    ranking_model: RankingModel, num_events: int, num_kept: int
) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    after = rank(engine, cut(raw, num_events))
    assert [use[1:4] for use in uses(after)] == [("shrunk", num_kept, num_events - num_kept)]
    assert_same_scores(after, rank(uncached, cut(raw, num_events)))
    assert uses(rank(engine, cut(raw, num_events))) == [("hit", "", num_events, 0, "pages")]


def test_a_grown_history_is_extended(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raw = raw_of("a", 14, 3, 1)
    rank(engine, cut(raw, 3))
    for before, now in ((3, 4), (4, 11), (11, 14)):
        after = rank(engine, cut(raw, now))
        assert uses(after) == [("partial", "cold", before, now - before, "pages")]
        assert_same_scores(after, rank(uncached, cut(raw, now)))
    assert uses(rank(engine, raw)) == [("hit", "", 14, 0, "pages")]
    assert_nothing_pinned(engine)


def test_where_the_audit_refuses_it_nothing_is_extended(ranking_model: RankingModel) -> None:
    engine = make_engine(ranking_model, 4)
    assert engine.store is not None
    engine.store.extends = False
    raw = raw_of("a", 11, 3, 1)
    rank(engine, cut(raw, 10))
    assert uses(rank(engine, raw)) == [("miss", "cold", 0, 11, "none")]
    assert uses(rank(engine, raw)) == [("hit", "", 11, 0, "pages")]


def test_a_window_that_slid_is_encoded_anew(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raw = raw_of("a", 15, 3, 1)  # The window starts at event 7, a moment ago it did at the first.
    rank(engine, cut(raw, 14))
    after = rank(engine, raw)
    assert uses(after) == [("miss", "slid", 0, 8, "none")]
    assert_same_scores(after, rank(uncached, raw))


def test_a_history_longer_than_the_window_counts_the_events_read(
    ranking_model: RankingModel,
) -> None:
    engine = make_engine(ranking_model, 4)
    raw = raw_of("a", 25, 3, 1)  # The window starts at event 14.
    assert uses(rank(engine, raw)) == [("miss", "cold", 0, 11, "none")]
    assert uses(rank(engine, raw)) == [("hit", "", 11, 0, "pages")]


def test_an_evicted_user_is_computed_again(ranking_model: RankingModel) -> None:
    engine = make_engine(ranking_model, 4)
    first, second = raw_of("a", 11, 3, 1), raw_of("b", 14, 2, 2)
    before = rank(engine, first)
    rank(engine, second)
    after = rank(engine, first)
    assert uses(after) == [("miss", "evicted", 0, 11, "none")]
    assert_same_scores(after, before)


def test_what_the_pool_has_no_room_for_is_scored_all_the_same(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 4, 2, 2), raw_of("c", 9, 4, 3)]
    raws.append(raw_of("d", 14, 1, 4))
    answers = rank(engine, *raws)
    assert uses(answers) == [
        ("miss", "cold", 0, 11, "none"),
        ("miss", "cold", 0, 4, "none"),
        ("bypass", "not_admitted", 0, 9, "none"),
        ("bypass", "not_admitted", 0, 14, "none"),
    ]
    assert_same_scores(answers, rank(uncached, *raws))
    assert_nothing_pinned(engine)


def test_a_history_larger_than_the_whole_pool_is_scored_all_the_same(
    ranking_model: RankingModel,
) -> None:
    engine, uncached = make_engine(ranking_model, 1), make_engine(ranking_model, 0)
    raw = raw_of("a", 11, 3, 1)
    answers = rank(engine, raw)
    assert uses(answers) == [("bypass", "not_admitted", 0, 11, "none")]
    assert answers[0].scores == rank(uncached, raw)[0].scores


def test_an_empty_history_is_too_short_to_keep(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    raw = raw_of("a", 0, 3, 1)
    for _ in range(2):
        answers = rank(engine, raw)
        assert uses(answers) == [("bypass", "too_short", 0, 0, "none")]
        assert_same_scores(answers, rank(uncached, raw))
    assert cache_of(engine).held_bytes == 0


@pytest.mark.parametrize("num_pages", [0, 4])
def test_no_candidates_get_no_scores(ranking_model: RankingModel, num_pages: int) -> None:
    engine = make_engine(ranking_model, num_pages)
    for raws in (
        [raw_of("a", 11, 0, 1)],
        [raw_of("a", 0, 0, 1)],
        [raw_of("a", 11, 0, 1), raw_of("b", 3, 2, 2), raw_of("c", 14, 0, 3)],
    ):
        answers = rank(engine, *raws)
        counts = [len(raw["candidates"]["item_id"]) for raw in raws]
        assert [len(answer.scores) for answer in answers] == counts


@pytest.mark.parametrize("num_pages", [0, 4])
def test_no_requests_get_no_answers(ranking_model: RankingModel, num_pages: int) -> None:
    assert make_engine(ranking_model, num_pages).rank([]) == []


def test_one_user_may_stand_twice_in_a_batch(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 9), make_engine(ranking_model, 0)
    raw = raw_of("a", 11, 3, 1)
    other = oldest_first(raw_of("a", 0, 2, 2) | {"history": raw["history"]})
    answers = rank(engine, raw, other)
    assert uses(answers) == [("miss", "cold", 0, 11, "none")] * 2
    assert_same_scores(answers, rank(uncached, raw, other))
    assert uses(rank(engine, other, raw)) == [("hit", "", 11, 0, "pages")] * 2
    assert_nothing_pinned(engine)


def test_one_user_with_two_histories_in_a_batch_gets_each_its_own(
    ranking_model: RankingModel,
) -> None:
    engine, uncached = make_engine(ranking_model, 9), make_engine(ranking_model, 0)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    raws = [edited(raw), raw, cut(raw, 6), edited(raw), cut(raw, 10)]
    answers = rank(engine, *raws)
    assert [use[:2] for use in uses(answers)] == [
        ("partial", "edited"),
        ("hit", ""),
        ("partial", "shrunk"),
        ("partial", "edited"),  # Encoded with the first.
        ("bypass", "not_admitted"),
    ]
    assert_same_scores(answers, rank(uncached, *raws))
    assert_nothing_pinned(engine)


def test_a_hit_is_not_evicted_by_its_batchmates(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 4), make_engine(ranking_model, 0)
    kept = raw_of("a", 11, 3, 1)
    rank(engine, kept)
    raws = [raw_of("b", 9, 2, 2), kept]
    answers = rank(engine, *raws)
    assert [use[:2] for use in uses(answers)] == [("bypass", "not_admitted"), ("hit", "")]
    assert_same_scores(answers, rank(uncached, *raws))


def test_pages_apart_score_as_pages_side_by_side(ranking_model: RankingModel) -> None:
    together, apart = make_engine(ranking_model, 20), make_engine(ranking_model, 20)
    cache_of(apart).pool.allocate(20)
    cache_of(apart).pool.free([0, 2, 3, 5, 7, 8, 9, 19])
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 14, 2, 2), raw_of("c", 0, 2, 4)]
    raws.append(raw_of("d", 6, 5, 3))
    for _ in range(2):
        assert [answer.scores for answer in rank(apart, *raws)] == [
            answer.scores for answer in rank(together, *raws)
        ]
    pages = [entry.pages for entry in cache_of(apart)._entry_by_user.values()]
    assert pages == [[7, 8, 9], [0, 2, 3], [5, 19]]


# Per round: which users come, and what each did since.
deeds = st.sampled_from(["same", "grow", "edit", "shrink", "new"])
rounds = st.lists(
    st.lists(
        st.tuples(st.sampled_from("abcd"), deeds),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=6,
)


@examples(0.6)
@given(st.integers(1, 12), rounds, st.integers(0, 2**32 - 1))
def test_any_life_of_users_scores_as_without_a_cache(
    ranking_model: RankingModel, num_pages: int, lives: list[list[tuple[str, str]]], seed: int
) -> None:
    engine, uncached = make_engine(ranking_model, num_pages), make_engine(ranking_model, 0)
    rng = np.random.default_rng(seed)
    raw_by_user: dict[str, RawRequest] = {}
    for coming in lives:
        raws = []
        for user, deed in coming:
            num_events, num_candidates, drawn_seed = rng.integers((24, 4, 2**32)).tolist()
            drawn = raw_of(user, num_events, num_candidates, drawn_seed)
            raw_by_user[user] = live(raw_by_user.get(user, drawn), drawn, deed)
            raws.append(raw_by_user[user])
        answers = rank(engine, *raws)
        assert_same_scores(answers, rank(uncached, *raws))
        for request, use in zip(parse_all(raws), uses(answers), strict=True):
            assert_use_is_consistent(request.num_events, *use)
        assert_nothing_pinned(engine)


def live(old: RawRequest, drawn: RawRequest, deed: str) -> RawRequest:
    """What a user asks after its deed; candidates and time are always new."""
    history = copy.deepcopy(old["history"])
    if deed == "new" or not history["time"]:
        history = drawn["history"]
    elif deed == "grow":
        history = {name: cells + cells[-2:] for name, cells in history.items()}
    elif deed == "shrink":
        history = {name: cells[: len(cells) // 2] for name, cells in history.items()}
    elif deed == "edit":
        history["time"][-1] += 1
    return oldest_first(drawn | {"history": history})


def assert_use_is_consistent(
    num_events: int, status: str, reason: str, cached: int, computed: int, tier: str
) -> None:
    if status == "hit":
        assert (reason, cached, computed, tier) == ("", num_events, 0, "pages")
        return
    if status == "partial":
        assert reason in {"cold", "edited", "shrunk"}
        assert (cached + computed, tier) == (num_events, "pages")
        assert cached > 0
        return
    assert cached + computed == num_events
    assert tier == ("pages" if cached else "none")
    if status == "miss":
        assert cached == 0
        assert reason in {"cold", "evicted", "edited", "shrunk", "slid"}
    else:
        assert (status, reason) == ("bypass", "not_admitted" if num_events else "too_short")


def test_an_answer_tells_how_old_its_kv_is(ranking_model: RankingModel) -> None:
    now = [100.0]
    pool = PagePool(9 * PAGE_BYTES, PAGE_SIZE, NUM_PLANES, NUM_HEADS, HEAD_DIM)
    store = KVStore([KVCache(pool, clock=lambda: now[0])])
    engine = Engine(ranking_model, SCHEMA, store)
    assert rank(engine, raw_of("a", 7, 2, 1))[0].cache.staleness_s == 0.0
    now[0] += 60.0
    answers = rank(engine, raw_of("a", 7, 2, 1), raw_of("b", 7, 2, 2))
    assert [answer.cache.staleness_s for answer in answers] == [60.0, 0.0]


def test_an_answer_has_the_one_format(ranking_model: RankingModel) -> None:
    engine = make_engine(ranking_model, 4)
    raw = raw_of("a", 11, 3, 1) | {"request_id": 17}
    answer = rank(engine, raw)[0]
    decoded = json.loads(json.dumps(answer.to_json()))
    assert decoded == {
        "request_id": 17,
        "scores": answer.scores,
        "model_version": str(version_of(ranking_model, SCHEMA)),
        "cache": {
            "status": "miss",
            "reason": "cold",
            "cached_events": 0,
            "computed_events": 11,
            "tier": "none",
            "staleness_s": 0.0,
        },
    }
    assert len(answer.scores) == 3
    assert all(0.0 < score < 1.0 for score in answer.scores)


def test_scores_stand_in_the_order_of_the_candidates(ranking_model: RankingModel) -> None:
    engine = make_engine(ranking_model, 4)
    raw = raw_of("a", 11, 4, 1)
    turned = copy.deepcopy(raw)
    turned["candidates"] = {name: cells[::-1] for name, cells in raw["candidates"].items()}
    scores = rank(engine, raw)[0].scores
    assert len(set(scores)) == 4
    turned_scores = rank(engine, turned)[0].scores
    assert turned_scores == pytest.approx(scores[::-1], rel=0.0, abs=PROBABILITY_TOLERANCE)


class BrokenPrefill:
    """A model whose prefill fails, as it does when memory runs out."""

    def __init__(self, model: RankingModel) -> None:
        self.model = model

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return self.model(dense, features)

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        raise RuntimeError("not enough memory")

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        raise RuntimeError("not enough memory")

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        return self.model.reusable(num_matched, cached_events, num_events)

    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        return self.model.num_kv_rows(num_events)

    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        return self.model.project_candidates(features)

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        return self.model.score(dense, features, kv_pages, items)


def test_a_prefill_that_fails_leaves_nothing_pinned(ranking_model: RankingModel) -> None:
    """What had been found before the prefill failed stayed pinned, so its pages could never be used
    again."""
    engine = make_engine(ranking_model, 4)
    kept = raw_of("a", 11, 3, 1)
    rank(engine, kept)
    engine.model = BrokenPrefill(ranking_model)
    with pytest.raises(RuntimeError, match="not enough memory"):
        rank(engine, kept, raw_of("b", 4, 1, 2))
    assert_nothing_pinned(engine)
    assert uses(rank(engine, kept)) == [("hit", "", 11, 0, "pages")]


def test_threads_that_share_an_engine_get_the_scores_of_one(ranking_model: RankingModel) -> None:
    engine, uncached = make_engine(ranking_model, 7), make_engine(ranking_model, 0)
    batches = [
        parse_all([raw_of(user, 3 * place + 2, 2, place), raw_of("shared", place + 9, 3, place)])
        for place, user in enumerate("abcd")
    ]
    expected = [uncached.rank(batch) for batch in batches]
    stop = time.monotonic() + 0.7
    faults: list[BaseException] = []

    def hammer(place: int) -> None:
        try:
            while time.monotonic() < stop:
                for turn in range(4):
                    chosen = (place + turn) % 4
                    assert_same_scores(engine.rank(batches[chosen]), expected[chosen])
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=hammer, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert_nothing_pinned(engine)
