"""K/V of users for the length of a batch: found in a tier, or encoded once and kept.

A lease holds what it found, so that nothing evicts or overwrites K/V that a batch reads. What is
missing is encoded by the caller, all of it in one batch; where another batch is encoding the same
histories, this one waits for them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from torchrec_kvshare.cache.codecs import is_finite
from torchrec_kvshare.cache.decision import decide
from torchrec_kvshare.cache.identity import PrefixDigests
from torchrec_kvshare.cache.kv_cache import PAGES, Entry, Lookup
from torchrec_kvshare.cache.reasons import BYPASS, HIT, NOT_ADMITTED, NOT_FINITE, TOO_SHORT
from torchrec_kvshare.cache.stack import Want
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.model.ranking import RankingFunctions
from torchrec_kvshare.model.stages import LOOKUP

NO_TIER = "none"


@dataclass(frozen=True)
class CacheUse:
    """What the cache did for one answer, over all histories.

    Attributes:
        status: ``hit``, ``partial`` (some of the K/V was there), ``miss`` or ``bypass``.
        reason: why not a hit; empty for a hit.
        cached_events: events whose K/V was there.
        computed_events: events encoded for this answer.
        tier: where the K/V was found, or ``none``.
        staleness_s: seconds since the oldest of the cached K/V was encoded; 0 where none was used.
    """

    status: str
    reason: str
    cached_events: int
    computed_events: int
    tier: str
    staleness_s: float = field(default=0.0, compare=False)


def not_cached(num_events: int, reason: str) -> CacheUse:
    """Of a request that is scored without the cache."""
    return CacheUse(BYPASS, reason, 0, num_events, NO_TIER)


class Wanted(NamedTuple):
    """A user whose K/V is needed.

    Attributes:
        user_id: as ``canonical_id`` spells it.
        histories: digests of each history.
        came_at: when the user's events came, by ``steady_clock``: nothing is kept of a user who
            was forgotten since. None for when they are looked up.
    """

    user_id: str
    histories: Sequence[PrefixDigests]
    came_at: float | None = None

    @property
    def num_events(self) -> int:
        """Events of all histories."""
        return sum(history.num_events for history in self.histories)


class LeasedHistory(NamedTuple):
    """One history of a lease.

    Attributes:
        lookup: the best K/V that any tier has, or why there is none.
        num_events: of the history.
        kept_events: events whose cached K/V is right for it.
        kept_rows: rows of K/V that they have.
    """

    lookup: Lookup
    num_events: int
    kept_events: int
    kept_rows: int

    @property
    def is_complete(self) -> bool:
        """Whether no event is left to encode."""
        return self.lookup.reason == HIT or self.num_events == 0


class Lease:
    """One user's K/V: what was found of it, and what was encoded and kept.

    Args:
        store: where it lies.
        model: says which cached rows are right for a longer history.
        index: among what was wanted.
        wanted: the user.

    Attributes:
        histories: what was found of each history.
        kv_by_history: [planes, R, H, D] of each history, if it was encoded and the store had no
            room for it.
    """

    def __init__(self, store: KVStore, model: RankingFunctions, index: int, wanted: Wanted) -> None:
        self.index = index
        self.wanted = wanted
        self.histories: list[LeasedHistory] = []
        self.kv_by_history: list[Tensor] | None = None
        self._store = store
        self._model = model
        self._entries: list[Entry | None] = []
        self._held: list[tuple[int, Entry]] = []
        self._why_not_kept = ""

    @property
    def is_admitted(self) -> bool:
        """Whether the store keeps K/V of so many events; else the request is scored without."""
        num_events = self.wanted.num_events
        return num_events == 0 or num_events >= self._store.min_events

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing to encode."""
        return not self.is_admitted or all(one.is_complete for one in self.histories)

    @property
    def pages(self) -> list[list[int]] | None:
        """Pages of each history, oldest rows first; None if the K/V does not lie in pages."""
        if not self.is_admitted or self.kv_by_history is not None:
            return None
        return [[] if entry is None else entry.pages for entry in self._entries]

    @property
    def use(self) -> CacheUse:
        """What an answer says of it."""
        if not self.is_admitted:
            return not_cached(self.wanted.num_events, TOO_SHORT)
        decision = decide(
            [one.lookup.reason for one in self.histories],
            [one.num_events for one in self.histories],
            [one.kept_events for one in self.histories],
            self._why_not_kept,
        )
        used = [
            one.lookup
            for one in self.histories
            if one.num_events and (one.kept_events or one.lookup.reason == HIT)
        ]
        # The tier below the device, where any of it was there.
        below = (lookup.tier for lookup in used if lookup.tier != PAGES)
        tier = next(below, PAGES if used else NO_TIER)
        return CacheUse(*decision, tier, max((lookup.age_s for lookup in used), default=0.0))

    def look_up(self) -> None:
        """Find what the device has of each history."""
        self.release()
        lookups = []
        for number, digests in enumerate(self.wanted.histories):
            lookup = Lookup(None, TOO_SHORT, 0, 0.0)
            if digests.num_events:
                lookup = self._store.caches[number].lookup(self.wanted.user_id, digests)
                self._hold(number, lookup.entry)
            lookups.append(lookup)
        self._take(lookups)

    def wants(self) -> list[tuple[int, Want]]:
        """What the tiers below are asked for, by the number of the history."""
        user_id, digests = self.wanted.user_id, self.wanted.histories
        return [
            (number, Want(user_id, digests[number], one.kept_events, partial(self._rows, number)))
            for number, one in enumerate(self.histories)
            if not one.is_complete
        ]

    def take_fetched(self, fetched: Iterator[Lookup]) -> None:
        """Use what the tiers below had of what it wants."""
        lookups = []
        for number, one in enumerate(self.histories):
            lookup = one.lookup if one.is_complete else next(fetched)
            if lookup.entry is not one.lookup.entry:
                self._hold(number, lookup.entry)
                self._let_go(number, one.lookup.entry)
            lookups.append(lookup)
        self._take(lookups)

    def cached_rows(self, number: int) -> Tensor:
        """K/V [planes, kept rows, H, D] that is right for a history, to be extended."""
        one = self.histories[number]
        return self._store.rows(number, one.lookup.entry, one.kept_rows)

    def keep(self, new_kv: Sequence[Tensor]) -> None:
        """Put K/V into the store and hold it; if a history has no room there, keep all of it here.

        Args:
            new_kv: [planes, new rows, H, D] of each history, the rows behind ``cached_rows``.
        """
        are_finite = all(map(is_finite, new_kv))
        if not are_finite:
            self._store.metrics.count("not_finite")
        for number, (one, kv) in enumerate(zip(self.histories, new_kv, strict=True)):
            if not one.is_complete:
                self._entries[number] = self._put(number, kv) if are_finite else None
                self._hold(number, self._entries[number])
        if any(
            one.num_events and entry is None
            for one, entry in zip(self.histories, self._entries, strict=True)
        ):
            # None of the user's K/V is read from pages then.
            self._why_not_kept = NOT_ADMITTED if are_finite else NOT_FINITE
            self.kv_by_history = [
                torch.cat([self.cached_rows(number), kv], dim=1)
                if entry is None
                else self._store.rows(number, entry, entry.num_rows)
                for number, (entry, kv) in enumerate(zip(self._entries, new_kv, strict=True))
            ]

    def copies(self) -> list[Tensor]:
        """The K/V [planes, R, H, D] of each history, for longer than the lease."""
        if self.kv_by_history is not None:
            return self.kv_by_history
        return [
            self._store.rows(number, entry, 0 if entry is None else entry.num_rows).clone()
            for number, entry in enumerate(self._entries)
        ]

    def release(self) -> None:
        """Let go of all that it holds."""
        for number, entry in self._held:
            self._store.release(number, entry)
        self._held.clear()

    def _put(self, number: int, kv: Tensor) -> Entry | None:
        one = self.histories[number]
        lookup, came_at = one.lookup, self.wanted.came_at
        if came_at is not None:  # Its user may have been forgotten in between.
            lookup = lookup._replace(at=min(lookup.at, came_at))
        content = self.wanted.histories[number].content
        return self._store.put(number, self.wanted.user_id, content, kv, lookup, one.kept_rows)

    def _take(self, lookups: Sequence[Lookup]) -> None:
        """Use what is right of the K/V that was found, and let go of the rest."""
        num_events = [digests.num_events for digests in self.wanted.histories]
        reusable = self._model.reusable(
            [lookup.num_matched if self._store.extends else 0 for lookup in lookups],
            [0 if lookup.entry is None else lookup.entry.num_events for lookup in lookups],
            num_events,
        )
        self.histories = []
        for number, (lookup, (events, rows)) in enumerate(zip(lookups, reusable, strict=True)):
            if rows == 0 and lookup.reason != HIT:
                # Its own pages may make room for what comes.
                self._let_go(number, lookup.entry)
                lookup = lookup._replace(entry=None, num_matched=0)
            self.histories.append(LeasedHistory(lookup, num_events[number], events, rows))
        self._entries = [one.lookup.entry for one in self.histories]

    def _rows(self, number: int, num_events: int) -> int:
        """Rows of K/V that so many events of one history have."""
        counts = [0] * len(self.histories)
        counts[number] = num_events
        return self._model.num_rows(counts)[number]

    def _hold(self, number: int, entry: Entry | None) -> None:
        if entry is not None:
            self._held.append((number, entry))

    def _let_go(self, number: int, entry: Entry | None) -> None:
        if entry is not None:
            self._held.remove((number, entry))
            self._store.release(number, entry)


