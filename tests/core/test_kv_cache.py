"""What the cache finds, why it does not, and what it may never do to K/V in use."""

import os
import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.core.worlds import HEAD_DIM, NUM_HEADS, NUM_PLANES, PAGE_BYTES, PAGE_SIZE
from torchrec_kvshare.cache import kv_cache
from torchrec_kvshare.cache.kv_cache import Entry, KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.errors import ShapeError

HAMMER_SECONDS = 20.0 if os.environ.get("KVSHARE_SOAK") == "1" else 1.0


def make_cache(num_pages: int) -> KVCache:
    pool = PagePool(num_pages * PAGE_BYTES, PAGE_SIZE, NUM_PLANES, NUM_HEADS, HEAD_DIM)
    return KVCache(pool)


def kv_of(digest: bytes, num_events: int) -> Tensor:
    """K/V that tells which history it is of."""
    kv = torch.full((NUM_PLANES, num_events, NUM_HEADS, HEAD_DIM), float(hash(digest) % 9973))
    return kv + torch.arange(num_events)[:, None, None] / 64


def is_intact(cache: KVCache, entry: Entry) -> bool:
    kv = cache.pool.kv_pages[:, entry.pages].flatten(1, 2)[:, : entry.num_events]
    return torch.equal(kv, kv_of(entry.digest, entry.num_events))


def put(cache: KVCache, user_id: str, digest: bytes, num_pages: int) -> Entry | None:
    num_events = num_pages * PAGE_SIZE
    return cache.put(user_id, digest, kv_of(digest, num_events), num_events)


def put_and_release(cache: KVCache, user_id: str, digest: bytes, num_pages: int) -> None:
    entry = put(cache, user_id, digest, num_pages)
    assert entry is not None
    cache.release(entry)


def state_of(cache: KVCache) -> tuple[list[str], int]:
    """Users kept, the least recently used first, and free pages."""
    return list(cache._entry_by_user), cache.pool.num_free


def test_an_unknown_user_is_cold() -> None:
    lookup = make_cache(3).lookup("7", b"a", 5)
    assert (lookup.entry, lookup.reason) == (None, "cold")


def test_the_same_history_hits_and_is_intact() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", b"a", 2)
    lookup = cache.lookup("7", b"a", 10)
    assert lookup.reason == "hit"
    assert lookup.entry is not None
    assert lookup.entry.num_events == 10
    assert is_intact(cache, lookup.entry)


def test_another_history_of_no_fewer_events_was_edited() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", b"a", 2)
    assert cache.lookup("7", b"b", 10).reason == "edited"
    assert cache.lookup("7", b"b", 11).reason == "edited"


def test_another_history_of_fewer_events_was_shrunk() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", b"a", 2)
    assert cache.lookup("7", b"b", 9).reason == "shrunk"


def test_a_miss_leaves_what_is_kept_of_the_user() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", b"a", 2)
    cache.lookup("7", b"b", 9)
    assert cache.lookup("7", b"a", 10).reason == "hit"


def test_the_history_of_one_user_is_not_that_of_another() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", b"a", 2)
    assert cache.lookup("8", b"a", 10).reason == "cold"


def test_an_evicted_user_is_told_from_a_cold_one_until_it_is_put_again() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", b"a", 2)
    put_and_release(cache, "8", b"b", 2)
    assert cache.lookup("7", b"a", 10).reason == "evicted"
    put_and_release(cache, "7", b"a", 1)
    assert cache.lookup("7", b"a", 5).reason == "hit"


def test_the_least_recently_used_user_goes_first() -> None:
    cache = make_cache(6)
    for user_id in "abc":
        put_and_release(cache, user_id, user_id.encode(), 2)
    found = cache.lookup("a", b"a", 10).entry
    assert found is not None
    cache.release(found)
    put_and_release(cache, "d", b"d", 2)
    assert state_of(cache) == (["c", "a", "d"], 0)
    put_and_release(cache, "e", b"e", 3)
    assert state_of(cache) == (["d", "e"], 1)
    assert cache.counts["evictions"] == 3


