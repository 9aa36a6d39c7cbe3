"""Cached projections change no score, and items with different attributes are told apart."""

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.encoder_worlds import (
    NAMES,
    NUM_TOKENS,
    TWO_HISTORIES,
    draw_buyer,
    make_caches,
    raws_of,
    two_histories_model,
    world_of,
)
from tests.worlds import (
    PATH_TOLERANCE,
    assert_same_scores,
    examples,
    parse_all,
)
from torchrec_kvshare.cache.items import MAX_BAG, ItemCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.batches import collate_candidates
from torchrec_kvshare.history.kinds import CAUSAL, KINDS
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine

RawRequest = dict[str, Any]

HAMMER_SECONDS = 20.0 if os.environ.get("KVSHARE_SOAK") == "1" else 1.0
SCHEMA = world_of(CAUSAL).schema


@lru_cache
def model_of(name: str = CAUSAL, num_tokens: int = NUM_TOKENS) -> RankingModel:
    return RankingModel(world_of(name, num_tokens).dlrm).eval()


def candidates_of(*items: tuple[str | None, list[str], list[str]]) -> RawRequest:
    """A request for items with the given genres and brands."""
    [raw] = raws_of(world_of(CAUSAL), [(3, len(items), 1)])
    columns = [list(column) for column in zip(*items, strict=True)]
    raw["candidates"] |= dict(zip(("item_id", "genres", "brands"), columns, strict=True))
    return raw


def features_of(*raws: RawRequest) -> KeyedJaggedTensor:
    return collate_candidates(parse_all(list(raws), SCHEMA), SCHEMA).sparse_features


PLAIN = ("100", ["genre 1"], ["brand 2"])
OTHER = ("101", [], ["brand 0", "brand 3"])
THIRD = ("102", ["genre 4", "genre 1"], [])


class Counting:
    """A model's projection that counts the candidates of each call."""

    def __init__(self, model: RankingModel) -> None:
        self.model = model
        self.asked: list[int] = []

    @torch.no_grad()
    def __call__(self, features: KeyedJaggedTensor) -> list[Tensor]:
        projected = self.model.project_candidates(features)
        self.asked.append(projected[0].size(0))
        return projected


def project(cache: ItemCache, *raws: RawRequest) -> tuple[list[Tensor], list[int]]:
    """Return the cache's projections for some requests, and how many candidates were computed."""
    counting = Counting(model_of())
    return cache.project(features_of(*raws), counting), counting.asked


def assert_projected(got: list[Tensor], *raws: RawRequest) -> None:
    with torch.no_grad():
        expected = model_of().project_candidates(features_of(*raws))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=PATH_TOLERANCE)


def counts_of(cache: ItemCache) -> tuple[int, int]:
    return cache.num_hits, cache.num_misses


# What is kept.


def test_an_item_is_projected_once() -> None:
    cache, raw = ItemCache(5, SCHEMA), candidates_of(PLAIN, OTHER, THIRD)
    first, asked = project(cache, raw)
    assert asked == [3]
    second, asked = project(cache, raw)
    assert asked == []
    assert counts_of(cache) == (3, 3)
    assert torch.equal(second[0], first[0])
    assert_projected(second, raw)


def test_only_what_is_missing_is_projected_and_lands_in_its_place() -> None:
    cache = ItemCache(5, SCHEMA)
    project(cache, candidates_of(OTHER))
    raw = candidates_of(PLAIN, OTHER, THIRD)
    got, asked = project(cache, raw)
    assert asked == [2]
    assert counts_of(cache) == (1, 3)
    assert_projected(got, raw)


@pytest.mark.parametrize(
    "changed",
    [
        ("100", ["genre 2"], ["brand 2"]),
        ("100", ["genre 1"], []),
        ("100", ["genre 1"], ["brand 2", "brand 2"]),
        ("100", [], ["genre 1", "brand 2"]),
        ("100", ["genre 1", "never seen before"], ["brand 2"]),
    ],
)
def test_an_item_whose_attributes_changed_is_projected_again(
    changed: tuple[str, list[str], list[str]],
) -> None:
    cache = ItemCache(5, SCHEMA)
    project(cache, candidates_of(PLAIN, OTHER))
    raw = candidates_of(changed, OTHER)
    got, asked = project(cache, raw)
    assert asked == [1]
    assert_projected(got, raw)
    got, asked = project(cache, raw)  # The new one has replaced the old one.
    assert asked == []
    assert_projected(got, raw)
    assert project(cache, candidates_of(PLAIN))[1] == [1]


