"""What the ``pages`` tier finds, why it does not, and that leased K/V never changes."""

import math
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.worlds import HEAD_DIM, NUM_HEADS, NUM_PLANES, PAGE_BYTES, PAGE_SIZE
from torchrec_kvshare.cache import kv_cache
from torchrec_kvshare.cache.identity import NO_CONTEXT, Identity, PrefixDigests
from torchrec_kvshare.cache.kv_cache import Entry, KVCache, Rules
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.errors import ConfigError, ShapeError
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import HISTORY, ITEM, TIME, FeatureSchema, History, Window

HAMMER_SECONDS = 20.0 if os.environ.get("KVSHARE_SOAK") == "1" else 1.0

BARE = FeatureSchema({}, histories=(History(HISTORY, Window(100, 5)),))


IDENTITY = Identity("model", "tables", NO_CONTEXT, tower=HISTORY, block=PAGE_SIZE)
EDITS = 10**6  # numbers from here on are edits of earlier events


def make_cache(num_pages: int) -> KVCache:
    pool = PagePool(
        num_pages * PAGE_BYTES,
        PAGE_SIZE,
        num_planes=NUM_PLANES,
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
    )
    return KVCache(pool)


def history_of(events: Sequence[int], first_event: int = 0) -> PrefixDigests:
    """A history of events by number; the number is also the time, unless the order forbids it."""
    times = [*accumulate((event % EDITS for event in events), max)]
    columns = {ITEM: torch.tensor(events), TIME: torch.tensor(times)}
    return PrefixDigests(Events(columns, {}, first_event), BARE, IDENTITY)


def events_of(name: str, num_pages: int) -> list[int]:
    """Events for so many pages; histories of another name have none of them."""
    return [1000 * ord(name) + index for index in range(num_pages * PAGE_SIZE)]


def kv_of(events: Sequence[int]) -> Tensor:
    """K/V whose values are the numbers of its events."""
    return torch.tensor(events).float()[:, None, None].expand(NUM_PLANES, -1, NUM_HEADS, HEAD_DIM)


def has_kv_of(cache: KVCache, entry: Entry, events: Sequence[int]) -> bool:
    kv = cache.pool.kv_pages[:, entry.pages].flatten(1, 2)[:, : entry.num_events]
    return torch.equal(kv, kv_of(events))


def look_up(cache: KVCache, user_id: str, events: Sequence[int]) -> tuple[str, int]:
    """Return reason and matched events, and release the lease."""
    found = cache.lookup(user_id, history_of(events))
    assert (found.entry is None) == (found.num_matched == 0)
    if found.entry is not None:
        cache.release(found.entry)
    return found.reason, found.num_matched


def put(cache: KVCache, user_id: str, name: str, num_pages: int) -> Entry | None:
    events = events_of(name, num_pages)
    return cache.put(user_id, history_of(events).content, kv_of(events))


def put_and_release(cache: KVCache, user_id: str, name: str, num_pages: int) -> None:
    entry = put(cache, user_id, name, num_pages)
    assert entry is not None
    cache.release(entry)


def state_of(cache: KVCache) -> tuple[list[str], int]:
    """Return the cached users, least recently used first, and the number of free pages."""
    assert isinstance(cache._policy, LruPolicy)
    return list(cache._policy._bytes_by_key), cache.pool.num_free


def counted(cache: KVCache, name: str, **labels: str) -> float:
    return cache.metrics.snapshot().value(name, tier="pages", **labels)


def test_an_unknown_user_is_cold() -> None:
    assert look_up(make_cache(3), "7", [1, 2, 3]) == ("cold", 0)


def test_the_same_history_hits_and_is_intact() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", "a", 2)
    lookup = cache.lookup("7", history_of(events_of("a", 2)))
    assert (lookup.reason, lookup.num_matched) == ("hit", 10)
    assert lookup.entry is not None
    assert lookup.entry.num_events == 10
    assert has_kv_of(cache, lookup.entry, events_of("a", 2))


NUM_KEPT = 17  # events: three pages and a part


