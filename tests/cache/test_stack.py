"""What the tiers below the pages find, write, drop and forget, whatever one of them does."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tests.worlds import HEAD_DIM, NUM_HEADS, NUM_PLANES, PAGE_BYTES, PAGE_SIZE
from torchrec_kvshare.cache import stack as stack_module
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.identity import (
    NO_CONTEXT,
    Identity,
    ModelVersion,
    PrefixDigests,
    identity_of,
    text_digest,
)
from torchrec_kvshare.cache.kv_cache import Entry, KVCache, Lookup
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.record import KVRecord, pack, scope_of
from torchrec_kvshare.cache.stack import Fetched, Level, MissingKV, TierLimits, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import Found, HostTier
from torchrec_kvshare.errors import ConfigError, TierError
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import HISTORY, ITEM, TIME, FeatureSchema, History, Window

MODEL, TABLES, CONTEXT = "5e" * 8, "0f" * 8, "c1" * 8
OTHER_TABLES = "1f" * 8
VERSION, OTHER_VERSION = f"{MODEL}-{TABLES}", f"{MODEL}-{OTHER_TABLES}"
IDENTITY = identity_of(ModelVersion(MODEL, TABLES), NO_CONTEXT, HISTORY, PAGE_SIZE)
EDITS = 10**6  # numbers from here on are edits of earlier events
BARE = FeatureSchema({}, histories=(History(HISTORY, Window(100, 5)),))
FLOAT32, INT8 = get_codec("float32"), get_codec("int8")
TTL_S = 600.0
PATIENCE_S = 20.0  # timeout of what ends at once if the code is right
MARGIN_S = 2.0  # a thread may take this long to wake up on a busy machine


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A call signals that it was reached, and waits until the test opens the gate."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)


def do_nothing() -> None:
    pass


def fail() -> None:
    raise TierError("down")


class DictTier:
    """A tier in a dictionary, with hooks for tests."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.value_by_key: dict[tuple[str, str], bytes] = {}
        self.forgotten_at: dict[str, float] = {}
        self.asked: list[list[tuple[str, str]]] = []
        self.num_puts = 0
        self.before_get: Callable[[], None] = do_nothing
        self.after_get: Callable[[], None] = do_nothing
        self.before_put: Callable[[], None] = do_nothing
        self.before_forget: Callable[[], None] = do_nothing
        self.lie: Callable[[bytes], bytes] = bytes

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        self.asked.append([*keys])
        self.before_get()
        found = [self._get(*key) for key in keys]
        self.after_get()
        return found

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        self.before_put()
        self.num_puts += 1
        if encoded_at <= self.forgotten_at.get(user, 0.0):
            return False
        self.value_by_key[user, scope] = value
        return True

    def forget(self, user: str, at: float) -> int:
        self.before_forget()
        self.forgotten_at[user] = at
        return self._drop(lambda key: key[0] == user)

    def clear(self, version: str) -> int:
        self.before_forget()
        return self._drop(lambda key: key[1].startswith(f"{version}."))

    def held_bytes(self) -> int:
        return sum(map(len, self.value_by_key.values()))

    def close(self) -> None:
        pass

    def _get(self, user: str, scope: str) -> Found:
        value = self.value_by_key.get((user, scope))
        others = (key for owner, key in self.value_by_key if owner == user and key != scope)
        return Found(None if value is None else self.lie(value), tuple(sorted(others)))

    def _drop(self, leaves: Callable[[tuple[str, str]], bool]) -> int:
        left = [key for key in self.value_by_key if leaves(key)]
        return sum(len(self.value_by_key.pop(key)) for key in left)


class World:
    """A stack, the pages above it, and their common clock."""

    def __init__(
        self,
        *levels: Level,
        num_pages: int = 20,
        num_pages_at_rest: int | None = None,
        key: bytes | None = None,
        limits: TierLimits | None = None,
    ) -> None:
        self.clock = Clock()
        self.stack = TierStack(levels, TTL_S, key, limits=limits or TierLimits(), clock=self.clock)
        pool = PagePool(
            num_pages * PAGE_BYTES,
            PAGE_SIZE,
            num_planes=NUM_PLANES,
            num_heads=NUM_HEADS,
            head_dim=HEAD_DIM,
        )
        at_rest = LruPolicy((num_pages_at_rest or num_pages) * PAGE_BYTES)
        self.cache = KVCache(
            pool,
            policy=at_rest,
            clock=self.clock,
            on_evict=self.stack.demote,
            metrics=self.stack.metrics,
        )
        self.store = KVStore([self.cache], self.stack)

    def put(self, user: str, history: PrefixDigests, kv: Tensor | None = None) -> None:
        """Keep and publish a history as the engine does: extend its cached prefix."""
        lookup = self.cache.lookup(user, history)
        num_kept = 0 if kv is not None else lookup.num_matched
        rows = kv_of(history) if kv is None else kv
        entry = self.store.put(
            0, user, history.content, rows[:, num_kept:], lookup=lookup, num_kept=num_kept
        )
        for leased in (entry, lookup.entry):
            if leased is not None:
                self.cache.release(leased)

    def write(self, user: str, *histories: PrefixDigests) -> None:
        """Publish histories, then clear the pages."""
        for history in histories:
            self.put(user, history)
            self.drain()
            self.cache.clear(history.identity.kv_version)

    def fetch(self, user: str, history: PrefixDigests, num_matched: int = 0) -> Fetched:
        [fetched] = self.stack.fetch([missing_of(user, history, num_matched)])
        return fetched

    def drain(self) -> None:
        assert self.stack.drain(PATIENCE_S)

    def counted(self, name: str, **labels: str) -> float:
        return self.stack.metrics.snapshot().value(name, **labels)