def test_a_replaced_history_gives_its_pages_back() -> None:
    cache = make_cache(4)
    put_and_release(cache, "7", b"a", 3)
    put_and_release(cache, "7", b"b", 4)
    assert state_of(cache) == (["7"], 0)
    assert cache.counts["evictions"] == 0
    assert cache.held_bytes == 4 * PAGE_BYTES


def test_pins_outlive_replacement() -> None:
    cache = make_cache(5)
    old = put(cache, "7", b"a", 2)
    new = put(cache, "7", b"b", 3)
    assert old is not None
    assert new is not None
    assert is_intact(cache, old)
    assert cache.pool.num_free == 0
    cache.release(old)
    assert cache.pool.num_free == 2
    assert is_intact(cache, new)


def test_pins_outlive_being_forgotten() -> None:
    cache = make_cache(3)
    entry = put(cache, "7", b"a", 2)
    assert entry is not None
    assert cache.forget("7") == 2 * PAGE_BYTES
    assert cache.lookup("7", b"a", 10).reason == "cold"
    assert put(cache, "8", b"b", 2) is None
    assert is_intact(cache, entry)
    cache.release(entry)
    assert cache.pool.num_free == 3


def test_a_pinned_user_is_not_evicted() -> None:
    cache = make_cache(4)
    pinned = put(cache, "a", b"a", 2)
    put_and_release(cache, "b", b"b", 2)
    put_and_release(cache, "c", b"c", 2)
    assert state_of(cache) == (["a", "c"], 0)
    assert pinned is not None
    assert is_intact(cache, pinned)


def test_a_put_that_does_not_fit_changes_nothing() -> None:
    cache = make_cache(5)
    pinned = put(cache, "a", b"a", 2)
    put_and_release(cache, "b", b"b", 1)
    put_and_release(cache, "c", b"c", 2)
    before = state_of(cache)
    assert put(cache, "d", b"d", 4) is None
    assert put(cache, "b", b"x", 4) is None
    assert put(cache, "a", b"x", 4) is None
    assert state_of(cache) == before
    assert cache.counts["evictions"] == 0
    assert cache.counts["not_admitted"] == 3
    assert pinned is not None
    assert is_intact(cache, pinned)
    assert cache.lookup("b", b"b", 5).reason == "hit"


def test_a_history_of_the_whole_pool_fits_and_one_page_more_does_not() -> None:
    cache = make_cache(3)
    put_and_release(cache, "a", b"a", 1)
    put_and_release(cache, "b", b"b", 3)
    assert put(cache, "c", b"c", 4) is None
    assert cache.lookup("b", b"b", 15).reason == "hit"


def test_forgetting_a_user_leaves_nothing_of_it() -> None:
    cache = make_cache(3)
    put_and_release(cache, "a", b"a", 2)
    put_and_release(cache, "b", b"b", 3)
    assert cache.forget("a") == 0  # evicted already; now not even that is known
    assert cache.lookup("a", b"a", 10).reason == "cold"
    assert cache.forget("b") == 3 * PAGE_BYTES
    assert cache.lookup("b", b"b", 15).reason == "cold"
    assert state_of(cache) == ([], 3)


def test_evictions_are_remembered_of_so_many_users_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "MAX_REMEMBERED_EVICTIONS", 2)
    cache = make_cache(1)
    for user_id in "abcd":
        put_and_release(cache, user_id, user_id.encode(), 1)
    reasons = [cache.lookup(user_id, user_id.encode(), 5).reason for user_id in "abcd"]
    assert reasons == ["cold", "evicted", "evicted", "hit"]