@pytest.mark.parametrize(
    ("events", "reason", "num_matched"),
    [
        (range(NUM_KEPT), "hit", NUM_KEPT),
        # New events after all the old ones were never encoded.
        (range(NUM_KEPT + 1), "cold", NUM_KEPT),
        (range(40), "cold", NUM_KEPT),
        # An edit invalidates its block and those after it; earlier blocks are used.
        ([*range(16), EDITS + 16], "edited", 15),
        ([*range(16), EDITS + 16, 17, 18], "edited", 15),
        ([*range(9), EDITS + 9, *range(10, 30)], "edited", 5),
        ([*range(10), EDITS + 10, *range(11, 30)], "edited", 10),
        ([EDITS, *range(1, 30)], "edited", 0),
        ([EDITS, 0, *range(2, NUM_KEPT)], "edited", 0),
        (range(NUM_KEPT - 1), "shrunk", 15),
        (range(10), "shrunk", 10),
        (range(4), "shrunk", 0),
        # The oldest events left: a client sends its last events without first_event.
        (range(1, NUM_KEPT), "slid", 0),
        (range(1, NUM_KEPT + 1), "slid", 0),
        (range(12, 40), "slid", 0),
        (range(30, 47), "slid", 0),
    ],
)
def test_a_lookup_says_how_far_the_histories_agree_and_why_not_further(
    events: Sequence[int], reason: str, num_matched: int
) -> None:
    cache = make_cache(5)
    entry = cache.put("7", history_of(range(NUM_KEPT)).content, kv_of(range(NUM_KEPT)))
    assert entry is not None
    cache.release(entry)
    assert look_up(cache, "7", [*events]) == (reason, num_matched)
    assert look_up(cache, "7", [*range(NUM_KEPT)]) == ("hit", NUM_KEPT)


def test_a_window_that_starts_elsewhere_has_slid() -> None:
    cache = make_cache(5)
    put_and_release(cache, "7", "a", 2)
    slid = history_of(events_of("a", 3)[PAGE_SIZE:], first_event=PAGE_SIZE)
    assert cache.lookup("7", slid)[:3] == (None, "slid", 0)


# Age.


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def aged_cache(ttl_s: float, idle_ttl_s: float) -> tuple[KVCache, Clock]:
    clock = Clock()
    return KVCache(make_cache(8).pool, Rules(ttl_s, idle_ttl_s), clock=clock), clock


def test_kv_expires_however_often_it_is_used() -> None:
    cache, clock = aged_cache(60.0, math.inf)
    put_and_release(cache, "7", "a", 2)
    for _ in range(6):
        clock.now += 10.0
        assert look_up(cache, "7", events_of("a", 2))[0] == "hit"
    clock.now += 0.001
    assert look_up(cache, "7", events_of("a", 2)) == ("expired", 0)
    assert state_of(cache) == ([], 8)
    assert look_up(cache, "7", events_of("a", 2)) == ("cold", 0)
    put_and_release(cache, "7", "a", 2)
    clock.now += 60.0
    assert look_up(cache, "7", events_of("a", 2))[0] == "hit"


def test_kv_that_nobody_uses_expires_sooner() -> None:
    cache, clock = aged_cache(math.inf, 60.0)
    put_and_release(cache, "7", "a", 2)
    for _ in range(3):
        clock.now += 60.0
        assert look_up(cache, "7", events_of("a", 2))[0] == "hit"
    clock.now += 60.001
    assert look_up(cache, "7", events_of("a", 2)) == ("expired", 0)


@pytest.mark.parametrize("is_read", [False, True])
def test_growing_makes_kv_no_younger(is_read: bool) -> None:
    """It is as old as its oldest rows, whether it grows in place or is copied."""
    cache, clock = aged_cache(60.0, math.inf)
    put_and_release(cache, "7", "a", 1)
    clock.now += 50.0
    reader = cache.lookup("7", history_of(events_of("a", 1))).entry if is_read else None
    events = [*events_of("a", 1), 5, 6]
    grown = grow(cache, "7", events)
    assert grown is not None
    cache.release(grown)
    if reader is not None:
        cache.release(reader)
    clock.now += 11.0
    assert look_up(cache, "7", events) == ("expired", 0)
    assert cache.pool.num_free == 8


