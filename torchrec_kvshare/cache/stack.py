"""The tiers below the pages: host memory, disk, a remote store; asked in this order.

A look-up takes the longest K/V that any tier returns within its deadline. Writes are write-behind,
with back-pressure: a write for which the queue has no room is dropped and counted. Every fault of a
tier is a miss with a reason, so the request is answered anyway.
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
from torchrec_kvshare.cache.guard import CircuitBreaker, GuardedTier
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

# Fetching K/V takes 0.1 to 0.5 of its prefill, see scenario=tiers: a smaller share is encoded.
MIN_MISSING_SHARE = 0.25
MAX_TOUCHED = 65_536  # users remembered for second_touch
CLOSE_S = 5.0  # for the queued writes of each tier when the stack is closed


@dataclass(frozen=True)
class Level:
    """A tier of the stack and the rules for its use.

    Attributes:
        tier: the tier.
        codec: codec of its K/V.
        min_events: the fewest missing events that are worth a look-up, and the fewest events of a
            history that is worth a write.
        deadline_s: of a look-up; None for a tier in memory, which is read in the caller's thread.
        takes_evicted: whether it gets K/V evicted from pages; else it gets newly encoded K/V.
        second_touch: admit a user's K/V only from the second time on that it is encoded.
    """

    tier: Tier
    codec: Codec
    min_events: int = 0
    deadline_s: float | None = None
    takes_evicted: bool = False
    second_touch: bool = False


@dataclass(frozen=True)
class TierLimits:
    """Limits of each tier's write queue and circuit breaker.

    Attributes:
        queue_length: most queued writes.
        queue_bytes: most bytes of K/V in queued writes.
        max_failures: failures in a row that open the circuit breaker.
        pause_s: seconds from opening until a trial call.
    """

    queue_length: int = 64
    queue_bytes: int = 2**25
    max_failures: int = 3
    pause_s: float = 1.0


DEFAULT_LIMITS = TierLimits()


class MissingKV(NamedTuple):
    """A history whose K/V is missing in pages, in whole or in part.

    Attributes:
        user_id: owner of the history.
        history: digests of the history.
        num_matched: events whose K/V is in pages.
        num_kv_rows: K/V rows of the first so many events.
    """

    user_id: str
    history: PrefixDigests
    num_matched: int
    num_kv_rows: Callable[[int], int]


class Fetched(NamedTuple):
    """What the stack found for a history.

    Attributes:
        record: K/V of more events than pages have, or None.
        reason: ``hit``, or why K/V is missing; empty if the stack has no better reason than pages.
        num_matched: events in the common prefix of record and history.
        tier: where the record was found.
    """

    record: KVRecord | None
    reason: str
    num_matched: int
    tier: str


class TierStack:
    """Tiers below the pages, shared by all model versions of a process.

    Args:
        levels: the tiers, nearest first.
        ttl_s: seconds from encoding until K/V expires.
        key: secret bytes that sign written K/V, or None for checksums.
        limits: of write queues and circuit breakers.
        clock: monotonic Unix seconds, the same as for pages.
        metrics: of all tiers.

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
            breaker = CircuitBreaker(limits.max_failures, limits.pause_s, self._clock)
            self._guards.append(GuardedTier(level.tier, level.deadline_s, breaker, self.metrics))
            name = f"kvshare-write-{level.tier.name}"
            self._queues.append(WriteQueue(name, limits.queue_length, limits.queue_bytes))
            self._register_gauges(self._guards[-1], self._queues[-1])

    def fetch(self, missing: Sequence[MissingKV]) -> list[Fetched]:
        """Look up K/V that pages do not have; one round trip per tier.

        Returns:
            For each history the K/V found, or why there is none.
        """
        asked_at = self._clock()
        best = [Fetched(None, "", one.num_matched, "none") for one in missing]
        for level, guard in zip(self.levels, self._guards, strict=True):
            asked = [
                index
                for index, one in enumerate(missing)
                if _is_worth_fetching(one.history.num_events, best[index].num_matched, level)
            ]
            if not asked:
                continue
            keys = [
                (
                    _user_key(missing[index].user_id),
                    scope_of(missing[index].history.identity, level.codec.name),
                )
                for index in asked
            ]
            answer = guard.get(keys)
            for row, index in enumerate(asked):
                if isinstance(answer, str):
                    found = Fetched(None, answer, 0, "none")
                else:
                    found = self._read(level, missing[index], answer[row], asked_at)
                    if found.num_matched <= best[index].num_matched:
                        found = found._replace(record=None)
                self.metrics.count("lookups", tier=level.tier.name, outcome=found.reason or COLD)
                if found.record is not None:
                    best[index] = found
                elif found.reason and best[index].record is None:
                    best[index] = best[index]._replace(reason=found.reason)
        return best

    def publish(self, cache: KVCache, entry: Entry) -> None:
        """Queue an entry that the caller leases for the tiers that get newly encoded K/V."""
        block = entry.content.identity.block
        if entry.num_published and entry.num_published // block == entry.num_events // block:
            return  # Without another whole block the K/V is not worth writing again.
        entry.num_published = entry.num_events
        is_known = self._touch(entry.user_id)
        for index, level in enumerate(self.levels):
            if level.takes_evicted:
                continue
            if level.second_touch and not is_known:
                self._count_dropped(level, "first_touch")
                continue
            kv = cache.lease(entry)
            release = partial(cache.release, entry)
            if not self._enqueue(index, entry, kv, release):
                release()

    def demote(self, entry: Entry, kv: Tensor, release: Callable[[], None]) -> bool:
        """Queue evicted K/V for the first tier that takes it; a cache's ``on_evict``."""
        for index, level in enumerate(self.levels):
            if level.takes_evicted:
                return self._enqueue(index, entry, kv, release)
        return False

    def forget(self, user_id: str) -> dict[str, int | None]:
        """Drop a user's K/V of all models; refuse later writes of K/V that was encoded before now.

        Returns:
            Bytes dropped by tier; None for a tier that could not be reached.
        """
        with self._lock:
            self._touched.pop(hash(user_id), None)
        # Farthest tier first, each with the time of its own call: K/V fetched from it meanwhile is
        # older than the time at which the nearer tiers forget, so they refuse it.
        dropped = {
            guard.name: guard.remove(lambda tier: tier.forget(_user_key(user_id), self._clock()))
            for guard in reversed(self._guards)
        }
        for name, num_bytes in dropped.items():
            self.metrics.count("forgotten_bytes", num_bytes or 0, tier=name)
        return dropped

    def clear(self, kv_version: str) -> dict[str, int | None]:
        """Drop the K/V of one version, see ``KVVersion``; return bytes as ``forget`` does."""
        return {
            guard.name: guard.remove(lambda tier: tier.clear(kv_version)) for guard in self._guards
        }

    def drain(self, timeout_s: float) -> bool:
        """Wait until all queued K/V is written; return False on timeout."""
        deadline = time.monotonic() + timeout_s
        return all(queue.drain(deadline - time.monotonic()) for queue in self._queues)

    def close(self) -> None:
        """Write queued K/V, at most ``CLOSE_S`` per tier, then close the tiers."""
        for queue in self._queues:
            queue.close(CLOSE_S)
        for guard in self._guards:
            guard.close()

    def _read(self, level: Level, missing: MissingKV, found: Found, asked_at: float) -> Fetched:
        """Decode a tier's value and compare it with the history."""
        name = level.tier.name
        if found.value is None:
            return Fetched(None, _why_missing(missing, found.scopes), 0, name)
        self.metrics.count("bytes", len(found.value), tier=name, direction="read")
        try:
            with self.metrics.timed("seconds", tier=name, operation="decode"):
                record = unpack(
                    found.value,
                    user=_user_key(missing.user_id),
                    identity=missing.history.identity,
                    codec=level.codec,
                    key=self._key,
                )
            reason, num_matched = compare(record.content, missing.history)
            if num_matched:
                _check_rows(record, missing)
        except RecordError as error:
            self.metrics.count("tier_failures", tier=name, kind="corrupt")
            logger.warning("K/V in tier %s is not used: %s", name, error)
            return Fetched(None, TIER_ERROR, 0, name)
        if self._clock() - record.encoded_at > self._ttl_s:
            return Fetched(None, EXPIRED, 0, name)
        # The clock of the machine that encoded it may be ahead of ours, and pages compare this time
        # with the time at which the user was forgotten.
        record = replace(record, encoded_at=min(record.encoded_at, asked_at))
        return Fetched(record, reason, num_matched, name)

    def _enqueue(self, index: int, entry: Entry, kv: Tensor, release: Callable[[], None]) -> bool:
        """Queue a write; if it is too short or the queue is full, count it and return False."""
        level = self.levels[index]
        if entry.num_events < level.min_events:
            self._count_dropped(level, "too_short")
            return False
        record = KVRecord(entry.content, entry.encoded_at, kv)
        write = partial(self._write, index, entry.user_id, record=record, release=release)
        is_queued = self._queues[index].offer(Write(write, kv.numel() * kv.element_size()))
        if not is_queued:
            self._count_dropped(level, "queue_full")
        return is_queued

    def _write(
        self, index: int, user_id: str, record: KVRecord, release: Callable[[], None]
    ) -> None:
        level, guard = self.levels[index], self._guards[index]
        user = _user_key(user_id)
        try:
            with self.metrics.timed("seconds", tier=guard.name, operation="encode"):
                value = pack(record, user, level.codec, self._key)
        except RecordError as error:
            logger.warning("K/V is not written to tier %s: %s", guard.name, error)
            self._count_dropped(level, "not_finite")
            return
        finally:
            release()
        scope = scope_of(record.content.identity, level.codec.name)
        dropped = guard.put(user, scope, value, record.encoded_at)
        if dropped:
            self._count_dropped(level, dropped)
        else:
            self.metrics.count("bytes", len(value), tier=guard.name, direction="written")

    def _count_dropped(self, level: Level, reason: str) -> None:
        self.metrics.count("dropped_writes", tier=level.tier.name, reason=reason)

    def _touch(self, user_id: str) -> bool:
        """Remember a user by a 64-bit hash of the id; return whether it was known."""
        with self._lock:
            is_known = hash(user_id) in self._touched
            self._touched[hash(user_id)] = None
            self._touched.move_to_end(hash(user_id))
            if len(self._touched) > MAX_TOUCHED:
                self._touched.popitem(last=False)
        return is_known

    def _register_gauges(self, guard: GuardedTier, queue: WriteQueue) -> None:
        self.metrics.gauge("held_bytes", guard.held_bytes, tier=guard.name)
        self.metrics.gauge("breaker_open", lambda: guard.breaker.state, tier=guard.name)
        self.metrics.gauge("queue_length", lambda: queue.length, tier=guard.name)
        self.metrics.gauge("queue_bytes", lambda: queue.num_bytes, tier=guard.name)