# New K/V [planes, new rows, H, D] of each history of each lease.
Encode = Callable[[list[Lease]], list[list[Tensor]]]


@contextmanager
def acquire(
    store: KVStore, model: RankingFunctions, wanted: Sequence[Wanted], encode: Encode
) -> Iterator[list[Lease]]:
    """K/V of users, until the end of the block.

    Args:
        store: where it is looked up and kept.
        model: whose K/V it is.
        wanted: users, each once.
        encode: called with the leases that lack K/V.

    Returns:
        A lease for each user, complete.
    """
    leases = [Lease(store, model, index, one) for index, one in enumerate(wanted)]
    try:
        num_landed = store.flights.num_landed
        with record_function(LOOKUP):
            _find(store, leases)
        missing = [lease for lease in leases if not lease.is_complete]
        if missing:
            _encode_once(store, missing, num_landed, encode)
        for lease in leases:
            use = lease.use
            store.metrics.count("events", use.cached_events, source="cached")
            store.metrics.count("events", use.computed_events, source="computed")
        yield leases
    finally:
        for lease in leases:
            lease.release()


def _find(store: KVStore, leases: Sequence[Lease]) -> None:
    """The best that any tier has, the tiers below asked for all leases together."""
    admitted = [lease for lease in leases if lease.is_admitted]
    for lease in admitted:
        lease.look_up()
    if store.stack is not None:
        wants = [lease.wants() for lease in admitted]
        lookups = [
            lease.histories[number].lookup
            for lease, of_lease in zip(admitted, wants, strict=True)
            for number, _ in of_lease
        ]
        fetched = iter(store.fetch([want for of_lease in wants for want in of_lease], lookups))
        for lease in admitted:
            lease.take_fetched(fetched)
    for lease in admitted:
        if lease.wanted.num_events and lease.is_complete:
            lookups = [one.lookup for one in lease.histories]
            store.count_hit(lease.wanted.user_id, lookups)


