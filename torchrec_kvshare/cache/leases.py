"""Leases: users' K/V for the duration of a batch, found in a tier or encoded once and kept.

Leased K/V is neither freed nor overwritten while a batch reads it. The caller encodes the missing
K/V of all leases in one batch; if another batch is encoding the same histories, this one waits for
it (single-flight).
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
from torchrec_kvshare.cache.stack import MissingKV
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.model.ranking import RankingFunctions
from torchrec_kvshare.model.stages import LOOKUP

NO_TIER = "none"


@dataclass(frozen=True)
class CacheUse:
    """What the cache did for one answer, over all histories.

    Attributes:
        status: ``hit``, ``partial`` (some of the K/V was cached), ``miss`` or ``bypass``.
        reason: why it is not a hit; empty for a hit.
        cached_events: events whose K/V was cached.
        computed_events: events encoded for this answer.
        tier: where the K/V was found, or ``none``.
        staleness_s: seconds since the oldest of the cached K/V was encoded; 0 if none was used.
    """

    status: str
    reason: str
    cached_events: int
    computed_events: int
    tier: str
    staleness_s: float = field(default=0.0, compare=False)


def not_cached(num_events: int, reason: str) -> CacheUse:
    """Return the cache use of a request that is scored without the cache."""
    return CacheUse(BYPASS, reason, cached_events=0, computed_events=num_events, tier=NO_TIER)


class Wanted(NamedTuple):
    """A user whose K/V is needed.

    Attributes:
        user_id: as ``canonical_id`` spells it.
        histories: digests of each history.
        came_at: when the request arrived, by ``steady_clock``: its K/V is not kept if the user was
            forgotten since then. None for the time of the look-up.
    """

    user_id: str
    histories: Sequence[PrefixDigests]
    came_at: float | None = None

    @property
    def num_events(self) -> int:
        """Events in all histories."""
        return sum(history.num_events for history in self.histories)


class LeasedHistory(NamedTuple):
    """One history of a lease.

    Attributes:
        lookup: the longest K/V that any tier has, or why there is none.
        num_events: events in the history.
        kept_events: events whose cached K/V is valid for it.
        kept_rows: K/V rows of those events.
    """

    lookup: Lookup
    num_events: int
    kept_events: int
    kept_rows: int

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to encode."""
        return self.lookup.reason == HIT or self.num_events == 0