def _is_worth_fetching(num_events: int, num_matched: int, level: Level) -> bool:
    """Return whether to fetch the K/V of all events rather than encode the missing ones."""
    num_missing = num_events - num_matched
    return num_missing >= max(1, level.min_events, num_events * MIN_MISSING_SHARE)


def _check_rows(record: KVRecord, missing: MissingKV) -> None:
    """Refuse K/V with more or fewer rows than its events have."""
    num_events, num_rows = record.content.num_events, record.kv.size(1)
    expected = missing.num_kv_rows(num_events)
    if num_rows != expected:
        raise RecordError(f"there are {num_rows} rows of K/V; {num_events} events have {expected}")


def _user_key(user_id: str) -> str:
    return text_digest(user_id)


def _why_missing(missing: MissingKV, scopes: Sequence[str]) -> str:
    """Return why a user's other K/V in a tier is not usable; empty if there is none."""
    wanted = shortened(missing.history.identity)
    reasons = set()
    for scope in scopes:
        parsed = parse_scope(scope)
        if parsed is not None and parsed[0].tower == wanted.tower:
            identity = parsed[0]
            is_same = identity._replace(block=wanted.block) == wanted
            reasons.add(CODEC if is_same else why_different(identity, wanted))
    return next((reason for reason in (CODEC, CONTEXT, TABLES, MODEL) if reason in reasons), "")