def test_who_reads_kv_that_expires_reads_on() -> None:
    cache, clock = aged_cache(60.0, math.inf)
    reader = put(cache, "7", "a", 2)
    clock.now += 61.0
    assert look_up(cache, "7", events_of("a", 2)) == ("expired", 0)
    assert reader is not None
    assert has_kv_of(cache, reader, events_of("a", 2))
    cache.release(reader)
    assert cache.pool.num_free == 8


@pytest.mark.parametrize(
    ("ttl_s", "idle_ttl_s", "message"),
    [
        (0.0, 1.0, "ttl_s is 0.0"),
        (-1.0, 1.0, "ttl_s is -1.0"),
        (math.nan, 1.0, "ttl_s is nan"),
        (1.0, 0.0, "idle_ttl_s is 0.0"),
    ],
)
def test_a_time_to_live_that_is_none_is_named(
    ttl_s: float, idle_ttl_s: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}; it must be above 0 seconds"):
        aged_cache(ttl_s, idle_ttl_s)


def test_the_history_of_one_user_is_not_that_of_another() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", "a", 2)
    assert look_up(cache, "8", events_of("a", 2)) == ("cold", 0)


# Growing.


def grow(cache: KVCache, user_id: str, events: Sequence[int]) -> Entry | None:
    """Extend as the engine does: keep the common prefix, put the rest after it."""
    history = history_of(events)
    entry, _, num_kept = cache.lookup(user_id, history)[:3]
    grown = cache.put(
        user_id, history.content, kv_of(events)[:, num_kept:], base=entry, num_kept=num_kept
    )
    if entry is not None:
        cache.release(entry)
    return grown


@pytest.mark.parametrize("num_events", [11, 15, 16, 29])
def test_a_history_grows_where_it_lies(num_events: int) -> None:
    cache = make_cache(8)
    first = cache.put("7", history_of(range(11)).content, kv_of(range(11)))
    assert first is not None
    pages = list(first.pages)
    cache.release(first)
    grown = grow(cache, "7", range(num_events + 1))
    assert grown is not None
    assert grown.pages[: len(pages)] == pages
    assert has_kv_of(cache, grown, range(num_events + 1))
    cache.release(grown)
    assert look_up(cache, "7", [*range(num_events + 1)])[0] == "hit"
    assert cache.pool.num_free == 8 - len(grown.pages)


def test_a_growing_history_stays_in_one_piece_where_there_is_room() -> None:
    cache = make_cache(9)
    put_and_release(cache, "8", "b", 2)
    for num_events in range(1, 33):
        grown = grow(cache, "7", range(num_events))
        assert grown is not None
        cache.release(grown)
    assert grown.pages == list(range(2, 9))
    assert has_kv_of(cache, grown, range(32))


def test_an_edited_history_keeps_what_stands_before_the_edit() -> None:
    cache = make_cache(5)
    put_and_release(cache, "7", "a", 4)
    edited = [*events_of("a", 2), *events_of("z", 1)]
    grown = grow(cache, "7", edited)
    assert grown is not None
    assert has_kv_of(cache, grown, edited)
    assert cache.pool.num_free == 2


@pytest.mark.parametrize(("name", "num_published"), [("a", 20), ("z", 0)])
def test_lower_tiers_are_given_an_edited_history_again_and_a_grown_one_not(
    name: str, num_published: int
) -> None:
    cache = make_cache(6)
    first = put(cache, "7", "a", 4)
    assert first is not None
    first.num_published = 20
    cache.release(first)
    grown = grow(cache, "7", [*events_of("a", 2), *events_of(name, 4)[10:], 1])
    assert grown is not None
    assert grown.num_published == num_published


def test_a_history_that_someone_reads_is_copied_before_it_grows() -> None:
    cache = make_cache(6)
    put_and_release(cache, "7", "a", 2)
    reader = cache.lookup("7", history_of(events_of("a", 2))).entry
    assert reader is not None
    edited = [*events_of("a", 1), *events_of("z", 2)]
    grown = grow(cache, "7", edited)
    assert grown is not None
    assert has_kv_of(cache, reader, events_of("a", 2))
    assert has_kv_of(cache, grown, edited)
    assert cache.pool.num_free == 1
    cache.release(reader)
    assert cache.pool.num_free == 3