def test_an_id_of_one_column_is_not_taken_for_that_of_another() -> None:
    cache = ItemCache(5, SCHEMA)
    vocabularies = SCHEMA.vocabulary_by_column
    assert vocabularies["items.genres"].row("genre 1") == vocabularies["items.brands"].row(
        "brand 1"
    )
    project(cache, candidates_of(("100", ["genre 1"], [])))
    raw = candidates_of(("100", [], ["brand 1"]))
    got, asked = project(cache, raw)
    assert asked == [1]
    assert_projected(got, raw)


@pytest.mark.parametrize("item", ["never seen before", None])
def test_unknown_and_missing_items_are_never_kept(item: str | None) -> None:
    cache, raw = ItemCache(5, SCHEMA), candidates_of((item, ["genre 1"], []), OTHER)
    project(cache, raw)
    for _ in range(2):
        got, asked = project(cache, raw)
        assert asked == [1]
        assert_projected(got, raw)


def test_items_of_long_bags_are_never_kept() -> None:
    cache = ItemCache(5, SCHEMA)
    longest = ("100", ["genre 1"] * MAX_BAG, ["brand 2"])
    too_long = ("101", [], [f"brand {index % 6}" for index in range(MAX_BAG + 1)])
    raw = candidates_of(longest, too_long)
    project(cache, raw)
    for _ in range(2):
        got, asked = project(cache, raw)
        assert asked == [1]
        assert_projected(got, raw)
    # Nor is it taken for a cached item with the same first ids.
    grown = candidates_of(("100", ["genre 1"] * (MAX_BAG + 3), ["brand 2"]))
    got, asked = project(cache, grown)
    assert asked == [1]
    assert_projected(got, grown)


def test_an_item_twice_in_a_batch_takes_one_slot() -> None:
    cache, raw = ItemCache(2, SCHEMA), candidates_of(PLAIN, OTHER, PLAIN, OTHER, PLAIN)
    for expected in ([5], []):
        got, asked = project(cache, raw)
        assert asked == expected
        assert_projected(got, raw)
    assert counts_of(cache) == (5, 5)


def test_an_item_of_two_kinds_of_bags_in_a_batch_is_kept_as_one_of_them() -> None:
    cache = ItemCache(4, SCHEMA)
    raw = candidates_of(PLAIN, ("100", ["genre 2"], []), PLAIN, OTHER)
    for _ in range(3):
        got, asked = project(cache, raw)
        assert_projected(got, raw)
    assert asked in ([1], [2])


def test_the_oldest_items_leave_a_full_ring() -> None:
    cache = ItemCache(2, SCHEMA)
    for item in (PLAIN, OTHER, THIRD):
        project(cache, candidates_of(item))
    assert project(cache, candidates_of(OTHER))[1] == []
    assert project(cache, candidates_of(THIRD))[1] == []
    got, asked = project(cache, candidates_of(PLAIN))
    assert asked == [1]
    assert_projected(got, candidates_of(PLAIN))
    assert project(cache, candidates_of(OTHER))[1] == [1]


def test_a_batch_larger_than_the_ring_is_scored_and_kept_in_part() -> None:
    cache = ItemCache(3, SCHEMA)
    raw = candidates_of(*((str(100 + index), [f"genre {index}"], []) for index in range(7)))
    for _ in range(4):
        got, asked = project(cache, raw)
        assert_projected(got, raw)
    # At most the ring's capacity is kept.
    assert asked[0] >= 4


def test_a_ring_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="capacity_items is 0; it must be at least 1"):
        ItemCache(0, SCHEMA)


bags = st.lists(st.sampled_from(["genre 1", "genre 2", "new"]), max_size=2)
drawn_items = st.tuples(st.sampled_from(["100", "101", "102", "103", "new", None]), bags, bags)


@examples(0.6)
@given(st.integers(1, 5), st.lists(st.lists(drawn_items, min_size=1, max_size=6), max_size=8))
def test_whatever_came_before_items_are_what_the_model_makes_of_them(
    capacity: int, batches: list[list[tuple[str | None, list[str], list[str]]]]
) -> None:
    cache = ItemCache(capacity, SCHEMA)
    num_asked = 0
    for items in batches:
        raw = candidates_of(*items)
        got, asked = project(cache, raw)
        assert_projected(got, raw)
        num_asked += sum(asked)
    assert counts_of(cache) == (sum(map(len, batches)) - num_asked, num_asked)


