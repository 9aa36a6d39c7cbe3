"""What every tier promises, and what the host tier does besides."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cache.servers import RedisServer
from tests.worlds import new_interpreter
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.tiers import Fences, Found, HostTier, Tier, check_ttl
from torchrec_kvshare.errors import ConfigError

TTL_S = 600.0
CAPACITY_BYTES = 64 * 2**20
# A store with its own clock refuses more: the time that it takes to ask for its time.
FENCE_MARGIN_S = 0.5
MODEL_A, MODEL_B = "aa11-bb22", "aa11-cc33"
SCOPE_A, SCOPE_B = f"{MODEL_A}.none.clicks%3A%20a%2Fb.8.int8", f"{MODEL_B}.none.history.8.raw"

_numbers = count()


@pytest.fixture(scope="module", params=["host", "disk", "remote"])
def tier(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tier]:
    """One server for all tests of its kind, which use different users."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "host":
        yield HostTier(LruPolicy(CAPACITY_BYTES), TTL_S)
    elif request.param == "disk":
        disk = DiskTier(folder, CAPACITY_BYTES, TTL_S)
        yield disk
        disk.close()
    else:
        with RedisServer(folder) as server:
            remote = RemoteTier(server.url, TTL_S, timeout_s=5.0)
            yield remote
            remote.close()


def new_user() -> str:
    return f"{next(_numbers):032x}"


def new_model() -> str:
    return f"{next(_numbers):04x}-bb22"


def now() -> float:
    return time.time()


def value_of(tier: Tier, user: str, scope: str) -> bytes | None:
    [found] = tier.get([(user, scope)])
    return found.value


# What every tier promises.


def test_a_value_comes_back_as_it_was_put(tier: Tier) -> None:
    user = new_user()
    assert tier.get([(user, SCOPE_A)]) == [Found(None, ())]
    assert tier.put(user, SCOPE_A, b"\x00\xff\r\n$-1", now())
    assert value_of(tier, user, SCOPE_A) == b"\x00\xff\r\n$-1"


@pytest.mark.parametrize("num_bytes", [0, 1, 5_000_000, 5 * 2**20])
def test_values_of_any_size_are_kept(tier: Tier, num_bytes: int) -> None:
    user = new_user()
    value = random.randbytes(num_bytes)
    assert tier.put(user, SCOPE_A, value, now())
    assert value_of(tier, user, SCOPE_A) == value
    assert tier.forget(user, now()) == num_bytes


def test_a_value_takes_the_place_of_the_one_before(tier: Tier) -> None:
    user = new_user()
    tier.put(user, SCOPE_A, b"before", now())
    tier.put(user, SCOPE_A, b"after", now())
    assert value_of(tier, user, SCOPE_A) == b"after"
    assert tier.forget(user, now()) == len(b"after")


def test_many_keys_are_answered_in_their_order(tier: Tier) -> None:
    one, other, unknown = new_user(), new_user(), new_user()
    tier.put(one, SCOPE_A, b"one a", now())
    tier.put(one, SCOPE_B, b"one b", now())
    tier.put(other, SCOPE_B, b"other b", now())
    keys = [
        (other, SCOPE_B),
        (unknown, SCOPE_A),
        (one, SCOPE_A),
        (other, SCOPE_A),
        (one, SCOPE_B),
        (one, SCOPE_A),
    ]
    values = [found.value for found in tier.get(keys)]
    assert values == [b"other b", None, b"one a", None, b"one b", b"one a"]
    assert tier.get([]) == []


def test_what_else_is_kept_of_a_user_is_told_where_there_is_no_value(tier: Tier) -> None:
    user, other = new_user(), new_user()
    scopes = sorted([SCOPE_B, f"{MODEL_B}.none.history.8.int8"])
    for scope in scopes:
        tier.put(user, scope, b"kept", now())
    tier.put(other, SCOPE_A, b"kept", now())
    assert tier.get([(user, SCOPE_A)]) == [Found(None, tuple(scopes))]


def test_a_user_is_not_taken_for_one_whose_digits_begin_alike(tier: Tier) -> None:
    user = new_user()
    tier.put(user, SCOPE_A, b"kept", now())
    assert tier.get([(user[:-1], SCOPE_A)]) == [Found(None, ())]
    assert tier.forget(user[:-1], now()) == 0
    assert value_of(tier, user, SCOPE_A) == b"kept"


