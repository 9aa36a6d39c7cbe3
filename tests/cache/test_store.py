"""Engines over tiers: answers say what was found and where, and no score depends on it."""

import copy
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.encoder_worlds import TWO_HISTORIES, draw_buyer, two_histories_model
from tests.worlds import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_PLANES,
    PAGE_BYTES,
    PAGE_SIZE,
    SCHEMA,
    assert_same_scores,
    draw_raw,
    make_dlrm,
    oldest_first,
    parse_all,
    version_called,
)
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.identity import text_digest
from torchrec_kvshare.cache.kv_cache import FOREVER, KVCache, Rules
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LRU, TINY_LFU, LruPolicy, new_policy
from torchrec_kvshare.cache.single_flight import SingleFlight
from torchrec_kvshare.cache.stack import Level, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import Found, HostTier, Tier
from torchrec_kvshare.errors import TierError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine

RawRequest = dict[str, Any]

VERSION = "5e" * 8 + "-" + "0f" * 8
OTHER_TABLES = "5e" * 8 + "-" + "1f" * 8
OTHER_MODEL = "77" * 8 + "-" + "0f" * 8
FLOAT32, INT8 = get_codec("float32"), get_codec("int8")
TTL_S = 600.0
DISK_BYTES = 64 * 2**20
PATIENCE_S = 20.0  # timeout of what ends at once if the code is right
MARGIN_S = 4.0  # what a busy machine may add to a request


def do_nothing() -> None:
    pass


class Watched:
    """A model that counts its encodings and calls a test's hook before each."""

    def __init__(self, model: RankingModel) -> None:
        self.model = model
        self.num_encodings = 0
        self.num_scorings = 0
        self.num_uncached = 0
        self.before_encoding: Callable[[], None] = do_nothing

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        self.num_uncached += 1
        return self.model(dense, features)

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        self.num_encodings += 1
        self.before_encoding()
        return self.model.prefill(features)

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        self.num_encodings += 1
        return self.model.extend(features, cached, cached_rows)

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
        self.num_scorings += 1
        return self.model.score(dense, features, kv_pages, items)


@pytest.fixture(scope="module")
def ranking_model() -> RankingModel:
    return RankingModel(make_dlrm(seed=3)).eval()


@pytest.fixture(scope="module")
def other_model() -> RankingModel:
    return RankingModel(make_dlrm(seed=8)).eval()


@pytest.fixture
def model(ranking_model: RankingModel) -> Watched:
    return Watched(ranking_model)


NewStack = Callable[..., TierStack]
NewEngine = Callable[..., Engine]


@pytest.fixture
def new_stack() -> Iterator[NewStack]:
    """Makes stacks whose threads end with the test."""
    stacks: list[TierStack] = []

    def new(*levels: Level) -> TierStack:
        stacks.append(TierStack(levels, TTL_S))
        return stacks[-1]

    yield new
    for stack in stacks:
        stack.close()


@pytest.fixture(params=[LRU, TINY_LFU])
def new_engine(request: pytest.FixtureRequest) -> NewEngine:
    """Makes engines whose unwritten pages are NaN."""

    def new(
        model: Watched | RankingModel,
        stack: TierStack | None = None,
        version: str = VERSION,
        num_pages: int = 20,
        at_rest: int | None = None,
        rules: Rules = FOREVER,
        **options: Any,
    ) -> Engine:
        pool = PagePool(
            num_pages * PAGE_BYTES,
            PAGE_SIZE,
            num_planes=NUM_PLANES,
            num_heads=NUM_HEADS,
            head_dim=HEAD_DIM,
        )
        pool.kv_pages.fill_(torch.nan)
        capacity_bytes = (at_rest or num_pages) * PAGE_BYTES - rules.pinned_bytes
        cache = KVCache(
            pool,
            rules,
            new_policy(request.param, capacity_bytes),
            on_evict=None if stack is None else stack.demote,
            metrics=None if stack is None else stack.metrics,
        )
        return Engine(
            model, SCHEMA, KVStore([cache], stack, **options), version=version_called(version)
        )

    return new


def host_tier(capacity_bytes: int = 10**6) -> HostTier:
    return HostTier(LruPolicy(capacity_bytes), TTL_S)