# In the engine.


def make_engine(name: str, capacity_items: int, num_tokens: int = NUM_TOKENS) -> Engine:
    """An engine that caches so many items; 0 for none."""
    model, schema = model_of(name, num_tokens), world_of(name, num_tokens).schema
    items = ItemCache(capacity_items, schema) if capacity_items else None
    return Engine(model, schema, KVStore(make_caches(model, [30])), items)


def two_histories_engine(kind: str, capacity_items: int) -> Engine:
    model = RankingModel(two_histories_model(kind)).eval()
    items = ItemCache(capacity_items, TWO_HISTORIES) if capacity_items else None
    return Engine(model, TWO_HISTORIES, KVStore(make_caches(model, [20, 9])), items)


def rank(engine: Engine, raws: list[RawRequest]) -> list[Answer]:
    return engine.rank(parse_all(raws, engine.schema))


def items_of(engine: Engine) -> ItemCache:
    assert engine.items is not None
    return engine.items


@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_scores_with_items_are_those_without(name: str, num_tokens: int) -> None:
    engine, without = make_engine(name, 6, num_tokens), make_engine(name, 0, num_tokens)
    world = world_of(name, num_tokens)
    for turn in range(4):
        users = [(9, 4, turn), (0, 2, 9), (17, 3, turn + 1)]
        raws = raws_of(world, users)
        assert_same_scores(rank(engine, raws), rank(without, raws))
    assert items_of(engine).num_hits > 0


@pytest.mark.parametrize("kind", KINDS)
def test_items_serve_every_history(kind: str) -> None:
    engine, without = two_histories_engine(kind, 50), two_histories_engine(kind, 0)
    raws = [draw_buyer("a", 9, 4, 1), draw_buyer("b", 20, 3, 2)]
    for _ in range(2):
        assert_same_scores(rank(engine, raws), rank(without, raws))
    assert items_of(engine).num_hits > 0


def test_items_are_kept_across_users() -> None:
    engine = make_engine(CAUSAL, 6)
    raw = candidates_of(PLAIN, OTHER, THIRD)
    rank(engine, [raw | {"user_id": "user 1"}])
    rank(engine, [raw | {"user_id": "user 2", "time": raw["time"] + 1_000}])
    assert counts_of(items_of(engine)) == (3, 3)


def test_without_kv_between_requests_no_items_are_kept() -> None:
    engine = make_engine(CAUSAL, 6)
    engine.store = None
    rank(engine, [candidates_of(PLAIN, OTHER)])
    assert counts_of(items_of(engine)) == (0, 0)


def hammer(deed: Callable[[int, int], None]) -> list[int]:
    """Run an action in three threads for a while; return how often each ran it."""
    stop = time.monotonic() + HAMMER_SECONDS
    num_done = [0, 0, 0]
    faults: list[BaseException] = []

    def work(index: int) -> None:
        try:
            while time.monotonic() < stop:
                deed(index, num_done[index])
                num_done[index] += 1
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert faults == []
    return num_done


def test_threads_that_share_items_get_the_scores_of_one() -> None:
    engine, without = make_engine(CAUSAL, 4), make_engine(CAUSAL, 0)
    batches = [raws_of(world_of(CAUSAL), [(6, 5, index), (3, 2, index + 7)]) for index in range(4)]
    expected = [rank(without, raws) for raws in batches]

    def score(index: int, turn: int) -> None:
        chosen = (index + turn) % 4
        assert_same_scores(rank(engine, batches[chosen]), expected[chosen])

    num_ranked = hammer(score)
    assert min(num_ranked) > 0
    assert items_of(engine).num_hits > 0


def test_every_candidate_is_counted_once_whatever_other_threads_do() -> None:
    """Hits and misses were counted outside the lock: of 7754 candidates 40 were lost."""
    cache = ItemCache(2, SCHEMA)
    batches = [
        features_of(candidates_of(*items))
        for items in ([PLAIN, OTHER], [OTHER, THIRD], [THIRD, PLAIN])
    ]

    def look_up(index: int, turn: int) -> None:
        cache.project(batches[(index + turn) % 3], no_projection)

    assert sum(counts_of(cache)) == 0
    num_done = hammer(look_up)
    assert sum(counts_of(cache)) == 2 * sum(num_done)


def no_projection(features: KeyedJaggedTensor) -> list[Tensor]:
    return [torch.zeros(features.stride(), NUM_TOKENS, 4)]