def test_two_ways_to_grow_one_history_do_not_meet() -> None:
    """Both look up the same entry; the first extends it in place, the second must copy it."""
    cache = make_cache(9)
    put_and_release(cache, "7", "a", 1)
    ways = [[*events_of("a", 1), *events_of(name, 1)] for name in "xy"]
    bases = [cache.lookup("7", history_of(events)).entry for events in ways]
    grown = []
    for events, base in zip(ways, bases, strict=True):
        grown.append(
            cache.put(
                "7",
                history_of(events).content,
                kv_of(events)[:, PAGE_SIZE:],
                base=base,
                num_kept=PAGE_SIZE,
            )
        )
        cache.release(base)
    for events, entry in zip(ways, grown, strict=True):
        assert entry is not None
        assert has_kv_of(cache, entry, events)
        cache.release(entry)
    assert look_up(cache, "7", ways[1])[0] == "hit"
    assert cache.pool.num_free == 7


def test_a_history_that_has_no_room_to_grow_stays_as_it_was() -> None:
    cache = make_cache(4)
    put_and_release(cache, "7", "a", 2)
    leased = put(cache, "8", "b", 1)
    assert grow(cache, "7", [*events_of("a", 2), *range(11)]) is None
    assert look_up(cache, "7", events_of("a", 2)) == ("hit", 10)
    assert leased is not None
    assert cache.pool.num_free == 1


def test_a_growing_history_evicts_others_and_not_itself() -> None:
    cache = make_cache(4)
    put_and_release(cache, "7", "a", 2)
    put_and_release(cache, "8", "b", 2)
    grown = grow(cache, "7", [*events_of("a", 2), *range(10)])
    assert grown is not None
    assert state_of(cache) == (["7"], 0)


class Refusing(LruPolicy):
    """Admits every user once and then never again."""

    def put(self, key: str, num_bytes: int) -> list[str]:
        if key in self._bytes_by_key:
            self.remove(key)
            return [key]
        return super().put(key, num_bytes)


def test_the_base_of_a_history_that_is_not_admitted_stays_leased() -> None:
    """Its pages were freed while its reader still had to read them."""
    pool = make_cache(4).pool
    cache = KVCache(pool, policy=Refusing(pool.capacity_bytes))
    put_and_release(cache, "7", "a", 2)
    put_and_release(cache, "8", "b", 2)
    base = cache.lookup("7", history_of(events_of("a", 2))).entry
    assert base is not None
    longer = [*events_of("a", 2), *range(5)]
    assert (
        cache.put("7", history_of(longer).content, kv_of(longer)[:, 10:], base=base, num_kept=10)
        is None
    )
    assert has_kv_of(cache, base, events_of("a", 2))
    cache.release(base)
    assert pool.num_free == 2


# Eviction, leases, counts.


def test_an_evicted_user_is_told_from_a_cold_one_until_it_is_put_again() -> None:
    cache = make_cache(3)
    put_and_release(cache, "7", "a", 2)
    put_and_release(cache, "8", "b", 2)
    assert look_up(cache, "7", events_of("a", 2))[0] == "evicted"
    put_and_release(cache, "7", "a", 1)
    assert look_up(cache, "7", events_of("a", 1))[0] == "hit"


def test_the_least_recently_used_user_goes_first() -> None:
    cache = make_cache(6)
    for user_id in "abc":
        put_and_release(cache, user_id, user_id, 2)
    found = cache.lookup("a", history_of(events_of("a", 2))).entry
    assert found is not None
    cache.release(found)
    put_and_release(cache, "d", "d", 2)
    assert state_of(cache) == (["c", "a", "d"], 0)
    put_and_release(cache, "e", "e", 3)
    assert state_of(cache) == (["d", "e"], 1)
    assert counted(cache, "evictions") == 3


def test_a_replaced_history_gives_its_pages_back() -> None:
    cache = make_cache(4)
    put_and_release(cache, "7", "a", 3)
    put_and_release(cache, "7", "b", 4)
    assert state_of(cache) == (["7"], 0)
    assert counted(cache, "evictions") == 0
    assert cache.held_bytes == 4 * PAGE_BYTES