class Lease:
    """One user's K/V: found in the store, or encoded and put there.

    Args:
        store: where the K/V is kept.
        model: says which cached rows are valid for a longer history.
        index: of the user in the batch.
        wanted: the user.

    Attributes:
        histories: result of the look-up for each history.
        kv_by_history: [planes, R, H, D] of each history, if it was encoded but not kept by the
            store.
    """

    def __init__(self, store: KVStore, model: RankingFunctions, index: int, wanted: Wanted) -> None:
        self.index = index
        self.wanted = wanted
        self.histories: list[LeasedHistory] = []
        self.kv_by_history: list[Tensor] | None = None
        self._store = store
        self._model = model
        self._entries: list[Entry | None] = []
        self._leased: list[tuple[int, Entry]] = []
        self._why_not_kept = ""

    @property
    def is_admitted(self) -> bool:
        """Whether the request has enough events for the cache; else it is scored without."""
        num_events = self.wanted.num_events
        return num_events == 0 or num_events >= self._store.min_events

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to encode."""
        return not self.is_admitted or all(one.is_complete for one in self.histories)

    @property
    def pages(self) -> list[list[int]] | None:
        """Pages of each history, oldest rows first; None if the K/V is not in pages."""
        if not self.is_admitted or self.kv_by_history is not None:
            return None
        return [[] if entry is None else entry.pages for entry in self._entries]

    @property
    def use(self) -> CacheUse:
        """Cache use, as the answer reports it."""
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
        # Report a lower tier if any history came from one.
        below = (lookup.tier for lookup in used if lookup.tier != PAGES)
        tier = next(below, PAGES if used else NO_TIER)
        return CacheUse(*decision, tier, max((lookup.age_s for lookup in used), default=0.0))

    def look_up(self) -> None:
        """Look up each history in the ``pages`` tier."""
        self.release()
        lookups = []
        for index, digests in enumerate(self.wanted.histories):
            lookup = Lookup(None, TOO_SHORT, 0, 0.0)
            if digests.num_events:
                lookup = self._store.caches[index].lookup(self.wanted.user_id, digests)
                self._track(index, lookup.entry)
            lookups.append(lookup)
        self._use(lookups)

    def missing(self) -> list[tuple[int, MissingKV]]:
        """Return what to fetch from the tiers below, each with the index of its history."""
        user_id, digests = self.wanted.user_id, self.wanted.histories
        return [
            (
                index,
                MissingKV(user_id, digests[index], one.kept_events, partial(self._kv_rows, index)),
            )
            for index, one in enumerate(self.histories)
            if not one.is_complete
        ]

    def use_fetched(self, fetched: Iterator[Lookup]) -> None:
        """Use the look-ups that ``missing`` led to, one for each of its items."""
        lookups = []
        for index, one in enumerate(self.histories):
            lookup = one.lookup if one.is_complete else next(fetched)
            if lookup.entry is not one.lookup.entry:
                self._track(index, lookup.entry)
                self._release_entry(index, one.lookup.entry)
            lookups.append(lookup)
        self._use(lookups)

    def cached_rows(self, index: int) -> Tensor:
        """Return the cached K/V [planes, kept rows, H, D] that is valid for a history."""
        one = self.histories[index]
        return self._store.rows(index, one.lookup.entry, one.kept_rows)

    def keep(self, new_kv: Sequence[Tensor]) -> None:
        """Put new K/V into the store and lease it.

        If the store does not keep one history, the lease keeps the K/V of all of them.

        Args:
            new_kv: [planes, new rows, H, D] of each history, the rows after ``cached_rows``.
        """
        are_finite = all(map(is_finite, new_kv))
        if not are_finite:
            self._store.metrics.count("not_finite")
        for index, (one, kv) in enumerate(zip(self.histories, new_kv, strict=True)):
            if not one.is_complete:
                self._entries[index] = self._put(index, kv) if are_finite else None
                self._track(index, self._entries[index])
        if any(
            one.num_events and entry is None
            for one, entry in zip(self.histories, self._entries, strict=True)
        ):
            # Attention reads all of a user's histories from pages, or none.
            self._why_not_kept = NOT_ADMITTED if are_finite else NOT_FINITE
            self.kv_by_history = [
                torch.cat([self.cached_rows(index), kv], dim=1)
                if entry is None
                else self._store.rows(index, entry, entry.num_rows)
                for index, (entry, kv) in enumerate(zip(self._entries, new_kv, strict=True))
            ]

    def copies(self) -> list[Tensor]:
        """Return the K/V [planes, R, H, D] of each history; it outlives the lease."""
        if self.kv_by_history is not None:
            return self.kv_by_history
        return [
            self._store.rows(index, entry, 0 if entry is None else entry.num_rows).clone()
            for index, entry in enumerate(self._entries)
        ]

    def release(self) -> None:
        """Release all entries."""
        for index, entry in self._leased:
            self._store.release(index, entry)
        self._leased.clear()

    def _put(self, index: int, kv: Tensor) -> Entry | None:
        one = self.histories[index]
        lookup, came_at = one.lookup, self.wanted.came_at
        if came_at is not None:  # The user may have been forgotten before the look-up.
            lookup = lookup._replace(at=min(lookup.at, came_at))
        content = self.wanted.histories[index].content
        return self._store.put(
            index, self.wanted.user_id, content, kv, lookup=lookup, num_kept=one.kept_rows
        )

    def _use(self, lookups: Sequence[Lookup]) -> None:
        """Keep the entries with valid K/V and release the others."""
        num_events = [digests.num_events for digests in self.wanted.histories]
        reusable = self._model.reusable(
            [lookup.num_matched if self._store.extends else 0 for lookup in lookups],
            [0 if lookup.entry is None else lookup.entry.num_events for lookup in lookups],
            num_events,
        )
        self.histories = []
        for index, (lookup, (events, rows)) in enumerate(zip(lookups, reusable, strict=True)):
            if rows == 0 and lookup.reason != HIT:
                # Released, its pages can be reused for the new K/V.
                self._release_entry(index, lookup.entry)
                lookup = lookup._replace(entry=None, num_matched=0)
            self.histories.append(LeasedHistory(lookup, num_events[index], events, rows))
        self._entries = [one.lookup.entry for one in self.histories]

    def _kv_rows(self, index: int, num_events: int) -> int:
        """Return the K/V rows of ``num_events`` events of one history."""
        counts = [0] * len(self.histories)
        counts[index] = num_events
        return self._model.num_kv_rows(counts)[index]

    def _track(self, index: int, entry: Entry | None) -> None:
        if entry is not None:
            self._leased.append((index, entry))

    def _release_entry(self, index: int, entry: Entry | None) -> None:
        if entry is not None:
            self._leased.remove((index, entry))
            self._store.release(index, entry)


# New K/V [planes, new rows, H, D] of each history of each lease.
Encode = Callable[[list[Lease]], list[list[Tensor]]]


@contextmanager
def acquire(
    store: KVStore, model: RankingFunctions, wanted: Sequence[Wanted], encode: Encode
) -> Iterator[list[Lease]]:
    """Lease users' K/V until the end of the ``with`` block.

    Args:
        store: where K/V is looked up and kept.
        model: the model of the K/V.
        wanted: users, each once.
        encode: called with the leases whose K/V is missing.

    Returns:
        A complete lease for each user.
    """
    leases = [Lease(store, model, index, one) for index, one in enumerate(wanted)]
    try:
        num_finished = store.single_flight.num_finished
        with record_function(LOOKUP):
            _find(store, leases)
        missing = [lease for lease in leases if not lease.is_complete]
        if missing:
            _encode_once(store, missing, num_finished, encode)
        for lease in leases:
            use = lease.use
            store.metrics.count("events", use.cached_events, source="cached")
            store.metrics.count("events", use.computed_events, source="computed")
        yield leases
    finally:
        for lease in leases:
            lease.release()


def _find(store: KVStore, leases: Sequence[Lease]) -> None:
    """Look up all leases in pages, then their missing K/V together in each tier below."""
    admitted = [lease for lease in leases if lease.is_admitted]
    for lease in admitted:
        lease.look_up()
    if store.stack is not None:
        missing, lookups = [], []
        for lease in admitted:
            for index, missing_kv in lease.missing():
                missing.append((index, missing_kv))
                lookups.append(lease.histories[index].lookup)
        fetched = iter(store.fetch(missing, lookups))
        for lease in admitted:
            lease.use_fetched(fetched)
    for lease in admitted:
        if lease.wanted.num_events and lease.is_complete:
            lookups = [one.lookup for one in lease.histories]
            store.count_hit(lease.wanted.user_id, lookups)


def _encode_once(
    store: KVStore, missing: Sequence[Lease], num_finished: int, encode: Encode
) -> None:
    """Encode missing K/V, or wait for another batch that is encoding it."""
    key_by_index = {
        lease.index: store.single_flight_key(lease.wanted.user_id, lease.wanted.histories)
        for lease in missing
    }
    led = store.single_flight.lead(key_by_index.values())
    store.metrics.count("flights", len(led), outcome="led")
    others = [lease for lease in missing if key_by_index[lease.index] not in led]
    try:
        mine = [lease for lease in missing if key_by_index[lease.index] in led]
        for lease in others:
            lease.release()
        if store.single_flight.num_finished != num_finished:
            # Another batch may have encoded one of them since the look-up.
            mine = _still_missing(mine)
        _encode_and_keep(mine, encode)
    finally:
        store.single_flight.finish(led)
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