def test_every_lookup_is_counted_under_its_reason() -> None:
    cache = make_cache(2)
    put_and_release(cache, "a", b"a", 2)
    for digest, num_events in ((b"a", 10), (b"b", 10), (b"c", 12), (b"d", 3)):
        cache.lookup("a", digest, num_events)
    cache.lookup("z", b"a", 10)
    assert cache.counts == {"hit": 1, "edited": 2, "shrunk": 1, "cold": 1}


# A user comes with one of three histories, a request in flight ends, a user is forgotten.
steps = st.lists(
    st.tuples(st.just("come"), st.integers(0, 3), st.integers(0, 2))
    | st.tuples(st.just("end"), st.integers(0, 100), st.just(0))
    | st.tuples(st.just("forget"), st.integers(0, 3), st.just(0)),
    max_size=40,
)


@given(st.integers(1, 9), steps)
def test_random_traffic_keeps_pinned_kv_intact_and_loses_no_page(
    num_pages: int, traffic: list[tuple[str, int, int]]
) -> None:
    cache = make_cache(num_pages)
    in_flight: list[Entry] = []
    for step, number, version in traffic:
        if step == "come":
            digest, num_events = bytes([number, version]), 3 * number + 4 * version + 1
            entry = cache.lookup(str(number), digest, num_events).entry
            if entry is None:
                entry = cache.put(str(number), digest, kv_of(digest, num_events), num_events)
            if entry is not None:
                assert (entry.digest, entry.num_events) == (digest, num_events)
                in_flight.append(entry)
        elif step == "forget":
            cache.forget(str(number))
        elif in_flight:
            cache.release(in_flight.pop(number % len(in_flight)))
        kept = list(cache._entry_by_user.values())
        alive = {id(entry): entry for entry in kept + in_flight}.values()
        held = [page for entry in alive for page in entry.pages]
        assert len(set(held)) == len(held) == num_pages - cache.pool.num_free
        assert all(is_intact(cache, entry) for entry in alive)
    for entry in in_flight:
        cache.release(entry)
    for number in range(4):
        cache.forget(str(number))
    assert cache.pool.num_free == num_pages


def test_threads_that_hammer_one_cache_read_only_what_they_asked_for() -> None:
    cache = make_cache(12)
    stop = time.monotonic() + HAMMER_SECONDS
    wrong: list[str] = []
    rounds = [0] * 4

    def hammer(place: int) -> None:
        rng = random.Random(place)
        while time.monotonic() < stop and not wrong:
            user, version = rng.randrange(6), rng.randrange(3)
            digest, num_events = bytes([user, version]), 4 * user + 3 * version + 1
            entry = cache.lookup(str(user), digest, num_events).entry
            if entry is None:
                entry = cache.put(str(user), digest, kv_of(digest, num_events), num_events)
            if entry is not None:
                if entry.digest != digest or not is_intact(cache, entry):
                    wrong.append(f"user {user}, version {version}")
                cache.release(entry)
            if rng.random() < 0.05:
                cache.forget(str(user))
            rounds[place] += 1

    threads = [threading.Thread(target=hammer, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(rounds) > 10
    kept = cache._entry_by_user.values()
    assert all(entry.num_pins == 0 and not entry.dropped for entry in kept)
    assert sum(len(entry.pages) for entry in kept) == 12 - cache.pool.num_free


def test_kv_of_another_model_is_refused_before_anything_changed() -> None:
    """It was found out while copying, when victims were evicted and pages taken already."""
    cache = KVCache(PagePool(4096, 4, 2, 2, 8))
    kept = cache.put("7", b"abc", torch.zeros(2, 3, 2, 8), 3)
    assert kept is not None
    cache.release(kept)
    held = cache.held_bytes
    with pytest.raises(ShapeError, match=r"K/V is \[2, 30, 4, 4\]; the pool holds"):
        cache.put("8", b"xyz", torch.zeros(2, 30, 4, 4), 30)
    assert cache.held_bytes == held
    assert cache.lookup("7", b"abc", 3).reason == "hit"