@pytest.fixture(params=["host", "disk"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made: Tier = host_tier()
    if request.param == "disk":
        made = DiskTier(tmp_path, DISK_BYTES, TTL_S)
    yield made
    made.close()


def raw_of(user: str, num_events: int, num_candidates: int, seed: int) -> RawRequest:
    return draw_raw(num_events, num_candidates, seed) | {"user_id": user}


def cut(raw: RawRequest, num_events: int) -> RawRequest:
    return raw | {"history": {name: cells[:num_events] for name, cells in raw["history"].items()}}


def edited(raw: RawRequest, index: int) -> RawRequest:
    """The same request, the item of one event replaced."""
    changed = copy.deepcopy(raw)
    items = changed["history"]["item_id"]
    items[index] = "110" if items[index] != "110" else "109"
    return changed


def from_country(raw: RawRequest, country: str) -> RawRequest:
    return raw | {"context": {"country": [country]}}


def rank(engine: Engine, *raws: RawRequest) -> list[Answer]:
    return engine.rank(parse_all(list(raws)))


def rank_and_drain(engine: Engine, *raws: RawRequest) -> list[Answer]:
    """Rank, then wait until all queued K/V is written."""
    answers = rank(engine, *raws)
    assert engine.store is not None
    assert engine.store.stack is not None
    assert engine.store.stack.drain(PATIENCE_S)
    return answers


def uses(answers: Sequence[Answer]) -> list[tuple[str, str, int, int, str]]:
    return [astuple(answer.cache)[:-1] for answer in answers]  # all but staleness_s


def scores(answers: Sequence[Answer]) -> list[list[float]]:
    return [answer.scores for answer in answers]


def counted(engine: Engine, name: str, **labels: str) -> float:
    assert engine.store is not None
    return engine.store.metrics.snapshot().value(name, **labels)


def assert_as_uncached(engine: Engine, answers: list[Answer], *raws: RawRequest) -> None:
    model = engine.model.model if isinstance(engine.model, Watched) else engine.model
    uncached = Engine(model, engine.schema, None, version=engine.version)
    assert_same_scores(answers, uncached.rank(parse_all(list(raws), engine.schema)))


def assert_idle(engine: Engine) -> None:
    """Check that there are no leases, and that every page is free or in use."""
    assert engine.store is not None
    # A queued write leases its entry.
    assert engine.store.stack is None or engine.store.stack.drain(5.0)
    for cache in engine.store.caches:
        kept = cache._entry_by_user.values()
        assert all(entry.num_leases == 0 for entry in kept)
        held = sum(len(entry.pages) for entry in kept)
        assert held == cache.pool.num_pages - cache.pool.num_free


# Restarts.


def test_after_a_restart_histories_hit_from_the_tier_with_equal_scores(
    new_engine: NewEngine, new_stack: NewStack, model: Watched, tier: Tier
) -> None:
    stack = new_stack(Level(tier, FLOAT32, deadline_s=5.0))
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 25, 2, 2), raw_of("c", 14, 4, 3)]
    before = rank_and_drain(new_engine(model, stack), *raws)
    assert uses(before) == [
        ("miss", "cold", 0, 11, "none"),
        ("miss", "cold", 0, 11, "none"),
        ("miss", "cold", 0, 14, "none"),
    ]
    restarted = new_engine(model, stack)
    after = rank(restarted, *raws)
    assert uses(after) == [("hit", "", n, 0, tier.name) for n in (11, 11, 14)]
    assert scores(after) == scores(before)
    again = rank(restarted, *raws)
    assert uses(again) == [("hit", "", n, 0, "pages") for n in (11, 11, 14)]
    assert scores(again) == scores(before)
    assert model.num_encodings == 1
    assert_idle(restarted)