def test_leases_outlive_replacement() -> None:
    cache = make_cache(5)
    old = put(cache, "7", "a", 2)
    new = put(cache, "7", "b", 3)
    assert old is not None
    assert new is not None
    assert has_kv_of(cache, old, events_of("a", 2))
    assert cache.pool.num_free == 0
    cache.release(old)
    assert cache.pool.num_free == 2
    assert has_kv_of(cache, new, events_of("b", 3))


def test_leases_outlive_being_forgotten() -> None:
    cache = make_cache(3)
    entry = put(cache, "7", "a", 2)
    assert entry is not None
    assert cache.forget("7") == 2 * PAGE_BYTES
    assert look_up(cache, "7", events_of("a", 2))[0] == "cold"
    assert put(cache, "8", "b", 2) is None
    assert has_kv_of(cache, entry, events_of("a", 2))
    cache.release(entry)
    assert cache.pool.num_free == 3


def test_a_leased_entry_is_not_evicted() -> None:
    cache = make_cache(4)
    leased = put(cache, "a", "a", 2)
    put_and_release(cache, "b", "b", 2)
    put_and_release(cache, "c", "c", 2)
    assert state_of(cache) == (["a", "c"], 0)
    assert leased is not None
    assert has_kv_of(cache, leased, events_of("a", 2))


def test_a_put_that_does_not_fit_changes_nothing() -> None:
    cache = make_cache(5)
    leased = put(cache, "a", "a", 2)
    put_and_release(cache, "b", "b", 1)
    put_and_release(cache, "c", "c", 2)
    before = state_of(cache)
    assert put(cache, "d", "d", 4) is None
    assert put(cache, "b", "x", 4) is None
    assert put(cache, "a", "x", 4) is None
    assert state_of(cache) == before
    assert counted(cache, "evictions") == 0
    assert counted(cache, "not_kept") == 3
    assert leased is not None
    assert has_kv_of(cache, leased, events_of("a", 2))
    assert look_up(cache, "b", events_of("b", 1))[0] == "hit"


def test_a_history_of_the_whole_pool_fits_and_one_page_more_does_not() -> None:
    cache = make_cache(3)
    put_and_release(cache, "a", "a", 1)
    put_and_release(cache, "b", "b", 3)
    assert put(cache, "c", "c", 4) is None
    assert look_up(cache, "b", events_of("b", 3))[0] == "hit"


def test_forgetting_a_user_leaves_nothing_of_it() -> None:
    cache = make_cache(3)
    put_and_release(cache, "a", "a", 2)
    put_and_release(cache, "b", "b", 3)
    assert cache.forget("a") == 0  # already evicted; now that is forgotten too
    assert look_up(cache, "a", events_of("a", 2))[0] == "cold"
    assert cache.forget("b") == 3 * PAGE_BYTES
    assert look_up(cache, "b", events_of("b", 3))[0] == "cold"
    assert state_of(cache) == ([], 3)


def test_evictions_are_remembered_of_so_many_users_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "MAX_REMEMBERED", 2)
    cache = make_cache(1)
    for user_id in "abcd":
        put_and_release(cache, user_id, user_id, 1)
    reasons = [look_up(cache, user_id, events_of(user_id, 1))[0] for user_id in "abcd"]
    assert reasons == ["cold", "evicted", "evicted", "hit"]


def test_who_was_evicted_or_forgotten_is_remembered_in_few_bytes() -> None:
    """Whole ids were kept, which may be as long as a message."""
    cache = make_cache(1)
    tracemalloc.start()
    try:
        for number in range(2_000):
            put_and_release(cache, f"{number:05}" + "😀" * 251, "a", 1)
        for number in range(2_000):
            cache.forget(f"{number:05}" + "😀" * 251)
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 2_000 * 500


def test_histories_without_events_are_bounded_in_number_too() -> None:
    """Entries without pages were never evicted: every user with an empty history was kept."""
    cache = make_cache(3)
    for number in range(50):
        put_and_release(cache, str(number), "a", 0)
    assert [number for number in range(50) if cache.contains(str(number))] == [47, 48, 49]