def test_a_forgotten_user_is_gone_in_every_scope_and_nobody_else_is(tier: Tier) -> None:
    user, other = new_user(), new_user()
    for scope in (SCOPE_A, SCOPE_B):
        tier.put(user, scope, b"12345", now())
        tier.put(other, scope, b"67", now())
    assert tier.forget(user, now()) == 10
    assert tier.get([(user, SCOPE_A), (user, SCOPE_B)]) == [Found(None, ()), Found(None, ())]
    assert value_of(tier, other, SCOPE_B) == b"67"
    assert tier.forget(user, now()) == 0


def test_what_was_encoded_before_a_user_was_forgotten_is_refused(tier: Tier) -> None:
    user = new_user()
    at = now()
    tier.forget(user, at)
    assert not tier.put(user, SCOPE_A, b"late", at - 1.0)
    assert not tier.put(user, SCOPE_A, b"late", at)
    assert tier.get([(user, SCOPE_A)]) == [Found(None, ())]
    assert tier.put(user, SCOPE_A, b"new", at + FENCE_MARGIN_S)
    assert value_of(tier, user, SCOPE_A) == b"new"


def test_an_earlier_fence_does_not_take_the_place_of_a_later_one(tier: Tier) -> None:
    user = new_user()
    at = now()
    tier.forget(user, at)
    tier.forget(user, at - 5.0)
    assert not tier.put(user, SCOPE_A, b"late", at - 1.0)


def test_forgetting_drops_also_what_a_fast_clock_has_dated_later(tier: Tier) -> None:
    user = new_user()
    tier.put(user, SCOPE_A, b"from the future", now() + 60.0)
    assert tier.forget(user, now()) == len(b"from the future")
    assert value_of(tier, user, SCOPE_A) is None


def test_what_is_older_than_the_time_to_live_is_not_kept(tier: Tier) -> None:
    user = new_user()
    assert tier.put(user, SCOPE_A, b"old", now() - TTL_S - 1.0)
    assert tier.get([(user, SCOPE_A)]) == [Found(None, ())]


def test_clearing_drops_one_version_alone(tier: Tier) -> None:
    user, other = new_user(), new_user()
    model = new_model()
    tier.put(user, f"{model}.none.history.8.int8", b"123", now())
    tier.put(user, f"{model}.none.history.8.raw", b"4567", now())
    tier.put(other, f"{model}.none.history.8.raw", b"89", now())
    # Versions with a common prefix, and the same text later in the scope.
    kept = sorted([f"{model}3.none.history.8.raw", f"x.{model}.none.history.8.raw"])
    for scope in kept:
        tier.put(user, scope, b"kept", now())
    assert tier.clear(model) == 9
    assert tier.get([(user, f"{model}.none.history.8.raw")]) == [Found(None, tuple(kept))]
    assert tier.get([(other, f"{model}.none.history.8.raw")]) == [Found(None, ())]
    assert tier.clear(model) == 0
    assert tier.put(user, f"{model}.none.history.8.raw", b"again", now())
    assert value_of(tier, user, f"{model}.none.history.8.raw") == b"again"


@pytest.mark.parametrize("version", ["a*-b", "a?-b", "a[b]-c", r"a\-b", "a%-b", "a^-b"])
def test_a_version_is_no_pattern(tier: Tier, version: str) -> None:
    user = new_user()
    tier.put(user, f"{version}.none.history.8.raw", b"this", now())
    tier.put(user, "axx-b.none.history.8.raw", b"other", now())
    tier.put(user, "ab-c.none.history.8.raw", b"other", now())
    assert tier.clear(version) == len(b"this")
    assert tier.forget(user, now()) == 2 * len(b"other")


def test_what_is_held_is_counted(tier: Tier) -> None:
    tier.put(new_user(), SCOPE_A, random.randbytes(3_000_000), now())
    assert tier.held_bytes() >= 3_000_000