def _encode_once(store: KVStore, missing: Sequence[Lease], num_landed: int, encode: Encode) -> None:
    """Encode what is missing, or wait where another batch is encoding it."""
    key_by_index = {
        lease.index: store.flight_key(lease.wanted.user_id, lease.wanted.histories)
        for lease in missing
    }
    led = store.flights.lead(key_by_index.values())
    store.metrics.count("flights", len(led), outcome="led")
    others = [lease for lease in missing if key_by_index[lease.index] not in led]
    try:
        mine = [lease for lease in missing if key_by_index[lease.index] in led]
        for lease in others:
            lease.release()
        if store.flights.num_landed != num_landed:
            # One of them may have been encoded since it was looked up.
            mine = _still_missing(mine)
        _encode_and_keep(mine, encode)
    finally:
        store.flights.land(led)
    if others:
        store.join([key_by_index[lease.index] for lease in others])
        _encode_and_keep(_still_missing(others), encode)


def _still_missing(leases: Sequence[Lease]) -> list[Lease]:
    for lease in leases:
        lease.look_up()
    return [lease for lease in leases if not lease.is_complete]


def _encode_and_keep(leases: list[Lease], encode: Encode) -> None:
    if leases:
        for lease, new_kv in zip(leases, encode(leases), strict=True):
            lease.keep(new_kv)
