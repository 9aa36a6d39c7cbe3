"""The tiers below the device: host memory, disk, a remote store; asked in this order.

A look-up takes the longest K/V that is found within each tier's deadline. Writes are made behind:
nobody waits for them, and what the queue has no room for is dropped and counted. Whatever a tier
does, a request is answered: every fault is K/V that is missing, with a reason.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.codecs import Codec
from torchrec_kvshare.cache.guard import Breaker, GuardedTier
from torchrec_kvshare.cache.identity import (
    PrefixDigests,
    compare,
    text_digest,
    why_different,
)
from torchrec_kvshare.cache.keys import check_key
from torchrec_kvshare.cache.kv_cache import Entry, KVCache
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.reasons import CODEC, COLD, CONTEXT, EXPIRED, MODEL, TABLES, TIER_ERROR
from torchrec_kvshare.cache.record import (
    KVRecord,
    pack,
    parse_scope,
    scope_of,
    shortened,
    unpack,
)
from torchrec_kvshare.cache.tiers import Found, Tier
from torchrec_kvshare.cache.write_behind import Write, WriteQueue
from torchrec_kvshare.errors import RecordError

logger = logging.getLogger(__name__)

# Fetching K/V takes 0.1 to 0.5 of its prefill, see scenario=tiers: a smaller part is encoded.
LEAST_MISSING_SHARE = 0.25
MAX_TOUCHED = 65_536  # users remembered for admission by the second touch
CLOSE_S = 5.0  # for the writes that wait when the stack is closed


@dataclass(frozen=True)
class Level:
    """A tier of the stack and when it is used.

    Attributes:
        tier: the store.
        codec: how K/V is written there.
        min_events: a history that lacks fewer is not worth a look-up, and one that has fewer is not
            worth a write.
        deadline_s: of a look-up; None for memory, which is asked without a thread between.
        takes_evicted: whether it gets what leaves the device; else it gets what is encoded.
        second_touch: whether a user's K/V is written only from its second time on.
    """

    tier: Tier
    codec: Codec
    min_events: int = 0
    deadline_s: float | None = None
    takes_evicted: bool = False
    second_touch: bool = False


@dataclass(frozen=True)
class TierLimits:
    """What waiting and failing may cost.

    Attributes:
        queue_length: writes that wait for one tier.
        queue_bytes: K/V that those hold.
        max_failures: of a tier in a row, until it is left alone.
        pause_s: until it is tried again.
    """

    queue_length: int = 64
    queue_bytes: int = 2**25
    max_failures: int = 3
    pause_s: float = 1.0


DEFAULT_LIMITS = TierLimits()


class Want(NamedTuple):
    """A history of which K/V is missing.

    Attributes:
        user_id: whose it is.
        history: what it is.
        num_matched: events whose K/V is on the device.
        num_rows: rows of K/V that so many of its events have.
    """

    user_id: str
    history: PrefixDigests
    num_matched: int
    num_rows: Callable[[int], int]


class Fetched(NamedTuple):
    """What the stack has for a history.

    Attributes:
        record: K/V of more events than the device has, or None.
        reason: why there is none; empty if nobody knows better than the device.
        num_matched: events that the record and the history begin with.
        tier: where it was found.
    """

    record: KVRecord | None
    reason: str
    num_matched: int
    tier: str


class TierStack:
    """Tiers below the device, shared by all model versions of a process.

    Args:
        levels: the nearest first.
        ttl_s: seconds after which K/V is not used any more.
        key: secret bytes that sign what is written, or None for checksums.
        limits: of queues and failures.
        clock: Unix seconds that only go forward; the device's.
        metrics: where everything is counted.

    Raises:
        ConfigError: if the key is empty or longer than 64 bytes.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        ttl_s: float,
        key: bytes | None = None,
        limits: TierLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] | None = None,
        metrics: CacheMetrics | None = None,
    ) -> None:
        if key is not None:
            check_key(key)
        self.levels = tuple(levels)
        self.metrics = metrics or CacheMetrics()
        self._ttl_s = ttl_s
        self._key = key
        self._clock = clock or steady_clock()
        self._guards: list[GuardedTier] = []
        self._queues: list[WriteQueue] = []
        self._touched: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()
        for level in self.levels:
            breaker = Breaker(limits.max_failures, limits.pause_s, self._clock)
            self._guards.append(GuardedTier(level.tier, level.deadline_s, breaker, self.metrics))
            name = f"kvshare-write-{level.tier.name}"
            self._queues.append(WriteQueue(name, limits.queue_length, limits.queue_bytes))
            self._show(self._guards[-1], self._queues[-1])

    def fetch(self, wants: Sequence[Want]) -> list[Fetched]:
        """Look for K/V that the device has not; one round trip for each tier.

        Returns:
            For each want what was found, or why nothing was.
        """
        asked_at = self._clock()
        best = [Fetched(None, "", want.num_matched, "none") for want in wants]
        for level, guard in zip(self.levels, self._guards, strict=True):
            due = [
                place
                for place, want in enumerate(wants)
                if _is_worth_it(want.history.num_events, best[place].num_matched, level)
            ]
            if not due:
                continue
            keys = [
                (_user_key(wants[p].user_id), scope_of(wants[p].history.identity, level.codec.name))
                for p in due
            ]
            answer = guard.get(keys)
            for number, place in enumerate(due):
                if isinstance(answer, str):
                    found = Fetched(None, answer, 0, "none")
                else:
                    found = self._open(level, wants[place], answer[number], asked_at)
                    if found.num_matched <= best[place].num_matched:
                        found = found._replace(record=None)
                self.metrics.count("lookups", tier=level.tier.name, outcome=found.reason or COLD)
                if found.record is not None:
                    best[place] = found
                elif found.reason and best[place].record is None:
                    best[place] = best[place]._replace(reason=found.reason)
        return best

    def publish(self, cache: KVCache, entry: Entry) -> None:
        """Write an entry that the caller holds to the tiers that get what is encoded."""
        block = entry.content.identity.block
        if entry.num_published and entry.num_published // block == entry.num_events // block:
            return  # A few events more are not worth writing the whole again.
        entry.num_published = entry.num_events
        is_known = self._touch(entry.user_id)
        for place, level in enumerate(self.levels):
            if level.takes_evicted:
                continue
            if level.second_touch and not is_known:
                self._dropped(level, "first_touch")
                continue
            kv = cache.hold(entry)
            release = partial(cache.release, entry)
            if not self._offer(place, entry, kv, release):
                release()

    def take(self, entry: Entry, kv: Tensor, release: Callable[[], None]) -> bool:
        """Take what leaves the device, where a tier wants it: a cache's ``on_evict``."""
        for place, level in enumerate(self.levels):
            if level.takes_evicted:
                return self._offer(place, entry, kv, release)
        return False

    def forget(self, user_id: str) -> dict[str, int | None]:
        """Drop a user's K/V of all models, and what was encoded until now and comes later.

        Returns:
            Bytes dropped by tier; None for a tier that could not be reached.
        """
        with self._lock:
            self._touched.pop(hash(user_id), None)
        # The farthest first, each at its own time: what is fetched from it meanwhile is older than
        # the time at which the nearer ones forget.
        dropped = {
            guard.name: guard.remove(lambda tier: tier.forget(_user_key(user_id), self._clock()))
            for guard in reversed(self._guards)
        }
        for name, num_bytes in dropped.items():
            self.metrics.count("forgotten_bytes", num_bytes or 0, tier=name)
        return dropped

    def clear(self, model_version: str) -> dict[str, int | None]:
        """Drop the K/V of one model version; bytes as in ``forget``."""
        return {
            guard.name: guard.remove(lambda tier: tier.clear(model_version))
            for guard in self._guards
        }

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything that waits is written; whether it came to that in time."""
        deadline = time.monotonic() + timeout_s
        return all(queue.drain(deadline - time.monotonic()) for queue in self._queues)

    def close(self) -> None:
        """Write what waits, and let go of the stores."""
        for queue in self._queues:
            queue.close(CLOSE_S)
        for guard in self._guards:
            guard.close()

    def _open(self, level: Level, want: Want, found: Found, asked_at: float) -> Fetched:
        """What a tier's answer is worth."""
        name = level.tier.name
        if found.value is None:
            return Fetched(None, _why_missing(want, level, found.scopes), 0, name)
        self.metrics.count("bytes", len(found.value), tier=name, direction="read")
        try:
            with self.metrics.timed("seconds", tier=name, operation="decode"):
                record = unpack(
                    found.value,
                    _user_key(want.user_id),
                    want.history.identity,
                    level.codec,
                    self._key,
                )
            reason, num_matched = compare(record.content, want.history)
            if num_matched:
                _check_rows(record, want)
        except RecordError as error:
            self.metrics.count("tier_failures", tier=name, kind="corrupt")
            logger.warning("K/V in tier %s is not used: %s", name, error)
            return Fetched(None, TIER_ERROR, 0, name)
        if self._clock() - record.encoded_at > self._ttl_s:
            return Fetched(None, EXPIRED, 0, name)
        # The clock of the machine that encoded it may run ahead of ours, which tells below whether
        # the user was forgotten since.
        record = replace(record, encoded_at=min(record.encoded_at, asked_at))
        return Fetched(record, reason, num_matched, name)

    def _offer(self, place: int, entry: Entry, kv: Tensor, release: Callable[[], None]) -> bool:
        """Queue a write; False, and counted, if it is not worth it or there is no room."""
        level = self.levels[place]
        if entry.num_events < level.min_events:
            return self._dropped(level, "too_short")
        record = KVRecord(entry.content, entry.encoded_at, kv)
        write = partial(self._write, place, entry.user_id, record, release)
        num_bytes = kv.numel() * kv.element_size()
        return self._queues[place].offer(Write(write, num_bytes)) or self._dropped(
            level, "queue_full"
        )

    def _write(
        self, place: int, user_id: str, record: KVRecord, release: Callable[[], None]
    ) -> None:
        level, guard = self.levels[place], self._guards[place]
        user = _user_key(user_id)
        try:
            with self.metrics.timed("seconds", tier=guard.name, operation="encode"):
                value = pack(record, user, level.codec, self._key)
        except RecordError as error:
            logger.warning("K/V is not written to tier %s: %s", guard.name, error)
            self._dropped(level, "not_finite")
            return
        finally:
            release()
        scope = scope_of(record.content.identity, level.codec.name)
        dropped = guard.put(user, scope, value, record.encoded_at)
        if dropped:
            self._dropped(level, dropped)
        else:
            self.metrics.count("bytes", len(value), tier=guard.name, direction="written")

    def _dropped(self, level: Level, reason: str) -> bool:
        self.metrics.count("dropped_writes", tier=level.tier.name, reason=reason)
        return False

    def _touch(self, user_id: str) -> bool:
        """Note a user by a hash, 64 bits however long its id is; whether it was known."""
        with self._lock:
            is_known = hash(user_id) in self._touched
            self._touched[hash(user_id)] = None
            self._touched.move_to_end(hash(user_id))
            if len(self._touched) > MAX_TOUCHED:
                self._touched.popitem(last=False)
        return is_known

    def _show(self, guard: GuardedTier, queue: WriteQueue) -> None:
        self.metrics.gauge("held_bytes", guard.held_bytes, tier=guard.name)
        self.metrics.gauge("breaker_open", lambda: guard.breaker.state, tier=guard.name)
        self.metrics.gauge("queue_length", lambda: queue.length, tier=guard.name)
        self.metrics.gauge("queue_bytes", lambda: queue.num_bytes, tier=guard.name)


