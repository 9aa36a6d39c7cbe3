"""Thirty-two threads over one engine and its tiers: right scores, kept budgets, no deadlock."""

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from tests.worlds import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_PLANES,
    PAGE_BYTES,
    PAGE_SIZE,
    PROBABILITY_TOLERANCE,
    SCHEMA,
    draw_raw,
    make_dlrm,
    oldest_first,
    parse_all,
    version_called,
)
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.kv_cache import CONTENT, USER, KVCache, Rules
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LRU, TINY_LFU, LruPolicy, new_policy
from torchrec_kvshare.cache.stack import Level, TierLimits, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

HAMMER_SECONDS = 60.0 if os.environ.get("KVSHARE_SOAK") == "1" else 1.5
NUM_THREADS = 32
# Thirty-two requests run when time is up, and one core may have to finish them all.
PATIENCE_S = 60.0

VERSION = "5e" * 8 + "-" + "0f" * 8
USERS = tuple(f"user {index}" for index in range(9))
HOST_BYTES, NUM_PAGES = 9000, 19
TTL_S = 600.0
WAIT_S = 0.2


class Asked(NamedTuple):
    """A request and its scores without a cache."""

    request: Request
    scores: list[float]


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return RankingModel(make_dlrm(seed=3)).eval()


@pytest.fixture(scope="module")
def asked_by_user(model: RankingModel) -> dict[str, list[Asked]]:
    """For each user its history: repeated, grown, edited, shortened, and another user's."""
    uncached = Engine(model, SCHEMA, None, version=version_called(VERSION))
    shared = draw_raw(13, 0, 99)["history"]
    asked = {}
    for index, user in enumerate(USERS):
        raw = draw_raw(14, 1 + index % 3, index) | {"user_id": user}
        histories: list[dict[str, list[Any]]] = [
            {column: cells[:num_events] for column, cells in raw["history"].items()}
            for num_events in (3 + index % 4, 8 + index % 3, 14)
        ]
        histories.append(histories[1] | {"item_id": ["110", *histories[1]["item_id"][1:]]})
        histories.append(shared)
        requests = parse_all([oldest_first(raw | {"history": one}) for one in histories])
        scores = [answer.scores for answer in uncached.rank(requests)]
        asked[user] = [Asked(*each) for each in zip(requests, scores, strict=True)]
    return asked


class Hammered(NamedTuple):
    """The objects that the threads share."""

    engine: Engine
    cache: KVCache
    num_at_rest: int
    host: HostTier
    stack: TierStack


# Without spare pages, new K/V competes with K/V on its way to the host tier.
@pytest.fixture(
    params=[(LRU, USER, True, NUM_PAGES), (TINY_LFU, CONTENT, False, NUM_PAGES - 5)],
    ids=["lru", "tiny_lfu"],
)
def hammered(request: pytest.FixtureRequest, model: RankingModel) -> Iterator[Hammered]:
    policy, share, takes_evicted, num_at_rest = request.param
    host = HostTier(LruPolicy(HOST_BYTES), TTL_S)
    level = Level(host, get_codec("float32"), takes_evicted=takes_evicted, deadline_s=5.0)
    stack = TierStack([level], TTL_S, limits=TierLimits(queue_length=5))
    pool = PagePool(
        NUM_PAGES * PAGE_BYTES,
        PAGE_SIZE,
        num_planes=NUM_PLANES,
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
    )
    pool.kv_pages.fill_(torch.nan)
    cache = KVCache(
        pool,
        Rules(TTL_S, share=share, pinned_bytes=3 * PAGE_BYTES),
        new_policy(policy, (num_at_rest - 3) * PAGE_BYTES),
        on_evict=stack.demote,
        metrics=stack.metrics,
    )
    store = KVStore([cache], stack, min_events=4, wait_s=WAIT_S)
    store.pin([USERS[0]])
    yield Hammered(
        engine=Engine(model, SCHEMA, store, version=version_called(VERSION)),
        cache=cache,
        num_at_rest=num_at_rest,
        host=host,
        stack=stack,
    )
    stack.close()


def hammer(
    engine: Engine,
    asked_by_user: dict[str, list[Asked]],
    seed: int,
    until: float,
    faults: list[str],
) -> int:
    """Rank, prefetch and forget at random until the time is up; return the batches ranked."""
    rng = random.Random(seed)
    num_ranked = 0
    while time.monotonic() < until and not faults:
        users = rng.choices(USERS, k=rng.randint(1, 4))
        asked = [rng.choice(asked_by_user[user]) for user in users]
        requests = [one.request for one in asked]
        if rng.random() < 0.05:
            engine.forget(rng.choice(USERS))
        if rng.random() < 0.05:
            engine.prefetch(requests)
        for one, answer in zip(asked, engine.rank(requests), strict=True):
            errors = [abs(a - b) for a, b in zip(answer.scores, one.scores, strict=True)]
            # Not ``max > tolerance``: NaN is a fault too.
            if not max(errors) <= PROBABILITY_TOLERANCE:
                faults.append(f"{answer} is {max(errors):.1e} from {one.scores}")
        num_ranked += 1
    return num_ranked


def test_threads_that_hammer_one_engine_get_the_scores_of_one(
    hammered: Hammered, asked_by_user: dict[str, list[Asked]]
) -> None:
    engine, cache, _, host, stack = hammered
    until = time.monotonic() + HAMMER_SECONDS
    faults: list[str] = []
    num_ranked: list[int] = []

    def run(seed: int) -> None:
        try:
            num_ranked.append(hammer(engine, asked_by_user, seed, until=until, faults=faults))
        except BaseException as error:
            faults.append(repr(error))

    threads = [
        threading.Thread(target=run, args=(seed,), name=f"hammer {seed}", daemon=True)
        for seed in range(NUM_THREADS)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        assert host.held_bytes() <= HOST_BYTES
        assert cache.held_bytes <= cache.pool.capacity_bytes
        assert stack.metrics.snapshot().value("queue_length", tier="host") <= 5
        threads[0].join(0.02)
    for thread in threads:
        thread.join(max(0.0, until + PATIENCE_S - time.monotonic()))
    assert [thread.name for thread in threads if thread.is_alive()] == []
    assert faults == []
    assert len(num_ranked) == NUM_THREADS
    assert sum(num_ranked) >= NUM_THREADS
    assert stack.drain(PATIENCE_S)
    assert_at_rest(hammered)
    snapshot = stack.metrics.snapshot()
    assert snapshot.value("tier_failures", kind="corrupt") == 0
    assert snapshot.value("tier_failures", kind="error") == 0
    assert snapshot.value("lookups", tier="host") > 0
    for user in USERS:
        engine.forget(user)
    assert cache.pool.num_free == NUM_PAGES
    assert host.held_bytes() == 0


def assert_at_rest(hammered: Hammered) -> None:
    """Check that there are no leases, no lost pages, and no exceeded budget."""
    engine, cache, num_at_rest, host, _ = hammered
    assert engine.store is not None
    assert engine.store.single_flight._finished_by_key == {}
    kept = cache._entry_by_user
    assert all(entry.num_leases == 0 and not entry.dropped for entry in kept.values())
    held = [page for entry in kept.values() for page in entry.pages]
    assert len(set(held)) == len(held) == NUM_PAGES - cache.pool.num_free
    assert len(held) <= num_at_rest
    assert cache._pinned_held_bytes == sum(entry.pinned_bytes for entry in kept.values())
    assert cache._pinned_held_bytes <= 3 * PAGE_BYTES
    assert host.held_bytes() <= HOST_BYTES