def test_every_lookup_is_counted_under_its_reason() -> None:
    cache = make_cache(2)
    put_and_release(cache, "a", "c", 2)
    for events in (events_of("c", 2), events_of("b", 2), events_of("a", 3), [1, 2, 3]):
        look_up(cache, "a", events)
    look_up(cache, "a", events_of("c", 3))
    look_up(cache, "z", events_of("a", 2))
    cache.lookup("a", history_of([1, 2, 3], first_event=1))
    expected = {"hit": 1, "edited": 2, "shrunk": 1, "cold": 2, "slid": 1}
    assert {reason: counted(cache, "lookups", outcome=reason) for reason in expected} == expected
    assert counted(cache, "lookups") == 7


# A user asks with one of three histories, maybe grown; a request ends; a user is forgotten.
steps = st.lists(
    st.tuples(st.just("come"), st.integers(0, 3), st.integers(0, 2), st.integers(0, 12))
    | st.tuples(st.just("end"), st.integers(0, 100), st.just(0), st.just(0))
    | st.tuples(st.just("forget"), st.integers(0, 3), st.just(0), st.just(0)),
    max_size=40,
)


def version_of(user: int, version: int, num_events: int) -> list[int]:
    """Histories of a user with a common prefix of 0, 6 or 12 events."""
    start = [100 * user + index for index in range(6 * version)]
    return [*start, *(1000 * (1 + version) + 100 * user + index for index in range(num_events + 1))]


@given(st.integers(1, 9), steps)
def test_random_traffic_keeps_leased_kv_intact_and_loses_no_page(
    num_pages: int, traffic: list[tuple[str, int, int, int]]
) -> None:
    cache = make_cache(num_pages)
    in_flight: list[tuple[Entry, list[int]]] = []
    events_by_entry: dict[int, list[int]] = {}
    for step, number, version, num_events in traffic:
        if step == "come":
            events = version_of(number, version, num_events)
            entry = grow(cache, str(number), events)
            if entry is not None:
                events_by_entry[id(entry)] = events
                in_flight.append((entry, events))
        elif step == "forget":
            cache.forget(str(number))
        elif in_flight:
            cache.release(in_flight.pop(number % len(in_flight))[0])
        kept = list(cache._entry_by_user.values())
        alive = {id(entry): entry for entry in [*kept, *(one for one, _ in in_flight)]}
        held = [page for entry in alive.values() for page in entry.pages]
        assert len(set(held)) == len(held) == num_pages - cache.pool.num_free
        assert all(has_kv_of(cache, entry, events) for entry, events in in_flight)
        assert all(has_kv_of(cache, entry, events_by_entry[id(entry)]) for entry in kept)
    for entry, _ in in_flight:
        cache.release(entry)
    for number in range(4):
        cache.forget(str(number))
    assert cache.pool.num_free == num_pages


def test_threads_that_hammer_one_cache_read_only_what_they_asked_for() -> None:
    cache = make_cache(20)
    stop = time.monotonic() + HAMMER_SECONDS
    wrong: list[str] = []
    rounds = [0] * 4

    def hammer(index: int) -> None:
        rng = random.Random(index)
        while time.monotonic() < stop and not wrong:
            user, version = rng.randrange(6), rng.randrange(3)
            events = version_of(user, version, rng.randrange(9))
            entry = grow(cache, str(user), events)
            if entry is not None:
                if not has_kv_of(cache, entry, events):
                    wrong.append(f"user {user}, version {version}")
                cache.release(entry)
            if rng.random() < 0.05:
                cache.forget(str(user))
            rounds[index] += 1

    threads = [threading.Thread(target=hammer, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(rounds) > 10
    kept = cache._entry_by_user.values()
    assert all(entry.num_leases == 0 and not entry.dropped for entry in kept)
    assert sum(len(entry.pages) for entry in kept) == 20 - cache.pool.num_free


def test_kv_of_another_model_is_refused_before_anything_changed() -> None:
    """It failed while copying, when other entries were already evicted and pages allocated."""
    cache = make_cache(3)
    put_and_release(cache, "7", "a", 2)
    held = cache.held_bytes
    with pytest.raises(ShapeError, match=r"K/V is \[2, 30, 4, 4\]; the pool holds"):
        cache.put("8", history_of(range(30)).content, torch.zeros(2, 30, 4, 4))
    assert cache.held_bytes == held
    assert look_up(cache, "7", events_of("a", 2)) == ("hit", 10)