def _is_worth_it(num_events: int, num_matched: int, level: Level) -> bool:
    """Whether to fetch K/V of all events rather than to encode those that are missing."""
    num_missing = num_events - num_matched
    least = max(1, level.min_events, num_events * LEAST_MISSING_SHARE)
    return num_missing >= least


def _check_rows(record: KVRecord, want: Want) -> None:
    """Refuse K/V that is said to be of more or fewer events than it has rows for."""
    num_events, num_rows = record.content.num_events, record.kv.size(1)
    expected = want.num_rows(num_events)
    if num_rows != expected:
        raise RecordError(f"there are {num_rows} rows of K/V; {num_events} events have {expected}")


def _user_key(user_id: str) -> str:
    return text_digest(user_id)


def _why_missing(want: Want, level: Level, scopes: Sequence[str]) -> str:
    """The reason why none of what a tier keeps of a user is wanted; empty if it keeps nothing."""
    wanted = shortened(want.history.identity)
    reasons = set()
    for scope in scopes:
        parsed = parse_scope(scope)
        if parsed is not None and parsed[0].tower == wanted.tower:
            identity = parsed[0]
            is_same = identity._replace(block=wanted.block) == wanted
            reasons.add(CODEC if is_same else why_different(identity, wanted))
    return next((reason for reason in (CODEC, CONTEXT, TABLES, MODEL) if reason in reasons), "")