@pytest.mark.parametrize(
    ("num_events", "index", "expected"),
    [
        (14, None, ("partial", "cold", 11, 3)),
        (11, 10, ("partial", "edited", 10, 1)),
        (7, None, ("partial", "shrunk", 5, 2)),
        (11, 0, ("miss", "edited", 0, 11)),
        (4, None, ("miss", "shrunk", 0, 4)),
    ],
)
def test_after_a_restart_what_a_history_still_begins_with_is_used(
    new_engine: NewEngine,
    new_stack: NewStack,
    model: Watched,
    num_events: int,
    index: int | None,
    expected: tuple[str, str, int, int],
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raw = raw_of("a", 14, 3, 1)
    rank_and_drain(new_engine(model, stack), cut(raw, 11))
    changed = cut(raw, num_events) if index is None else edited(cut(raw, num_events), index)
    restarted = new_engine(model, stack)
    answers = rank_and_drain(restarted, changed)
    assert uses(answers) == [(*expected, "host" if expected[2] else "none")]
    assert_as_uncached(restarted, answers, changed)
    assert uses(rank(restarted, changed)) == [("hit", "", num_events, 0, "pages")]
    assert_idle(restarted)


def test_each_answer_of_a_batch_names_its_own_tier(
    new_engine: NewEngine, new_stack: NewStack, model: Watched, tmp_path: Path
) -> None:
    disk = DiskTier(tmp_path, DISK_BYTES, TTL_S)
    raws = [raw_of(user, 10 + seed, 2, seed) for seed, user in enumerate("abcd")]
    rank_and_drain(new_engine(model, new_stack(Level(disk, FLOAT32))), raws[1])
    stack = new_stack(Level(host_tier(), FLOAT32), Level(disk, FLOAT32, deadline_s=5.0))
    rank_and_drain(new_engine(model, stack), raws[2])
    engine = new_engine(model, stack)
    rank_and_drain(engine, raws[0])
    answers = rank(engine, *raws)
    assert uses(answers) == [
        ("hit", "", 10, 0, "pages"),
        ("hit", "", 11, 0, "disk"),
        ("hit", "", 12, 0, "host"),
        ("miss", "cold", 0, 13, "none"),
    ]
    assert_as_uncached(engine, answers, *raws)
    assert_idle(engine)


def test_a_user_twice_in_a_batch_hits_twice_from_a_tier(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raw = raw_of("a", 11, 3, 1)
    other = oldest_first(raw_of("a", 0, 2, 2) | {"history": raw["history"]})
    rank_and_drain(new_engine(model, stack), raw)
    restarted = new_engine(model, stack)
    answers = rank(restarted, raw, other, edited(raw, 10))
    assert [use[0] for use in uses(answers)] == ["hit", "hit", "partial"]
    assert_as_uncached(restarted, answers, raw, other, edited(raw, 10))
    assert_idle(restarted)


@pytest.mark.parametrize("kind", ["causal", "longer"])  # a row for each event, and for groups
def test_histories_of_two_kinds_of_events_come_back_together(
    new_stack: NewStack, kind: str
) -> None:
    model = RankingModel(two_histories_model(kind)).eval()
    stack = new_stack(Level(host_tier(), FLOAT32))

    def new_engine() -> Engine:
        caches = []
        for tower in model.collection.towers():
            num_planes, num_heads, head_dim = tower.kv_shape
            page_bytes = num_planes * PAGE_SIZE * num_heads * head_dim * 4
            pool = PagePool(
                14 * page_bytes,
                PAGE_SIZE,
                num_planes=num_planes,
                num_heads=num_heads,
                head_dim=head_dim,
            )
            caches.append(KVCache(pool, on_evict=stack.demote, metrics=stack.metrics))
        return Engine(model, TWO_HISTORIES, KVStore(caches, stack), version=version_called(VERSION))

    raws = [draw_buyer("a", 23, 3, 4), draw_buyer("b", 21, 2, 5)]
    requests = parse_all(raws, TWO_HISTORIES)
    lengths = [[e.num_events for e in one.events_by_history.values()] for one in requests]
    before = new_engine().rank(requests)
    assert stack.drain(PATIENCE_S)
    restarted = new_engine()
    after = restarted.rank(requests)
    assert uses(after) == [("hit", "", sum(of_user), 0, "host") for of_user in lengths]
    assert scores(after) == scores(before)
    assert_idle(restarted)
    restarted.forget("a")
    for engine in (restarted, new_engine()):
        assert uses(engine.rank(requests[:1])) == [("miss", "cold", 0, sum(lengths[0]), "none")]
        engine.forget("a")


def test_what_leaves_the_device_is_never_encoded_again(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32, takes_evicted=True))
    engine = new_engine(model, stack, num_pages=8, at_rest=4)
    raws = [raw_of(user, 8 + seed, 2, seed) for seed, user in enumerate("abcde")]
    for raw in raws:
        rank_and_drain(engine, raw)
    assert model.num_encodings == 5
    for _ in range(3):
        for raw in raws:
            answers = rank_and_drain(engine, raw)
            [(status, _, _, computed, found_in)] = uses(answers)
            assert (status, computed) == ("hit", 0)
            assert found_in in ("pages", "host")
            assert_as_uncached(engine, answers, raw)
    assert model.num_encodings == 5
    assert counted(engine, "lookups", tier="host", outcome="hit") > 5
    assert_idle(engine)


# Identity.


@pytest.mark.parametrize(("version", "reason"), [(OTHER_MODEL, "model"), (OTHER_TABLES, "tables")])
def test_another_version_misses_and_both_live_side_by_side(
    new_engine: NewEngine,
    new_stack: NewStack,
    model: Watched,
    other_model: RankingModel,
    version: str,
    reason: str,
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raw = raw_of("a", 11, 3, 1)
    ours = rank_and_drain(new_engine(model, stack), raw)
    other = new_engine(other_model, stack, version)
    theirs = rank_and_drain(other, raw)
    assert uses(theirs) == [("miss", reason, 0, 11, "none")]
    assert_as_uncached(other, theirs, raw)
    assert abs(ours[0].scores[0] - theirs[0].scores[0]) > 1e-3
    for _ in range(2):
        for each, its_version, expected in ((model, VERSION, ours), (other_model, version, theirs)):
            answers = rank(new_engine(each, stack, its_version), raw)
            assert uses(answers) == [("hit", "", 11, 0, "host")]
            assert scores(answers) == scores(expected)


def test_a_cleared_version_is_encoded_anew_and_the_other_is_not(
    new_engine: NewEngine, new_stack: NewStack, model: Watched, other_model: RankingModel
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raw = raw_of("a", 11, 3, 1)
    engine, other = new_engine(model, stack), new_engine(other_model, stack, OTHER_MODEL)
    rank_and_drain(engine, raw)
    rank_and_drain(other, raw)
    assert engine.store is not None
    cleared = engine.store.clear(engine.model_version)
    assert cleared["pages"] == 3 * PAGE_BYTES
    assert cleared["host"]
    assert uses(rank(engine, raw)) == [("miss", "model", 0, 11, "none")]
    assert uses(rank(other, raw)) == [("hit", "", 11, 0, "pages")]
    assert uses(rank(new_engine(other_model, stack, OTHER_MODEL), raw))[0][4] == "host"


def test_kv_in_another_codec_is_a_miss_that_says_so(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    host = host_tier()
    raw = raw_of("a", 11, 3, 1)
    rank_and_drain(new_engine(model, new_stack(Level(host, INT8))), raw)
    engine = new_engine(model, new_stack(Level(host, FLOAT32)))
    answers = rank(engine, raw)
    assert uses(answers) == [("miss", "codec", 0, 11, "none")]
    assert_as_uncached(engine, answers, raw)


def test_kv_is_kept_apart_by_the_context_that_history_rows_read(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raw = raw_of("a", 11, 3, 1)
    british, austrian = from_country(raw, "GB"), from_country(raw, "AT")
    engine = new_engine(model, stack, context=["country"])
    rank_and_drain(engine, british)
    assert uses(rank(engine, british)) == [("hit", "", 11, 0, "pages")]
    restarted = new_engine(model, stack, context=["country"])
    answers = rank_and_drain(restarted, austrian)
    assert uses(answers) == [("miss", "context", 0, 11, "none")]
    assert_as_uncached(restarted, answers, austrian)
    # Pages have one of them; the tier has both.
    for other in (british, austrian, british):
        assert uses(rank_and_drain(restarted, other)) == [("hit", "", 11, 0, "host")]


def test_on_the_device_another_context_is_a_miss_that_says_so(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model, context=["country"])
    raw = raw_of("a", 11, 3, 1)
    rank(engine, from_country(raw, "GB"))
    assert uses(rank(engine, from_country(raw, "AT"))) == [("miss", "context", 0, 11, "none")]


def test_context_that_history_rows_do_not_read_does_not_matter(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, from_country(raw, "GB"))
    answers = rank(engine, from_country(raw, "AT"))
    assert uses(answers) == [("hit", "", 11, 0, "pages")]
    assert_as_uncached(engine, answers, from_country(raw, "AT"))


# Shared content.

BY_CONTENT = Rules(share="content")


def as_user(raw: RawRequest, user: str) -> RawRequest:
    """Another user with the same history, and candidates of its own."""
    other = draw_raw(0, 2, ord(user)) | {"user_id": user, "history": raw["history"]}
    return oldest_first(other)


def test_users_with_the_same_history_share_it_where_that_is_asked_for(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model, rules=BY_CONTENT)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    other = as_user(raw, "b")
    answers = rank(engine, other)
    assert uses(answers) == [("hit", "", 11, 0, "pages")]
    assert_as_uncached(engine, answers, other)
    assert counted(engine, "hits_by_scope", scope="cross_user") == 1
    assert counted(engine, "hits_by_scope", scope="cross_request") == 0
    rank(engine, raw)
    assert counted(engine, "hits_by_scope", scope="cross_user") == 1
    assert counted(engine, "hits_by_scope", scope="cross_request") == 1
    assert model.num_encodings == 1
    assert_idle(engine)


def test_otherwise_they_do_not(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    assert uses(rank(engine, as_user(raw, "b"))) == [("miss", "cold", 0, 11, "none")]
    assert counted(engine, "hits_by_scope", scope="cross_user") == 0


@pytest.mark.parametrize(("index", "num_shared"), [(0, 0), (4, 0), (5, 5), (10, 10)])
def test_users_share_no_more_than_what_both_histories_begin_with(
    new_engine: NewEngine, model: Watched, index: int, num_shared: int
) -> None:
    engine = new_engine(model, rules=BY_CONTENT)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    other = edited(as_user(raw, "b"), index)
    answers = rank(engine, other)
    [(_, _, cached, computed, _)] = uses(answers)
    assert (cached, computed) == (num_shared, 11 - num_shared)
    assert_as_uncached(engine, answers, other)
    assert counted(engine, "hits_by_scope", scope="cross_user") == 0
    for mine in (raw, other):
        answers = rank(engine, mine)
        assert uses(answers) == [("hit", "", 11, 0, "pages")]
        assert_as_uncached(engine, answers, mine)
    assert_idle(engine)


def test_a_user_extends_what_another_has(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model, rules=BY_CONTENT)
    raw = raw_of("a", 14, 3, 1)
    rank(engine, cut(raw, 11))
    other = as_user(raw, "b")
    answers = rank(engine, other)
    assert [use[2:] for use in uses(answers)] == [(11, 3, "pages")]
    assert_as_uncached(engine, answers, other)
    assert uses(rank(engine, cut(raw, 11))) == [("hit", "", 11, 0, "pages")]


def test_users_of_different_contexts_share_nothing(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model, rules=BY_CONTENT, context=["country"])
    raw = from_country(raw_of("a", 11, 3, 1), "GB")
    rank(engine, raw)
    other = from_country(as_user(raw, "b"), "AT")
    assert uses(rank(engine, other)) == [("miss", "cold", 0, 11, "none")]


def test_a_user_of_another_context_takes_nothing_away_from_those_who_share(
    new_engine: NewEngine, model: Watched
) -> None:
    """Owners of shared content were stored by content without context: the last owner, whatever its
    context, hid the others."""
    engine = new_engine(model, rules=BY_CONTENT, context=["country"])
    raw = raw_of("a", 11, 3, 1)
    rank(engine, from_country(raw, "GB"))
    rank(engine, from_country(as_user(raw, "b"), "AT"))
    answers = rank(engine, from_country(as_user(raw, "c"), "GB"))
    assert uses(answers) == [("hit", "", 11, 0, "pages")]


def test_the_kv_of_a_forgotten_user_is_nobodys(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model, rules=BY_CONTENT)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw)
    engine.forget("a")
    assert uses(rank(engine, as_user(raw, "b"))) == [("miss", "cold", 0, 11, "none")]


def test_a_forgotten_user_that_shares_again_is_kept_again_and_grows(
    new_engine: NewEngine, model: Watched
) -> None:
    """It extends K/V of another user that was encoded before this user was forgotten: as long as
    that K/V was cached, its own was refused and encoded again for every request."""
    engine = new_engine(model, rules=BY_CONTENT)
    raw = raw_of("a", 14, 3, 1)
    rank(engine, cut(raw, 6))
    engine.forget("b")
    for num_events in (9, 12, 14):
        other = cut(as_user(raw, "b"), num_events)
        assert_as_uncached(engine, rank(engine, other), other)
        assert uses(rank(engine, other)) == [("hit", "", num_events, 0, "pages")]
    engine.forget("b")
    assert uses(rank(engine, other))[0][2] == 6  # It has no K/V of its own.


# Several requests at once.


class WatchedSingleFlight(SingleFlight):
    """Signals a wait, and calls a test's hook before a caller may lead."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for = threading.Event()
        self.before_leading: Callable[[], None] = do_nothing

    def lead(self, keys: Collection[Hashable]) -> set[Hashable]:
        self.before_leading()
        return super().lead(keys)

    def wait(self, key: Any, timeout_s: float) -> bool:
        self.waited_for.set()
        return super().wait(key, timeout_s)


class InBackground:
    """A request in a thread of its own, with its answers or its error."""

    def __init__(self, engine: Engine, *raws: RawRequest) -> None:
        self._engine, self._raws = engine, raws
        self.answers: list[Answer] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answers = rank(self._engine, *self._raws)
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def watched_single_flight(engine: Engine) -> WatchedSingleFlight:
    assert engine.store is not None
    single_flight = WatchedSingleFlight()
    engine.store.single_flight = single_flight
    return single_flight


def test_threads_that_want_the_same_cold_user_encode_it_once(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model, wait_s=PATIENCE_S)
    raw = raw_of("a", 11, 3, 1)
    barrier = threading.Barrier(6)
    answers: list[list[Answer]] = []

    def ask() -> None:
        barrier.wait(PATIENCE_S)
        answers.append(rank(engine, raw))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert model.num_encodings == 1
    assert len(answers) == 6
    assert all(scores(each) == scores(answers[0]) for each in answers)
    assert_as_uncached(engine, answers[0], raw)
    assert_idle(engine)


def test_a_second_request_waits_for_the_one_that_encodes(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model, wait_s=PATIENCE_S)
    single_flight = watched_single_flight(engine)
    leading = threading.Event()

    def lead() -> None:
        leading.set()
        assert single_flight.waited_for.wait(PATIENCE_S)

    model.before_encoding = lead
    raw = raw_of("a", 11, 3, 1)
    leader = InBackground(engine, raw)
    assert leading.wait(PATIENCE_S)
    answers = rank(engine, raw)
    leader.join()
    assert uses(leader.answers) == [("miss", "cold", 0, 11, "none")]
    assert uses(answers) == [("hit", "", 11, 0, "pages")]
    assert scores(answers) == scores(leader.answers)
    assert model.num_encodings == 1
    assert counted(engine, "flights", outcome="joined") == 1
    assert_idle(engine)


def test_what_was_encoded_since_it_was_looked_up_is_not_encoded_again(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model)
    single_flight = watched_single_flight(engine)
    raw, mate = raw_of("a", 11, 3, 1), raw_of("b", 9, 2, 2)

    def let_another_pass() -> None:
        single_flight.before_leading = do_nothing
        InBackground(engine, raw).join()

    single_flight.before_leading = let_another_pass
    answers = rank(engine, raw, mate)
    assert uses(answers) == [("hit", "", 11, 0, "pages"), ("miss", "cold", 0, 9, "none")]
    assert_as_uncached(engine, answers, raw, mate)
    assert model.num_encodings == 2  # each of them once
    assert_idle(engine)


def test_a_request_encodes_itself_if_the_one_it_waits_for_fails(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model, wait_s=PATIENCE_S)
    single_flight = watched_single_flight(engine)
    leading = threading.Event()

    def lead_and_fail() -> None:
        leading.set()
        assert single_flight.waited_for.wait(PATIENCE_S)
        model.before_encoding = do_nothing
        raise RuntimeError("not enough memory")

    model.before_encoding = lead_and_fail
    raw = raw_of("a", 11, 3, 1)
    leader = InBackground(engine, raw)
    assert leading.wait(PATIENCE_S)
    answers = rank(engine, raw)
    leader.join()
    assert str(leader.error) == "not enough memory"
    assert uses(answers) == [("miss", "cold", 0, 11, "none")]
    assert_as_uncached(engine, answers, raw)
    assert uses(rank(engine, raw)) == [("hit", "", 11, 0, "pages")]
    assert_idle(engine)


def test_a_request_waits_at_most_wait_s_for_another(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model, wait_s=0.05)
    leading, end = threading.Event(), threading.Event()

    def hang() -> None:
        model.before_encoding = do_nothing
        leading.set()
        assert end.wait(PATIENCE_S)

    model.before_encoding = hang
    raw, mate = raw_of("a", 11, 3, 1), raw_of("b", 9, 2, 2)
    leader = InBackground(engine, raw)
    assert leading.wait(PATIENCE_S)
    start = time.monotonic()
    answers = rank(engine, raw, mate)
    assert time.monotonic() - start < 0.05 + MARGIN_S
    assert_as_uncached(engine, answers, raw, mate)
    assert counted(engine, "flights", outcome="timed_out") == 1
    end.set()
    leader.join()
    assert_as_uncached(engine, leader.answers, raw)
    assert uses(rank(engine, raw)) == [("hit", "", 11, 0, "pages")]
    assert_idle(engine)


def test_users_who_share_content_wait_for_each_other_too(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model, rules=BY_CONTENT, wait_s=PATIENCE_S)
    single_flight = watched_single_flight(engine)
    leading = threading.Event()

    def lead() -> None:
        leading.set()
        assert single_flight.waited_for.wait(PATIENCE_S)

    model.before_encoding = lead
    raw = raw_of("a", 11, 3, 1)
    leader = InBackground(engine, raw)
    assert leading.wait(PATIENCE_S)
    other = as_user(raw, "b")
    answers = rank(engine, other)
    leader.join()
    assert uses(answers) == [("hit", "", 11, 0, "pages")]
    assert_as_uncached(engine, answers, other)
    assert model.num_encodings == 1


def test_two_requests_that_lead_what_the_other_waits_for_both_end(
    new_engine: NewEngine, model: Watched
) -> None:
    """Each encodes the keys that it leads before it waits for the others."""
    engine = new_engine(model, wait_s=PATIENCE_S)
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 9, 2, 2), raw_of("c", 14, 1, 3)]
    for _ in range(5):
        engine.forget("a")
        engine.forget("b")
        engine.forget("c")
        turned = [raws, raws[::-1], [raws[1], raws[0]], [raws[2], raws[0]]]
        requests = [InBackground(engine, *each) for each in turned]
        for request, each in zip(requests, turned, strict=True):
            request.join()
            assert_as_uncached(engine, request.answers, *each)
    assert_idle(engine)


# Room.


def test_pinned_users_outlive_a_crowd(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model, num_pages=9, rules=Rules(pinned_bytes=3 * PAGE_BYTES))
    assert engine.store is not None
    engine.store.pin(["a"])
    pinned = raw_of("a", 11, 3, 1)
    rank(engine, pinned)
    for seed in range(7):
        rank(engine, raw_of(f"user {seed}", 14, 1, seed))
    assert counted(engine, "evictions", tier="pages") > 0
    answers = rank(engine, pinned)
    assert uses(answers) == [("hit", "", 11, 0, "pages")]
    assert_as_uncached(engine, answers, pinned)
    assert_idle(engine)


def test_a_user_who_is_no_longer_pinned_is_evicted_as_all_are(model: Watched) -> None:
    pool = PagePool(
        6 * PAGE_BYTES, PAGE_SIZE, num_planes=NUM_PLANES, num_heads=NUM_HEADS, head_dim=HEAD_DIM
    )
    cache = KVCache(pool, Rules(pinned_bytes=3 * PAGE_BYTES))
    engine = Engine(model, SCHEMA, KVStore([cache]), version=version_called(VERSION))
    assert engine.store is not None
    engine.store.pin(["a"])
    raw = raw_of("a", 11, 3, 1)
    rank(engine, cut(raw, 9))
    engine.store.unpin(["a"])
    rank(engine, raw)
    rank(engine, raw_of("b", 14, 1, 2))
    assert uses(rank(engine, raw)) == [("miss", "evicted", 0, 11, "none")]


def test_a_history_too_short_to_keep_goes_past_the_cache(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    engine = new_engine(model, stack, min_events=10)
    short, long = raw_of("a", 9, 3, 1), raw_of("b", 10, 2, 2)
    for _ in range(2):
        answers = rank_and_drain(engine, short)
        assert uses(answers) == [("bypass", "too_short", 0, 9, "none")]
        assert_as_uncached(engine, answers, short)
    assert (model.num_encodings, model.num_uncached) == (0, 2)
    assert counted(engine, "lookups") == 0
    assert counted(engine, "held_bytes", tier="host") == 0
    assert uses(rank_and_drain(engine, long, short)) == [
        ("miss", "cold", 0, 10, "none"),
        ("bypass", "too_short", 0, 9, "none"),
    ]
    assert uses(rank(engine, long)) == [("hit", "", 10, 0, "pages")]


def test_a_user_that_the_pool_cannot_hold_is_encoded_once_for_its_request(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    engine = new_engine(model, stack, num_pages=2)
    raw = raw_of("a", 11, 3, 1)
    other = oldest_first(raw_of("a", 0, 2, 2) | {"history": raw["history"]})
    answers = rank_and_drain(engine, raw, other)
    assert uses(answers) == [("bypass", "not_admitted", 0, 11, "none")] * 2
    assert_as_uncached(engine, answers, raw, other)
    assert (model.num_encodings, model.num_uncached) == (1, 0)
    assert counted(engine, "not_kept", tier="pages") == 1
    assert_idle(engine)


def test_a_history_that_grows_beyond_its_room_is_scored_over_its_own_kv(
    new_engine: NewEngine, model: Watched
) -> None:
    """Its pages were freed before it was known that there are too few, and the K/V in page 0, of
    another user, was read instead: wrong scores."""
    engine = new_engine(model, num_pages=4)
    grows, stays, twice = raw_of("b", 9, 3, 1), raw_of("c", 5, 1, 2), raw_of("a", 4, 1, 3)
    rank(engine, stays)
    rank(engine, cut(grows, 5))
    rank(engine, stays)
    # The first of the two histories of one user leases its page until the batch is scored.
    raws = [twice, edited(twice, 3), grows]
    assert_as_uncached(engine, rank(engine, *raws), *raws)
    assert_idle(engine)


@pytest.mark.parametrize("num_pages", [1, 2, 3, 4, 5, 7])
def test_crowded_batches_score_as_without_a_cache(
    new_engine: NewEngine, new_stack: NewStack, model: Watched, num_pages: int
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32, takes_evicted=True))
    engine = new_engine(model, stack, num_pages=num_pages)
    for seed in range(6):
        raws = [raw_of(user, 14, 1, ord(user)) for user in "abcd"]
        raws = [cut(raw, (5 * index + 3 * seed) % 15) for index, raw in enumerate(raws)]
        raws.append(edited(cut(raws[0], 14), -1) if raws[0]["history"]["time"] else raws[0])
        answers = rank_and_drain(engine, *raws)
        assert_as_uncached(engine, answers, *raws)
        assert_idle(engine)


# Prefetching.


@pytest.mark.parametrize("is_in_tier", [False, True])
def test_prefetched_users_hit_on_the_device(
    new_engine: NewEngine, new_stack: NewStack, model: Watched, is_in_tier: bool
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raws = [raw_of("a", 11, 3, 1), raw_of("b", 0, 2, 2), raw_of("c", 14, 2, 3)]
    if is_in_tier:
        rank_and_drain(new_engine(model, stack), *raws)
    engine = new_engine(model, stack)
    num_scorings = model.num_scorings
    engine.prefetch(parse_all(raws))
    assert model.num_scorings == num_scorings
    assert model.num_encodings == 1
    answers = rank(engine, *raws)
    assert [use[::4] for use in uses(answers)] == [
        ("hit", "pages"),
        ("bypass", "none"),
        ("hit", "pages"),
    ]
    assert_as_uncached(engine, answers, *raws)
    assert model.num_encodings == 1
    assert_idle(engine)


def test_prefetching_nobody_or_without_a_cache_does_nothing(model: Watched) -> None:
    engine = Engine(model, SCHEMA, None, version=version_called(VERSION))
    engine.prefetch([])
    engine.prefetch(parse_all([raw_of("a", 11, 3, 1)]))
    assert (model.num_encodings, model.num_uncached) == (0, 0)


# Faults.


class FaultyHost(HostTier):
    """A host tier whose answers a test can make faulty."""

    fault: Callable[[list[Found]], list[Found]]

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        return self.fault(super().get(keys))


def fail(found: list[Found]) -> list[Found]:
    raise TierError("down")


def corrupt(found: list[Found]) -> list[Found]:
    return [one._replace(value=None if one.value is None else one.value[:-1]) for one in found]


@pytest.mark.parametrize(
    ("fault", "reason"), [(fail, "tier_error"), (corrupt, "tier_error"), (None, "deadline")]
)
def test_a_fault_of_a_tier_is_a_miss_with_a_reason(
    new_engine: NewEngine,
    new_stack: NewStack,
    model: Watched,
    fault: Callable[[list[Found]], list[Found]] | None,
    reason: str,
) -> None:
    host = FaultyHost(LruPolicy(10**6), TTL_S)
    end = threading.Event()

    def hang(found: list[Found]) -> list[Found]:
        end.wait(PATIENCE_S)
        return found

    host.fault = fault or hang
    stack = new_stack(Level(host, FLOAT32, deadline_s=5.0 if fault else 0.05))
    raw = raw_of("a", 11, 3, 1)
    rank_and_drain(new_engine(model, stack), raw)
    engine = new_engine(model, stack)
    answers = rank(engine, raw)
    end.set()
    assert uses(answers) == [("miss", reason, 0, 11, "none")]
    assert_as_uncached(engine, answers, raw)
    assert uses(rank(engine, raw)) == [("hit", "", 11, 0, "pages")]


# Forgetting.


def test_a_user_who_is_forgotten_while_encoded_is_kept_nowhere(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    host, evicted = host_tier(), host_tier()
    stack = new_stack(Level(host, FLOAT32), Level(evicted, FLOAT32, takes_evicted=True))
    engine = new_engine(model, stack)

    def forget() -> None:
        model.before_encoding = do_nothing
        engine.forget("a")

    model.before_encoding = forget
    raw, mate = raw_of("a", 11, 3, 1), raw_of("b", 9, 2, 2)
    answers = rank_and_drain(engine, raw, mate)
    assert_as_uncached(engine, answers, raw, mate)
    assert uses(answers) == [
        ("bypass", "not_admitted", 0, 11, "none"),
        ("miss", "cold", 0, 9, "none"),
    ]
    for each in (host, evicted):
        assert each.get([(text_digest("a"), "any")]) == [Found(None, ())]
    assert uses(rank(engine, raw, mate)) == [
        ("miss", "cold", 0, 11, "none"),
        ("hit", "", 9, 0, "pages"),
    ]
    assert_idle(engine)


def test_forgetting_tells_the_bytes_of_every_tier(
    new_engine: NewEngine, new_stack: NewStack, model: Watched, tier: Tier
) -> None:
    engine = new_engine(model, new_stack(Level(tier, FLOAT32)))
    raw = raw_of("a", 11, 3, 1)
    rank_and_drain(engine, raw)
    dropped = engine.forget("a")
    assert dropped["pages"] == 3 * PAGE_BYTES
    assert dropped[tier.name]
    assert engine.forget("a") == {"pages": 0, tier.name: 0}
    assert uses(rank(engine, raw)) == [("miss", "cold", 0, 11, "none")]
    assert Engine(model, SCHEMA, None, version=version_called(VERSION)).forget("a") == {}


# What is counted.


def test_events_are_counted_by_whether_they_were_encoded(
    new_engine: NewEngine, new_stack: NewStack, model: Watched
) -> None:
    stack = new_stack(Level(host_tier(), FLOAT32))
    raw = raw_of("a", 14, 3, 1)
    engine = new_engine(model, stack)
    rank_and_drain(engine, cut(raw, 10))
    rank_and_drain(engine, cut(raw, 12))
    rank_and_drain(new_engine(model, stack), raw)
    assert counted(engine, "events", source="computed") == 10 + 2 + 4
    assert counted(engine, "events", source="cached") == 10 + 10
    assert stack.metrics.snapshot().hit_rate() == 20 / 36


def test_nothing_is_held_once_an_encoding_has_failed(new_engine: NewEngine, model: Watched) -> None:
    engine = new_engine(model)
    rank(engine, raw_of("a", 11, 3, 1))

    def fail() -> None:
        raise RuntimeError("no encoding today")

    model.before_encoding = fail
    with pytest.raises(RuntimeError, match="no encoding today"):
        rank(engine, raw_of("a", 11, 3, 1), raw_of("b", 6, 2, 2))
    assert_idle(engine)
    model.before_encoding = do_nothing
    assert [use[0] for use in uses(rank(engine, raw_of("b", 6, 2, 2)))] == ["miss"]


def test_two_requests_of_a_user_in_a_batch_share_one_encoding(
    new_engine: NewEngine, model: Watched
) -> None:
    engine = new_engine(model)
    raw = raw_of("a", 11, 3, 1)
    rank(engine, raw, raw, raw_of("b", 6, 2, 2))
    assert model.num_encodings == 1
    assert counted(engine, "hits_by_scope", scope="request") == 1