NewWorld = Callable[..., World]


@pytest.fixture
def new_world() -> Iterator[NewWorld]:
    """Makes worlds whose threads end with the test."""
    worlds: list[World] = []

    def new(*tiers: Level | DictTier | HostTier, **options: object) -> World:
        levels = [tier if isinstance(tier, Level) else Level(tier, FLOAT32) for tier in tiers]
        worlds.append(World(*levels, **options))  # type: ignore[arg-type]
        return worlds[-1]

    yield new
    for world in worlds:
        world.stack.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def history_of(events: Sequence[int], identity: Identity = IDENTITY) -> PrefixDigests:
    """A history of events by number; the number is also the time, unless the order forbids it."""
    times = [*accumulate((event % EDITS for event in events), max)]
    columns = {ITEM: torch.tensor(events), TIME: torch.tensor(times)}
    return PrefixDigests(Events(columns, {}, 0), BARE, identity)


def first(num_events: int, identity: Identity = IDENTITY) -> PrefixDigests:
    """A history of so many events; a shorter one is a prefix of a longer one."""
    return history_of(range(num_events), identity)


def missing_of(user: str, history: PrefixDigests, num_matched: int = 0) -> MissingKV:
    """What an engine asks for if its encoder has one row per event."""
    return MissingKV(user, history, num_matched, int)


def kv_of(history: PrefixDigests) -> Tensor:
    """K/V whose values are the numbers of its events."""
    times = torch.arange(history.num_events) + history._parts[0][0, 0]
    return times.float()[:, None, None].expand(NUM_PLANES, -1, NUM_HEADS, HEAD_DIM)


def host_tier(clock: Clock | None = None, capacity_bytes: int = 10**6) -> HostTier:
    return HostTier(LruPolicy(capacity_bytes), TTL_S, clock or Clock())


def key_of(user: str, identity: Identity = IDENTITY, codec: str = "float32") -> tuple[str, str]:
    return text_digest(user), scope_of(identity, codec)


# Looking up.


def test_a_tier_behind_a_full_match_is_not_asked(new_world: NewWorld) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(near, far)
    world.write("7", first(11))
    fetched = world.fetch("7", first(11))
    assert (fetched.reason, fetched.num_matched, fetched.tier) == ("hit", 11, "near")
    assert (len(near.asked), len(far.asked)) == (1, 0)


@pytest.mark.parametrize(("in_near", "in_far", "winner"), [(5, 11, "far"), (11, 5, "near")])
def test_the_longest_part_of_a_history_wins(
    new_world: NewWorld, in_near: int, in_far: int, winner: str
) -> None:
    near, far = DictTier("near"), DictTier("far")
    new_world(near).write("7", first(in_near))
    new_world(far).write("7", first(in_far))
    fetched = new_world(near, far).fetch("7", first(15))
    assert fetched.record is not None
    assert (fetched.tier, fetched.num_matched) == (winner, 11)
    assert fetched.record.content == first(11).content
    assert torch.equal(fetched.record.kv, kv_of(first(11)))
    assert (len(near.asked), len(far.asked)) == (1, 1)