def test_a_value_on_its_way_never_survives_that_its_user_is_forgotten(tier: Tier) -> None:
    """Whatever the order of put and forget, no K/V encoded before ``forget`` is left."""
    users = [new_user() for _ in range(50)]
    encoded_at = now()
    start = threading.Barrier(2)

    def put_all() -> None:
        for user in users:
            start.wait()
            tier.put(user, SCOPE_A, b"late", encoded_at)

    writer = threading.Thread(target=put_all)
    writer.start()
    for user in users:
        start.wait()
        tier.forget(user, encoded_at)
    writer.join()
    assert tier.get([(user, SCOPE_A) for user in users]) == [Found(None, ())] * len(users)


def test_threads_do_not_get_each_others_values(tier: Tier) -> None:
    users = [new_user() for _ in range(4)]
    wrong = []

    def use(user: str) -> None:
        for number in range(100):
            value = f"{user} {number}".encode()
            tier.put(user, SCOPE_A, value, now())
            if value_of(tier, user, SCOPE_A) != value:
                wrong.append((user, number))

    threads = [threading.Thread(target=use, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


USERS = st.sampled_from(["0", "1", "2"])
SCOPES = st.sampled_from(["m-s.none.a", "m-s.none.b", "m-t.none.a", "n-t.none.a"])
TIMES = st.integers(-5, 5)
PUTS = st.tuples(st.just("put"), USERS, SCOPES, st.binary(max_size=3), TIMES)
FORGETS = st.tuples(st.just("forget"), USERS, TIMES)
CLEARS = st.tuples(st.just("clear"), st.sampled_from(["m-s", "m-t", "n-t"]))


@given(steps=st.lists(st.one_of(PUTS, FORGETS, CLEARS), max_size=12))
def test_a_tier_equals_a_dictionary(tier: Tier, steps: list[tuple[Any, ...]]) -> None:
    """A model of all methods, as simple as possible."""
    example = f"{next(_numbers):08x}"
    start = float(int(now()))
    kept: dict[tuple[str, str], bytes] = {}
    fences: dict[str, float] = {}
    for name, *arguments in steps:
        if name == "put":
            user, scope, value, seconds = arguments
            is_late = fences.get(user, -math.inf) >= start + seconds
            if not is_late:
                kept[user, scope] = value
            scope = f"{example}{scope}"
            assert tier.put(example + user, scope, value, start + seconds) == (not is_late)
        elif name == "forget":
            user, seconds = arguments
            dropped = [key for key in kept if key[0] == user]
            num_bytes = sum(len(kept.pop(key)) for key in dropped)
            fences[user] = max(fences.get(user, -math.inf), start + seconds)
            assert tier.forget(example + user, start + seconds) == num_bytes
        else:
            [version] = arguments
            dropped = [key for key in kept if key[1].startswith(f"{version}.")]
            num_bytes = sum(len(kept.pop(key)) for key in dropped)
            assert tier.clear(f"{example}{version}") == num_bytes
    for user in ("0", "1", "2"):
        scopes = {
            f"{example}{scope}": value for (owner, scope), value in kept.items() if owner == user
        }
        found = tier.get([(example + user, scope) for scope in [*scopes, f"{example}absent"]])
        assert [each.value for each in found[:-1]] == list(scopes.values())
        assert found[-1] == Found(None, tuple(sorted(scopes)))


# What is the same for all and needs no store.


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, math.inf, math.nan])
def test_a_time_to_live_must_end(ttl_s: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ttl_s is "):
        check_ttl(ttl_s)
    makers: list[Callable[[], Tier]] = [
        lambda: HostTier(LruPolicy(9), ttl_s),
        lambda: DiskTier(tmp_path, CAPACITY_BYTES, ttl_s),
        lambda: RemoteTier("redis://127.0.0.1", ttl_s, timeout_s=1.0),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="ttl_s is "):
            make()


def test_no_store_is_imported_before_it_is_used() -> None:
    program = """
import sys
import torchrec_kvshare.cache.disk, torchrec_kvshare.cache.remote, torchrec_kvshare.cache.tiers
print([name for name in ("rocksdict", "redis", "moka_py") if name in sys.modules])
"""
    output, errors = new_interpreter(program).communicate()
    assert output == "[]\n", errors


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_fences_are_dropped_when_they_do_not_matter_any_more() -> None:
    clock = Clock()
    fences = Fences(60.0, clock)
    assert fences.put("7", 1000.0) == 1000.0
    clock.now += 30.0
    fences.put("8", 1030.0)
    assert fences.put("7", 1010.0) == 1010.0  # after 8 now, though it expires earlier
    assert fences.put("7", 1005.0) == 1010.0
    clock.now = 1071.0
    assert fences.pop_expired() == []
    clock.now = 1091.0
    assert fences.pop_expired() == ["8", "7"]
    assert fences.at_by_user == {}


# The host tier.


class Left:
    """The calls of an ``on_evict``."""

    def __init__(self) -> None:
        self.values: list[tuple[str, str, bytes]] = []

    def __call__(self, user: str, scope: str, value: bytes) -> None:
        self.values.append((user, scope, value))


def host_tier(capacity_bytes: int) -> tuple[HostTier, Left]:
    left = Left()
    return HostTier(LruPolicy(capacity_bytes), TTL_S, lambda: 1000.0, left), left


def test_the_least_recently_used_values_leave_and_are_handed_on() -> None:
    tier, left = host_tier(10)
    tier.put("7", "m-t.a", b"1234", 1000.0)
    tier.put("8", "m-t.a", b"5678", 1000.0)
    tier.get([("7", "m-t.a")])
    tier.put("9", "m-t.a", b"90", 1000.0)
    assert (left.values, tier.held_bytes()) == ([], 10)
    tier.put("9", "m-t.b", b"1234", 1000.0)
    assert (left.values, tier.held_bytes()) == ([("8", "m-t.a", b"5678")], 10)


def test_what_is_not_admitted_is_handed_on_and_nothing_else_leaves() -> None:
    tier, left = host_tier(10)
    tier.put("7", "m-t.a", b"1234", 1000.0)
    assert tier.put("8", "m-t.a", b"12345678901", 1000.0)
    assert left.values == [("8", "m-t.a", b"12345678901")]
    assert tier.held_bytes() == 4
    # The value that it should replace is outdated, so it is gone too.
    assert tier.put("7", "m-t.a", b"12345678901", 1000.0)
    assert (left.values[1:], tier.held_bytes()) == ([("7", "m-t.a", b"12345678901")], 0)
    assert tier.get([("7", "m-t.a")]) == [Found(None, ())]


def test_what_is_replaced_forgotten_or_cleared_is_handed_to_nobody() -> None:
    tier, left = host_tier(10)
    tier.put("7", "m-t.a", b"1234", 1000.0)
    tier.put("7", "m-t.a", b"567890", 1000.0)
    tier.forget("7", 1000.0)
    tier.put("8", "m-t.a", b"1234", 1000.0)
    tier.clear("m-t")
    tier.put("9", "m-t.a", b"1234567890", 1000.0)
    assert (left.values, tier.held_bytes()) == ([], 10)


def test_what_leaves_is_handed_on_outside_of_the_lock() -> None:
    tier, _ = host_tier(4)
    asked = []

    def ask_in_another_thread(user: str, scope: str, value: bytes) -> None:
        thread = threading.Thread(target=lambda: asked.append(tier.get([("8", "m-t.a")])))
        thread.start()
        thread.join(timeout=10.0)

    tier = HostTier(LruPolicy(4), TTL_S, lambda: 1000.0, ask_in_another_thread)
    tier.put("7", "m-t.a", b"1234", 1000.0)
    tier.put("8", "m-t.a", b"5678", 1000.0)
    assert asked == [[Found(b"5678", ())]]


def test_threads_never_push_the_host_tier_over_its_capacity() -> None:
    tier, left = host_tier(1000)
    most = []

    def put_some(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            user, value = str(draw.randrange(20)), draw.randbytes(draw.randrange(400))
            tier.put(user, f"m-t.{draw.randrange(3)}", value, 1000.0)
            most.append(tier.held_bytes())
            if draw.random() < 0.1:
                tier.forget(user, 0.0)

    threads = [threading.Thread(target=put_some, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 1000
    scopes = [(str(user), f"m-t.{scope}") for user in range(20) for scope in range(3)]
    assert sum(len(found.value or b"") for found in tier.get(scopes)) == tier.held_bytes()
    assert left.values


def test_a_closed_host_tier_holds_nothing() -> None:
    tier, left = host_tier(10)
    tier.put("7", "m-t.a", b"1234", 1000.0)
    tier.close()
    assert (tier.held_bytes(), left.values) == (0, [])