def test_of_two_tiers_with_the_same_the_nearer_is_read(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"), DictTier("far"))
    world.write("7", first(11))
    fetched = world.fetch("7", first(15))
    assert (fetched.tier, fetched.reason, fetched.num_matched) == ("near", "cold", 11)
    assert world.counted("bytes", tier="far", direction="read") > 0


@pytest.mark.parametrize(("num_events", "num_matched"), [(15, 11), (20, 13)])
def test_kv_no_longer_than_that_in_pages_is_not_promoted(
    new_world: NewWorld, num_events: int, num_matched: int
) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.write("7", first(11))
    assert world.fetch("7", first(num_events), num_matched).record is None
    assert len(near.asked) == 1
    assert world.fetch("7", first(num_events), num_matched=10).num_matched == 11


@pytest.mark.parametrize(
    ("history", "reason", "num_matched"),
    [
        (history_of([*range(10), 99]), "edited", 10),
        (history_of([EDITS, *range(1, 13)]), "edited", 0),
        (history_of(range(1, 14)), "slid", 0),
        (first(7), "shrunk", 5),
        (history_of([EDITS, 0, *range(2, 11)]), "edited", 0),
    ],
)
def test_a_tier_gives_what_both_histories_begin_with_and_says_why_no_more(
    new_world: NewWorld, history: PrefixDigests, reason: str, num_matched: int
) -> None:
    world = new_world(DictTier("near"))
    world.write("7", first(11))
    fetched = world.fetch("7", history)
    assert (fetched.reason, fetched.num_matched) == (reason, num_matched)
    assert (fetched.record is None) == (num_matched == 0)


def test_many_histories_are_one_round_trip_and_those_found_go_no_further(
    new_world: NewWorld,
) -> None:
    near, far = DictTier("near"), DictTier("far")
    new_world(near).write("7", first(11))
    new_world(far).write("8", first(12))
    world = new_world(near, far)
    missing = [missing_of("7", first(11)), missing_of("8", first(12)), missing_of("9", first(13))]
    fetched = world.stack.fetch(missing)
    assert [one.tier for one in fetched] == ["near", "far", "none"]
    assert near.asked == [[key_of("7"), key_of("8"), key_of("9")]]
    assert far.asked == [[key_of("8"), key_of("9")]]


def test_without_missing_kv_no_tier_is_asked(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    assert world.stack.fetch([]) == []
    assert world.fetch("7", first(11), num_matched=11).record is None
    assert near.asked == []


def test_one_users_kv_is_not_that_of_another(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"))
    world.write("7", first(11))
    assert world.fetch("8", first(11)) == Fetched(None, "", 0, "none")


def test_every_look_up_is_counted_under_its_tier_and_outcome(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"), DictTier("far"))
    world.write("7", first(11))
    for history in (first(11), first(15), history_of([5, 6, 7])):
        world.fetch("7", history)
    outcomes = {"hit": 1, "cold": 1, "slid": 1}
    for outcome, number in outcomes.items():
        assert world.counted("lookups", tier="near", outcome=outcome) == number
    assert world.counted("lookups", tier="far") == 2
    value_bytes = len(world.stack.levels[0].tier.get([key_of("7")])[0].value or b"")
    assert world.counted("bytes", tier="near", direction="read") == 3 * value_bytes


# Short histories.


def test_a_tier_is_not_asked_for_fewer_events_than_are_worth_it(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(Level(near, FLOAT32, min_events=6))
    world.write("7", first(11))
    assert world.fetch("7", first(14), num_matched=9).record is None
    assert near.asked == []
    assert world.fetch("7", first(14), num_matched=8).num_matched == 11
    assert world.fetch("7", first(5)).record is None
    assert len(near.asked) == 1


def test_a_small_part_of_a_history_is_encoded_and_not_fetched(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.write("7", first(12))
    assert world.fetch("7", first(12), num_matched=10) == Fetched(None, "", 10, "none")
    assert near.asked == []
    assert world.fetch("7", first(12), num_matched=9).reason == "hit"


def test_what_a_nearer_tier_has_leaves_less_to_ask_for(new_world: NewWorld) -> None:
    near, far = DictTier("near"), DictTier("far")
    new_world(near).write("7", first(11))
    world = new_world(near, Level(far, FLOAT32, min_events=4))
    world.fetch("7", first(14))
    assert far.asked == []
    world.fetch("7", first(15))
    assert len(far.asked) == 1


def test_a_short_history_is_not_written(new_world: NewWorld) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(Level(near, FLOAT32, min_events=7), far)
    world.write("7", first(6))
    world.write("8", first(7))
    assert near.value_by_key.keys() == {key_of("8")}
    assert far.value_by_key.keys() == {key_of("7"), key_of("8")}
    assert world.counted("dropped_writes", tier="near", reason="too_short") == 1


# Faults.


def cut(value: bytes) -> bytes:
    return value[:-9]


def flipped(value: bytes) -> bytes:
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


corruptions = pytest.mark.parametrize(
    "lie",
    [cut, flipped, lambda _: b"", lambda _: b"KVSH garbage" * 9],
    ids=["cut", "flipped", "nothing", "garbage"],
)


@corruptions
def test_a_corrupt_value_is_counted_and_never_used(
    new_world: NewWorld, lie: Callable[[bytes], bytes]
) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.write("7", first(11))
    near.lie = lie
    assert world.fetch("7", first(11)) == Fetched(None, "tier_error", 0, "none")
    assert world.counted("tier_failures", tier="near", kind="corrupt") == 1
    assert world.counted("lookups", tier="near", outcome="tier_error") == 1


@pytest.mark.parametrize(
    "wrong_key", [key_of("8"), key_of("7", IDENTITY._replace(context=CONTEXT))], ids=str
)
def test_a_value_that_lies_under_a_wrong_key_is_corrupt(
    new_world: NewWorld, wrong_key: tuple[str, str]
) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.write("7", first(11))
    near.value_by_key[wrong_key] = near.value_by_key[key_of("7")]
    user = "8" if wrong_key == key_of("8") else "7"
    context = "" if user == "8" else CONTEXT
    fetched = world.fetch(user, first(11, IDENTITY._replace(context=context)))
    assert (fetched.record, fetched.reason) == (None, "tier_error")
    assert world.counted("tier_failures", tier="near", kind="corrupt") == 1


def test_kv_is_used_as_long_as_its_time_to_live_and_no_longer(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"))
    world.write("7", first(11))
    world.clock.now += TTL_S
    fetched = world.fetch("7", first(11))
    assert fetched.record is not None
    assert fetched.record.encoded_at == 1000.0
    world.clock.now += 0.001
    assert world.fetch("7", first(11)) == Fetched(None, "expired", 0, "none")


def test_kv_that_grew_is_as_old_as_its_oldest_part(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"))
    world.put("7", first(6))
    world.clock.now += TTL_S - 1.0
    world.put("7", first(16))
    world.drain()
    fetched = world.fetch("7", first(16))
    assert fetched.record is not None
    assert fetched.record.encoded_at == 1000.0
    world.clock.now += 2.0
    assert world.fetch("7", first(16)).reason == "expired"


def test_a_tier_that_is_down_is_a_miss_and_is_paused_for_a_while(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near, limits=TierLimits(max_failures=2, pause_s=7.0))
    world.write("7", first(11))
    near.before_get = fail
    for _ in range(4):
        assert world.fetch("7", first(11)) == Fetched(None, "tier_error", 0, "none")
    assert len(near.asked) == 2
    assert world.counted("breaker_open", tier="near") == 1.0
    assert world.counted("tier_failures", tier="near", kind="error") == 2
    assert world.counted("tier_failures", tier="near", kind="breaker_open") == 2
    near.before_get = do_nothing
    world.clock.now += 7.0
    assert world.fetch("7", first(11)).reason == "hit"
    assert world.counted("breaker_open", tier="near") == 0.0


def test_a_tier_that_hangs_costs_its_deadline(new_world: NewWorld, gate: Gate) -> None:
    near = DictTier("near")
    world = new_world(Level(near, FLOAT32, deadline_s=0.05))
    world.write("7", first(11))
    near.before_get = gate
    start = time.monotonic()
    assert world.fetch("7", first(11)) == Fetched(None, "deadline", 0, "none")
    assert time.monotonic() - start < 0.05 + MARGIN_S
    assert world.counted("tier_failures", tier="near", kind="deadline") == 1


@pytest.mark.parametrize("fault", ["down", "hangs", "lies", "empty", "expired"])
def test_behind_a_tier_that_fails_the_next_is_asked(
    new_world: NewWorld, gate: Gate, fault: str
) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(Level(near, FLOAT32, deadline_s=0.05 if fault == "hangs" else 5.0), far)
    world.write("7", first(11))
    if fault == "down":
        near.before_get = fail
    elif fault == "hangs":
        near.before_get = gate
    elif fault == "lies":
        near.lie = cut
    elif fault == "empty":
        near.value_by_key.clear()
    else:
        world.clock.now += TTL_S + 1.0
        near_value = near.value_by_key[key_of("7")]
        world.write("7", first(11))
        near.value_by_key[key_of("7")] = near_value
    fetched = world.fetch("7", first(11))
    assert fetched.record is not None
    assert (fetched.reason, fetched.num_matched, fetched.tier) == ("hit", 11, "far")


def test_a_tier_that_fails_does_not_take_away_what_a_nearer_one_had(new_world: NewWorld) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(near, far)
    world.write("7", first(11))
    far.before_get = fail
    fetched = world.fetch("7", first(15))
    assert len(far.asked) == 1
    assert (fetched.num_matched, fetched.tier) == (11, "near")
    assert fetched.record is not None


def test_a_tier_with_another_history_does_not_change_why_more_is_missing(
    new_world: NewWorld,
) -> None:
    """The nearer tier's K/V was used, but the answer had the farther tier's reason."""
    near, far = DictTier("near"), DictTier("far")
    new_world(near).write("7", first(11))
    new_world(far).write("7", history_of([EDITS, *range(1, 13)]))
    fetched = new_world(near, far).fetch("7", first(15))
    assert len(far.asked) == 1
    assert (fetched.tier, fetched.num_matched, fetched.reason) == ("near", 11, "cold")


# Reasons.

OTHERS = {
    "model": IDENTITY._replace(model="77" * 8),
    "tables": IDENTITY._replace(tables="88" * 8),
    "context": IDENTITY._replace(context=CONTEXT),
}


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (OTHERS["model"], "model"),
        (OTHERS["tables"], "tables"),
        (OTHERS["context"], "context"),
        (OTHERS["model"]._replace(tables="88" * 8, context=CONTEXT), "model"),
        (OTHERS["tables"]._replace(context=CONTEXT), "tables"),
        (IDENTITY._replace(tower="another"), ""),
    ],
)
def test_kv_of_another_identity_is_the_reason_of_a_miss(
    new_world: NewWorld, kept: Identity, reason: str
) -> None:
    world = new_world(DictTier("near"), DictTier("far"))
    world.write("7", first(11, kept))
    assert world.fetch("7", first(11)) == Fetched(None, reason, 0, "none")
    assert world.fetch("8", first(11)) == Fetched(None, "", 0, "none")


def test_kv_in_another_codec_is_the_reason_of_a_miss(new_world: NewWorld) -> None:
    near = DictTier("near")
    new_world(Level(near, INT8)).write("7", first(11))
    assert new_world(near).fetch("7", first(11)).reason == "codec"


def test_the_reason_is_what_keeps_a_user_from_the_kv_that_is_nearest(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    for reason in ("model", "tables", "context"):
        world.write("7", first(11, OTHERS[reason]))
        assert world.fetch("7", first(11)).reason == reason
    new_world(Level(near, INT8)).write("7", first(11))
    assert world.fetch("7", first(11)).reason == "codec"
    world.write("7", first(11))
    assert world.fetch("7", first(11)).reason == "hit"


def test_scopes_that_nobody_wrote_are_no_reason(new_world: NewWorld) -> None:
    near = DictTier("near")
    for scope in ("", "nonsense", f"{VERSION}.none.history.x.float32"):
        near.value_by_key[text_digest("7"), scope] = b"1"
    assert new_world(near).fetch("7", first(11)) == Fetched(None, "", 0, "none")


# Writing.


def test_kv_is_written_once_for_each_whole_block_that_it_grew_by(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    puts = []
    for num_events in range(3, 17):
        world.put("7", first(num_events))
        world.drain()
        puts.append(near.num_puts)
    assert puts == [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4]
    fetched = world.fetch("7", first(16))
    assert fetched.record is not None
    assert (fetched.num_matched, fetched.reason) == (15, "cold")
    assert torch.equal(fetched.record.kv, kv_of(first(15)))


def test_kv_that_came_from_a_tier_is_not_written_there_again(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.write("7", first(11))
    cold = world.cache.lookup("7", first(11))
    [lookup] = world.store.fetch([(0, missing_of("7", first(11)))], [cold])
    assert lookup.entry is not None
    assert (lookup.reason, lookup.tier) == ("hit", "near")
    world.stack.publish(world.cache, lookup.entry)
    world.store.release(0, lookup.entry)
    world.drain()
    assert near.num_puts == 1


def test_kv_that_came_from_a_tier_is_no_younger_in_pages(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"))
    world.write("7", first(11))
    cold = world.cache.lookup("7", first(11))
    world.clock.now += 100.0
    [lookup] = world.store.fetch([(0, missing_of("7", first(11)))], [cold])
    assert lookup.entry is not None
    assert (lookup.entry.encoded_at, lookup.entry.used_at) == (1000.0, 1100.0)
    world.store.release(0, lookup.entry)


def test_a_user_who_comes_once_is_not_written_where_that_is_asked_for(
    new_world: NewWorld,
) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(Level(near, FLOAT32, second_touch=True), far)
    world.write("7", first(11))
    world.write("8", first(11))
    assert (near.num_puts, far.num_puts) == (0, 2)
    assert world.counted("dropped_writes", tier="near", reason="first_touch") == 2
    world.write("7", first(11))
    assert near.value_by_key.keys() == {key_of("7")}
    assert world.counted("dropped_writes", tier="near", reason="first_touch") == 2


def test_users_who_came_are_remembered_up_to_a_number(
    new_world: NewWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_module, "MAX_TOUCHED", 2)
    near = DictTier("near")
    world = new_world(Level(near, FLOAT32, second_touch=True))
    for user in ("7", "8", "9", "7", "9"):
        world.write(user, first(11))
    assert near.value_by_key.keys() == {key_of("9")}


def test_kv_that_waits_to_be_written_is_not_overwritten(new_world: NewWorld, gate: Gate) -> None:
    """Its pages are freed only after the write, even if its user has other K/V by then."""
    near = DictTier("near")
    near.before_put = gate
    world = new_world(near, num_pages=4)
    world.put("6", first(5))
    assert gate.reached.wait(PATIENCE_S)  # Its K/V is packed already, so its pages may be freed.
    world.cache.forget("6")
    histories = {"7": first(8), "8": history_of(range(50, 58))}
    for user, history in histories.items():
        world.put(user, history)
        world.cache.forget(user)
    world.clock.now += 1.0
    for user in histories:
        world.put(user, history_of(range(90, 99)))
    assert world.counted("not_kept", tier="pages") == 2
    gate.opened.set()
    world.drain()
    assert world.cache.pool.num_free == 4
    for user, history in histories.items():
        fetched = world.fetch(user, history)
        assert fetched.record is not None
        assert torch.equal(fetched.record.kv, kv_of(history))


def random_kv(num_events: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_PLANES, num_events, NUM_HEADS, HEAD_DIM, generator=generator)


@pytest.mark.parametrize(
    ("num_pages", "at_rest"), [(3, 3), (6, 3)], ids=["pages wanted at once", "pages to spare"]
)
def test_evicted_kv_comes_back_from_the_host_with_the_same_bits(
    new_world: NewWorld, num_pages: int, at_rest: int
) -> None:
    clock = Clock()
    level = Level(host_tier(clock), FLOAT32, takes_evicted=True)
    world = new_world(level, num_pages=num_pages, num_pages_at_rest=at_rest)
    kv_by_user = {user: random_kv(11, seed) for seed, user in enumerate("789")}
    for user, kv in kv_by_user.items():
        world.put(user, first(11), kv)
    world.drain()
    assert world.cache.held_bytes == 3 * PAGE_BYTES
    for user in "78":
        fetched = world.fetch(user, first(11))
        assert fetched.record is not None
        assert (fetched.reason, fetched.tier) == ("hit", "host")
        assert torch.equal(fetched.record.kv, kv_by_user[user])
    assert world.fetch("9", first(11)).record is None


def test_evicted_kv_is_not_overwritten_while_it_waits(new_world: NewWorld, gate: Gate) -> None:
    near = DictTier("near")
    near.before_put = gate
    level = Level(near, FLOAT32, takes_evicted=True)
    world = new_world(level, num_pages=6, num_pages_at_rest=3)
    kv_by_user = {user: random_kv(11, seed) for seed, user in enumerate("6789")}
    for user, kv in kv_by_user.items():
        world.put(user, first(11), kv)
    gate.opened.set()
    world.drain()
    assert world.cache.pool.num_free == 3
    for user in "678":
        fetched = world.fetch(user, first(11))
        assert fetched.record is not None
        assert torch.equal(fetched.record.kv, kv_by_user[user])


def test_the_host_gets_evicted_kv_and_the_others_newly_encoded_kv(
    new_world: NewWorld,
) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(Level(near, FLOAT32, takes_evicted=True), far, num_pages=3)
    world.put("7", first(11))
    world.drain()
    assert (near.num_puts, far.num_puts) == (0, 1)
    world.put("8", first(11))
    world.drain()
    assert near.value_by_key.keys() == {key_of("7")}
    assert far.value_by_key.keys() == {key_of("7"), key_of("8")}


def test_without_a_tier_for_it_evicted_kv_is_gone(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(Level(near, FLOAT32, second_touch=True), num_pages=3)
    for user in ("7", "8", "9"):
        world.put(user, first(11))
    world.drain()
    assert world.counted("evictions", tier="pages") == 2
    assert near.num_puts == 0
    assert world.cache.held_bytes == 3 * PAGE_BYTES


def test_the_host_tier_stays_within_its_bytes(new_world: NewWorld) -> None:
    world = new_world(Level(host_tier(capacity_bytes=8000), FLOAT32))
    for user in range(9):
        world.write(str(user), first(3 + user))
        assert world.counted("held_bytes", tier="host") <= 8000
    assert world.fetch("8", first(11)).reason == "hit"
    assert world.fetch("2", first(5)).record is None


@pytest.mark.parametrize(
    "limits",
    [TierLimits(queue_length=2), TierLimits(queue_bytes=2 * 2200)],
    ids=["writes", "bytes"],
)
def test_what_a_queue_has_no_room_for_is_dropped_and_counted(
    new_world: NewWorld, gate: Gate, limits: TierLimits
) -> None:
    near = DictTier("near")
    near.before_put = gate
    world = new_world(near, limits=limits)
    world.put("7", first(11))  # 2112 bytes
    assert gate.reached.wait(PATIENCE_S)
    for user in ("8", "9", "10", "11"):
        world.put(user, first(11))
    assert world.counted("queue_length", tier="near") == 2
    assert world.counted("queue_bytes", tier="near") == 2 * 2112
    assert world.counted("dropped_writes", tier="near", reason="queue_full") == 2
    gate.opened.set()
    world.drain()
    assert near.value_by_key.keys() == {key_of("7"), key_of("8"), key_of("9")}
    assert world.counted("queue_length", tier="near") == 0
    for user in ("7", "8", "9", "10", "11"):
        world.cache.forget(user)
    assert world.cache.pool.num_free == 20


def test_kv_that_a_codec_cannot_write_is_dropped_and_counted(new_world: NewWorld) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(Level(near, INT8), far)
    kv = random_kv(11, 3)
    kv[1, 4, 2, 3] = torch.nan
    world.put("7", first(11), kv)
    world.drain()
    assert (near.num_puts, far.num_puts) == (0, 0)
    for tier in ("near", "far"):  # float32 too
        assert world.counted("dropped_writes", tier=tier, reason="not_finite") == 1


def test_a_tier_that_takes_no_writes_costs_nothing_but_those(new_world: NewWorld) -> None:
    near, far = DictTier("near"), DictTier("far")
    near.before_put = fail
    world = new_world(near, far, limits=TierLimits(max_failures=2))
    for user in ("7", "8", "9"):
        world.write(user, first(11))
    assert world.counted("dropped_writes", tier="near", reason="error") == 2
    assert world.counted("dropped_writes", tier="near", reason="breaker_open") == 1
    assert far.num_puts == 3
    assert world.cache.pool.num_free == 20


def test_draining_says_that_a_tier_still_writes(new_world: NewWorld, gate: Gate) -> None:
    near = DictTier("near")
    near.before_put = gate
    world = new_world(DictTier("far"), near)
    world.put("7", first(11))
    assert not world.stack.drain(0.02)
    gate.opened.set()
    assert world.stack.drain(PATIENCE_S)


def test_closing_writes_what_waits(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    for user in range(7):
        world.put(str(user), first(6 + user))
    world.stack.close()
    assert near.value_by_key.keys() == {key_of(str(user)) for user in range(7)}
    world.put("8", first(11))
    assert world.counted("dropped_writes", tier="near", reason="queue_full") == 1


# Forgetting.


def test_a_forgotten_user_is_gone_from_every_tier_and_nobody_else_is(new_world: NewWorld) -> None:
    far = DictTier("far")
    world = new_world(host_tier(), far)
    for user in ("7", "8"):
        world.write(user, first(11, OTHERS["model"]))
    for user in ("7", "8"):
        world.put(user, first(11))
    world.drain()
    below = far.held_bytes() // 2
    assert world.store.forget("7") == {"pages": 3 * PAGE_BYTES, "host": below, "far": below}
    assert world.cache.lookup("7", first(11)).reason == "cold"
    for identity in (IDENTITY, OTHERS["model"]):
        assert world.fetch("7", first(11, identity)) == Fetched(None, "", 0, "none")
        assert world.fetch("8", first(11, identity)).record is not None
    assert world.store.forget("7") == {"pages": 0, "host": 0, "far": 0}
    assert world.counted("forgotten_bytes", tier="far") == below
    assert world.counted("forgotten_bytes", tier="pages") == 3 * PAGE_BYTES


class GatedHost(HostTier):
    """A host tier whose writes wait at a gate."""

    gate = Gate()

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        self.gate()
        return super().put(user, scope, value, encoded_at)


@pytest.mark.parametrize("takes_evicted", [False, True])
def test_a_write_that_waits_does_not_bring_a_forgotten_user_back(
    new_world: NewWorld, gate: Gate, takes_evicted: bool
) -> None:
    host, near = GatedHost(LruPolicy(10**6), TTL_S, Clock()), DictTier("near")
    host.gate = near.before_put = gate
    levels = [Level(tier, FLOAT32, takes_evicted=takes_evicted) for tier in (host, near)]
    world = new_world(*levels, num_pages=9, num_pages_at_rest=6)
    for user in ("7", "8", "9"):
        world.put(user, first(11))
    assert gate.reached.wait(PATIENCE_S)
    world.store.forget("7")
    world.store.forget("8")
    gate.opened.set()
    world.drain()
    written = set() if takes_evicted else {key_of("9")}
    assert near.value_by_key.keys() == written
    assert host.held_bytes() == near.held_bytes()
    num_fenced = 1 if takes_evicted else 2
    assert world.counted("dropped_writes", tier="host", reason="fenced") == num_fenced
    for user in ("7", "8"):
        assert world.fetch(user, first(11)) == Fetched(None, "", 0, "none")


def test_an_encoding_under_way_does_not_bring_a_forgotten_user_back(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near, host_tier())
    lookup = world.cache.lookup("7", first(11))
    world.clock.now += 1.0
    world.store.forget("7")
    world.clock.now += 1.0
    kv = kv_of(first(11))
    assert world.store.put(0, "7", first(11).content, kv, lookup=lookup, num_kept=0) is None
    world.drain()
    assert (world.cache.held_bytes, near.num_puts) == (0, 0)
    world.put("7", first(11))
    world.drain()
    assert world.cache.held_bytes == 3 * PAGE_BYTES
    assert near.num_puts == 1


def test_kv_that_was_there_does_not_bring_a_forgotten_user_back_by_growing(
    new_world: NewWorld,
) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.put("7", first(11))
    lookup = world.cache.lookup("7", first(16))
    assert lookup.entry is not None
    world.clock.now += 1.0
    world.store.forget("7")
    rows = kv_of(first(16))[:, 11:]
    assert world.store.put(0, "7", first(16).content, rows, lookup=lookup, num_kept=11) is None
    world.cache.release(lookup.entry)
    world.drain()
    assert (world.cache.held_bytes, near.held_bytes()) == (0, 0)


def test_kv_that_a_tier_gave_out_does_not_bring_a_forgotten_user_back(
    new_world: NewWorld,
) -> None:
    near = DictTier("near")
    world = new_world(near)
    world.write("7", first(11))

    def forget() -> None:
        world.clock.now += 1.0
        world.store.forget("7")
        world.clock.now += 1.0

    near.after_get = forget
    cold = Lookup(None, "cold", 0, world.clock.now)
    assert world.store.fetch([(0, missing_of("7", first(11)))], [cold]) == [cold]
    assert (world.cache.held_bytes, near.held_bytes()) == (0, 0)


def date_ahead(tier: DictTier, world: World, user: str, by_s: float) -> None:
    """Store K/V as a machine writes it whose clock is ahead."""
    key = key_of(user)
    history = first(11)
    record = KVRecord(history.content, world.clock.now + by_s, kv_of(history).contiguous())
    tier.value_by_key[key] = pack(record, key[0], FLOAT32, None)


def test_kv_of_a_clock_that_runs_ahead_does_not_bring_a_forgotten_user_back(
    new_world: NewWorld,
) -> None:
    """Fetched while its user was forgotten, it had a later time than ``forget``, and was kept."""
    near = DictTier("near")
    world = new_world(near)
    date_ahead(near, world, "7", by_s=30.0)

    def forget() -> None:
        world.clock.now += 1.0
        world.store.forget("7")

    near.after_get = forget
    cold = world.cache.lookup("7", first(11))
    assert world.store.fetch([(0, missing_of("7", first(11)))], [cold]) == [cold]
    assert (world.cache.held_bytes, near.held_bytes()) == (0, 0)


def test_kv_promoted_while_its_user_is_forgotten_is_dropped_too(
    new_world: NewWorld,
) -> None:
    """Pages and host forgot first, and then got K/V of a clock that is ahead from the far tier."""
    far, host = DictTier("far"), host_tier()
    world = new_world(
        Level(host, FLOAT32, takes_evicted=True), far, num_pages=6, num_pages_at_rest=3
    )
    date_ahead(far, world, "7", by_s=30.0)

    def promote() -> None:
        far.before_forget = do_nothing
        world.clock.now += 1.0
        cold = world.cache.lookup("7", first(11))
        [lookup] = world.store.fetch([(0, missing_of("7", first(11)))], [cold])
        assert lookup.entry is not None
        world.store.release(0, lookup.entry)
        world.put("8", first(11))  # The other entry is demoted to the host.
        world.drain()
        world.clock.now += 1.0

    far.before_forget = promote
    world.store.forget("7")
    world.drain()
    for stored in (far.value_by_key, host._value_by_scope_by_user):
        assert text_digest("7") not in str(stored)
    assert world.fetch("7", first(11)).record is None
    assert not world.cache.contains("7")


def test_kv_of_a_clock_that_runs_ahead_gets_no_older_than_others(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near)
    date_ahead(near, world, "7", by_s=TTL_S)
    fetched = world.fetch("7", first(11))
    assert fetched.record is not None
    assert fetched.record.encoded_at == world.clock.now


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open breaker"])
def test_forgetting_names_a_tier_that_is_down(new_world: NewWorld, is_open: bool) -> None:
    near, far = DictTier("near"), DictTier("far")
    world = new_world(near, far, limits=TierLimits(max_failures=1))
    world.write("7", first(11))
    value_bytes = far.held_bytes()
    near.before_get = near.before_forget = fail
    if is_open:
        world.fetch("7", first(11))
    assert world.store.forget("7") == {"pages": 0, "near": None, "far": value_bytes}
    assert world.counted("forgotten_bytes", tier="near") == 0
    near.before_forget = do_nothing
    assert world.store.forget("7") == {"pages": 0, "near": value_bytes, "far": 0}
    assert near.value_by_key == {}


# One version.


def test_clearing_a_version_leaves_the_other(new_world: NewWorld) -> None:
    world = new_world(DictTier("near"), host_tier())
    other = identity_of(ModelVersion(MODEL, OTHER_TABLES), NO_CONTEXT, HISTORY, PAGE_SIZE)
    context = other._replace(context=CONTEXT)
    for user in ("7", "8"):
        world.write(user, first(11), first(12, other), first(13, context))
    for user in ("7", "8"):
        world.put(user, first(12, other))
    world.drain()
    before = world.counted("held_bytes", tier="near")
    cleared = world.store.clear(OTHER_VERSION)
    assert cleared["pages"] == 2 * 3 * PAGE_BYTES
    assert cleared["near"] == cleared["host"]
    assert cleared["near"] == before - world.counted("held_bytes", tier="near")
    for user in ("7", "8"):
        assert world.fetch(user, first(11)).reason == "hit"
        assert world.fetch(user, first(12, other)).reason == "tables"
        assert world.fetch(user, first(13, context)).reason == "tables"
    assert world.store.clear(VERSION)["near"] == before - (cleared["near"] or 0)
    assert world.counted("held_bytes", tier="near") == 0


def test_clearing_names_a_tier_that_is_down(new_world: NewWorld) -> None:
    near = DictTier("near")
    world = new_world(near, host_tier())
    near.before_forget = fail
    assert world.store.clear(VERSION) == {"pages": 0, "near": None, "host": 0}


# Signed records.

KEY, OTHER_KEY = b"a secret of some bytes", b"another secret"


@pytest.mark.parametrize(
    ("writes", "reads", "reason"),
    [
        (KEY, KEY, "hit"),
        (KEY, OTHER_KEY, "tier_error"),
        (KEY, None, "tier_error"),
        (None, KEY, "tier_error"),
    ],
)
def test_with_a_key_only_what_was_signed_with_it_is_read(
    new_world: NewWorld, writes: bytes | None, reads: bytes | None, reason: str
) -> None:
    near = DictTier("near")
    new_world(near, key=writes).write("7", first(11))
    world = new_world(near, key=reads)
    assert world.fetch("7", first(11)).reason == reason
    assert world.counted("tier_failures", kind="corrupt") == (reason != "hit")


@pytest.mark.parametrize("num_bytes", [0, 65])
def test_a_key_that_cannot_sign_is_refused_before_anything_is_written(num_bytes: int) -> None:
    """It ended the write thread, and the request that read a signed record failed."""
    with pytest.raises(ConfigError, match=f"the key is {num_bytes} bytes; 1 to 64 are allowed"):
        TierStack([Level(DictTier("near"), FLOAT32)], TTL_S, key=b"k" * num_bytes).close()


# Threads.


def test_threads_read_only_what_their_users_wrote(new_world: NewWorld) -> None:
    far = DictTier("far")
    level = Level(host_tier(capacity_bytes=20_000), FLOAT32, takes_evicted=True)
    world = new_world(level, far, num_pages=16, num_pages_at_rest=8)
    wrong: list[str] = []
    num_found: list[int] = []
    stop = time.monotonic() + 0.7

    def live(user: str) -> None:
        history = history_of(range(100 * int(user), 100 * int(user) + 6 + int(user)))
        while time.monotonic() < stop and not wrong:
            world.put(user, history)
            fetched = world.fetch(user, history)
            if fetched.record is not None:
                num_found.append(1)
                if not torch.equal(fetched.record.kv, kv_of(history)):
                    wrong.append(f"user {user} from {fetched.tier}")

    threads = [threading.Thread(target=partial(live, str(user))) for user in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    world.drain()
    assert wrong == []
    assert len(num_found) > 20
    kept: list[Entry] = [*world.cache._entry_by_user.values()]
    assert all(entry.num_leases == 0 for entry in kept)
    assert sum(len(entry.pages) for entry in kept) == 16 - world.cache.pool.num_free


@pytest.mark.parametrize("num_rows", [0, 10, 12, 22])
def test_kv_with_other_rows_than_its_events_have_is_refused(
    new_world: NewWorld, num_rows: int
) -> None:
    """Its checksum is right; its last events were scored with other rows of the page."""
    near, far = DictTier("near"), DictTier("far")
    world = new_world(near, far)
    world.write("7", first(11))
    content, key = first(11).content, key_of("7")
    kv = torch.ones(NUM_PLANES, num_rows, NUM_HEADS, HEAD_DIM)
    near.value_by_key[key] = pack(KVRecord(content, 1000.0, kv), key[0], FLOAT32, None)
    fetched = world.fetch("7", first(14))
    assert (fetched.tier, fetched.num_matched) == ("far", 11)
    assert fetched.record is not None
    assert torch.equal(fetched.record.kv, kv_of(first(11)))
    assert world.counted("tier_failures", tier="near", kind="corrupt") == 1
    far.value_by_key.clear()
    assert world.fetch("7", first(14)) == Fetched(None, "tier_error", 0, "none")


def test_kv_of_another_shape_that_somebody_wrote_is_refused(new_world: NewWorld) -> None:
    """Its checksum and header are right; the request failed."""
    world = new_world(DictTier("near"))
    history = first(11)
    record = KVRecord(history.content, 1000.0, torch.ones(NUM_PLANES, 11, NUM_HEADS, HEAD_DIM + 1))
    codec = get_codec("float32")
    [level] = world.stack.levels
    user = text_digest("7")
    scope = scope_of(history.identity, codec.name)
    level.tier.put(user, scope, pack(record, user, codec, None), 1000.0)
    cold = world.cache.lookup("7", history)
    [lookup] = world.store.fetch([(0, missing_of("7", history))], [cold])
    assert (lookup.entry, lookup.reason) == (None, "tier_error")
