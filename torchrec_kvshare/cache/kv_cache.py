"""The ``pages`` tier: K/V in pages, looked up by user and by prefix of the history.

K/V is reused for the longest prefix whose event digests match; a look-up has a reason for what is
missing. Requests in flight lease their entries: leased pages outlive eviction and replacement, and
are not written to.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.identity import Content, Identity, PrefixDigests, compare
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LruPolicy, Policy
from torchrec_kvshare.cache.reasons import COLD, EVICTED, EXPIRED, HIT
from torchrec_kvshare.errors import ConfigError

PAGES = "pages"
# Values of ``share``: whose K/V a history may use.
USER = "user"
CONTENT = "content"
MAX_REMEMBERED = 65_536  # evicted users, and as many forgotten users


@dataclass(frozen=True)
class Rules:
    """How long K/V may be used, and by which users.

    Attributes:
        ttl_s: seconds from encoding until K/V expires.
        idle_ttl_s: seconds without use until K/V expires.
        share: ``user``, or ``content``: also use K/V of other users whose history has the same
            prefix.
        pinned_bytes: reserve for pinned users, who are never evicted from it.

    Raises:
        ConfigError: if a time or ``share`` is not allowed.
    """

    ttl_s: float = math.inf
    idle_ttl_s: float = math.inf
    share: str = USER
    pinned_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("ttl_s", "idle_ttl_s"):
            if not (seconds := getattr(self, name)) > 0.0:
                raise ConfigError(f"{name} is {seconds}; it must be above 0 seconds")
        if self.share not in (USER, CONTENT):
            raise ConfigError(f"share is {self.share!r}; {USER!r} or {CONTENT!r} is allowed")


FOREVER = Rules()


@dataclass(eq=False)
class Entry:
    """One history's K/V: its identity and events, pages, times and leases."""

    user_id: str
    content: Content
    num_rows: int
    pages: list[int]
    encoded_at: float  # when its oldest K/V was encoded, also after rows were appended
    known_at: float  # when its user's events were looked up; a later ``forget`` invalidates it
    used_at: float
    num_leases: int = 0
    dropped: bool = False
    pinned_bytes: int = 0  # of the reserve for pinned users
    num_published: int = 0  # events whose K/V was offered to lower tiers

    @property
    def num_events(self) -> int:
        """Number of events that the K/V covers."""
        return self.content.num_events


class Lookup(NamedTuple):
    """Result of a look-up.

    Attributes:
        entry: leased K/V of the history or of one with a common prefix; None if there is none.
        reason: ``hit``, or why K/V of some events is missing.
        num_matched: events in the common prefix.
        at: Unix seconds of the look-up.
        tier: where the K/V was found.
    """

    entry: Entry | None
    reason: str
    num_matched: int
    at: float
    tier: str = PAGES

    @property
    def age_s(self) -> float:
        """Seconds since the oldest of the K/V was encoded."""
        return 0.0 if self.entry is None else self.at - self.entry.encoded_at


class OnEvict(Protocol):
    """Offers an evicted entry's K/V to the next tier; must not block."""

    def __call__(self, entry: Entry, kv: Tensor, release: Callable[[], None]) -> bool:
        """Return whether the K/V is taken; if so, call ``release`` once ``kv`` has been read."""


class KVCache:
    """K/V of one history by user, within the byte budget of a page pool; thread-safe.

    Args:
        pool: pages of the K/V; the cache is their only user.
        rules: how long K/V may be used, and by which users.
        policy: eviction policy, LRU by default. Pages beyond its capacity serve requests in flight
            and K/V on its way to the next tier.
        clock: monotonic Unix seconds.
        on_evict: offers evicted K/V to the next tier.
        metrics: where look-ups and evictions are counted.

    Raises:
        ConfigError: if capacity of the policy and reserve for pinned users exceed the pool.

    Example:
        >>> from torchrec_kvshare.features.schema import FeatureSchema, History, Window
        >>> from torchrec_kvshare.cache.identity import Identity
        >>> from torchrec_kvshare.features.request import Events
        >>> schema = FeatureSchema({}, histories=(History("history", Window(8, 4)),))
        >>> identity = Identity("model", "tables", "", "history", 4)
        >>> three = PrefixDigests(Events({"time": torch.arange(3)}, {}, 0), schema, identity)
        >>> cache = KVCache(PagePool(4096, 4, 2, 2, 8))
        >>> cache.lookup("7", three).reason
        'cold'
        >>> cache.release(cache.put("7", three.content, torch.zeros(2, 3, 2, 8)))
        >>> cache.lookup("7", three).reason
        'hit'
    """

    def __init__(
        self,
        pool: PagePool,
        rules: Rules = FOREVER,
        policy: Policy | None = None,
        clock: Callable[[], float] | None = None,
        on_evict: OnEvict | None = None,
        metrics: CacheMetrics | None = None,
    ) -> None:
        self.pool = pool
        self.rules = rules
        self.metrics = metrics or CacheMetrics()
        self.clock = clock or steady_clock()
        self._policy = policy or LruPolicy(pool.capacity_bytes - rules.pinned_bytes)
        if self._policy.capacity_bytes + rules.pinned_bytes > pool.capacity_bytes:
            raise ConfigError(
                f"the pool holds {pool.capacity_bytes} bytes; {self._policy.capacity_bytes} and "
                f"{rules.pinned_bytes} for pinned users are more"
            )
        self._on_evict = on_evict
        self._entry_by_user: dict[str, Entry] = {}
        # Filled only with ``share=content``.
        self._owners_by_digest: dict[tuple[Identity, bytes], dict[str, None]] = {}
        self._pinned_users: set[str] = set()
        self._pinned_held_bytes = 0
        # By hash of the user id: 64 bits, however long the id is. A collision, once in 2**64 pairs,
        # costs a wrong reason or K/V that is not kept.
        self._evicted_users: OrderedDict[int, float] = OrderedDict()
        self._forgotten_at: OrderedDict[int, float] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages in use."""
        return (self.pool.num_pages - self.pool.num_free) * self.pool.page_bytes

    def lookup(self, user_id: str, history: PrefixDigests) -> Lookup:
        """Find K/V of a prefix of a history; a found entry is leased until ``release``."""
        start = time.perf_counter()
        with self._lock:
            now = self.clock()
            entry, reason, num_matched = self._lookup(user_id, history, now)
            self._policy.touch(user_id)
            if entry is not None:
                if entry.user_id != user_id:
                    self._policy.touch(entry.user_id)
                entry.used_at = now
                entry.num_leases += 1
        self.metrics.count("lookups", tier=PAGES, outcome=reason)
        seconds = time.perf_counter() - start
        self.metrics.observe("seconds", seconds, tier=PAGES, operation="lookup")
        return Lookup(entry, reason, num_matched, now)

    def put(
        self,
        user_id: str,
        content: Content,
        kv: Tensor,
        base: Entry | None = None,
        num_kept: int = 0,
        encoded_at: float | None = None,
    ) -> Entry | None:
        """Keep the K/V of a user's history, replacing the user's entry; leased until ``release``.

        Args:
            user_id: owner of the history.
            content: identity and events of the history.
            kv: [planes, R, H, D], the rows after those kept from ``base``.
            base: an entry that the caller leases, whose first rows are valid for the history.
            num_kept: rows to keep from ``base``.
            encoded_at: Unix seconds; now by default. The base's time, if that is older.

        Returns:
            The entry. None, and the base unchanged, if too few pages are free or can be freed, or
            if the user was forgotten after ``encoded_at``.

        Raises:
            ShapeError: if planes, heads or head width of the K/V differ from the pool's.
        """
        self.pool.check(kv)
        with self._lock:
            now = self.clock()
            # A base of another user does not count: ``forget`` is about this user's events.
            known_at = encoded_at = now if encoded_at is None else encoded_at
            if base is not None:
                encoded_at = min(encoded_at, base.encoded_at)
            if base is not None and base.user_id == user_id:
                known_at = min(known_at, base.known_at)
            num_rows = num_kept + kv.size(1)
            new = Entry(
                user_id,
                content,
                num_rows,
                pages=[],
                encoded_at=encoded_at,
                known_at=known_at,
                used_at=now,
                num_leases=1,
            )
            if known_at > self._forgotten_at.get(hash(user_id), -math.inf):
                if self._insert(new, kv, base, num_kept):
                    return new
                remember(self._evicted_users, user_id, 0.0)
        self.metrics.count("not_kept", tier=PAGES)
        return None

    def contains(self, user_id: str) -> bool:
        """Return whether there is K/V of a user, valid for the history or not."""
        return user_id in self._entry_by_user

    @property
    def num_leased(self) -> int:
        """Entries with at least one lease."""
        with self._lock:
            return sum(entry.num_leases > 0 for entry in self._entry_by_user.values())

    def lease(self, entry: Entry) -> Tensor:
        """Lease an entry once more that the caller leases; return its K/V [planes, R, H, D]."""
        with self._lock:
            assert entry.num_leases > 0
            entry.num_leases += 1
        return self.pool.read(entry.pages, entry.num_rows)

    def release(self, entry: Entry) -> None:
        """End one lease of ``lookup``, ``put`` or ``lease``."""
        with self._lock:
            assert entry.num_leases > 0
            entry.num_leases -= 1
            self._free_if_unused(entry)

    def forget(self, user_id: str) -> int:
        """Drop a user's K/V, pinned or not; K/V that is being encoded now will be refused.

        Returns:
            Bytes dropped.
        """
        with self._lock:
            remember(self._forgotten_at, user_id, self.clock())
            self._evicted_users.pop(hash(user_id), None)
            self._pinned_users.discard(user_id)
            entry = self._entry_by_user.get(user_id)
            if entry is None:
                return 0
            num_bytes = len(entry.pages) * self.pool.page_bytes
            self._drop(entry)
            return num_bytes

    def clear(self, kv_version: str) -> int:
        """Drop the K/V of one version, see ``KVVersion``; return the bytes dropped."""
        with self._lock:
            entries = [
                entry
                for entry in self._entry_by_user.values()
                if entry.content.identity.kv_version == kv_version
            ]
            num_pages = sum(len(entry.pages) for entry in entries)
            for entry in entries:
                self._drop(entry)
            return num_pages * self.pool.page_bytes

    def pin(self, user_id: str) -> None:
        """Put the user's K/V into the pinned reserve if it has room, now and at each ``put``."""
        with self._lock:
            self._pinned_users.add(user_id)
            entry = self._entry_by_user.get(user_id)
            if entry is None or entry.pinned_bytes:
                return
            num_bytes = max(len(entry.pages), 1) * self.pool.page_bytes
            if self._pinned_held_bytes + num_bytes <= self.rules.pinned_bytes:
                entry.pinned_bytes = num_bytes
                self._pinned_held_bytes += num_bytes
                self._policy.remove(user_id)

    def unpin(self, user_id: str) -> None:
        """Make the user's K/V evictable again; it may be evicted for lack of room at once."""
        with self._lock:
            self._pinned_users.discard(user_id)
            entry = self._entry_by_user.get(user_id)
            if entry is None or not entry.pinned_bytes:
                return
            num_bytes, entry.pinned_bytes = entry.pinned_bytes, 0
            self._pinned_held_bytes -= num_bytes
            for evicted in self._policy.put(user_id, num_bytes):
                self._evict(self._entry_by_user[evicted], 0)

    def _lookup(
        self, user_id: str, history: PrefixDigests, now: float
    ) -> tuple[Entry | None, str, int]:
        own = self._entry_by_user.get(user_id)
        found: tuple[Entry | None, str, int]
        if own is None:
            found = None, EVICTED if hash(user_id) in self._evicted_users else COLD, 0
        elif self._is_expired(own, now):
            self._drop(own)
            found = None, EXPIRED, 0
        else:
            reason, num_matched = compare(own.content, history)
            found = own if num_matched else None, reason, num_matched
        if found[1] == HIT or not self._owners_by_digest:
            return found
        return self._shared(history, now, found[2]) or found

    def _shared(
        self, history: PrefixDigests, now: float, num_matched: int
    ) -> tuple[Entry, str, int] | None:
        """Find an entry of another user with a longer common prefix than ``num_matched``."""
        longer = history.blocks[num_matched // history.identity.block :]
        for digest in (history.whole, *reversed(longer)):
            for owner in self._owners_by_digest.get((history.identity, digest), ()):
                entry = self._entry_by_user[owner]
                reason, num_shared = compare(entry.content, history)
                if num_shared > num_matched and not self._is_expired(entry, now):
                    return entry, reason, num_shared
        return None

    def _is_expired(self, entry: Entry, now: float) -> bool:
        is_idle = now - entry.used_at > self.rules.idle_ttl_s and not entry.pinned_bytes
        return is_idle or now - entry.encoded_at > self.rules.ttl_s

    def _insert(self, new: Entry, kv: Tensor, base: Entry | None, num_kept: int) -> bool:
        """Write rows to pages and replace the user's entry; return False if there is no room."""
        own = self._entry_by_user.get(new.user_id)
        in_place = base is not None and base is own and base.num_leases == 1
        num_pages = self.pool.pages_for(new.num_rows)
        num_own = len(own.pages) if own is not None and (in_place or not own.num_leases) else 0
        if not self._has_room(new.user_id, num_pages, num_own):
            return False
        # An entry without rows counts as one page: with size 0 it would never be evicted.
        evicted = self._admit(new, own, max(num_pages, 1) * self.pool.page_bytes)
        for user_id in evicted:
            if user_id != new.user_id:
                self._evict(self._entry_by_user[user_id], num_pages - num_own)
        if base is not None and not in_place:  # Other requests read its pages, now or later.
            kv = torch.cat([self.pool.read(base.pages, num_kept), kv], dim=1)
            num_kept = 0
        if own is not None and not in_place:
            self._remove(own)
        pages = own.pages if own is not None and in_place else []
        has_pages = self._resize(pages, num_pages)
        if own is not None and in_place:
            if has_pages:  # Otherwise the pages stay with the entry that the caller leases.
                own.pages = []
                written = own.content.blocks
                if new.content.blocks[: len(written)] == written:
                    new.num_published = own.num_published
            self._remove(own)
        if not has_pages:
            self._policy.remove(new.user_id)
            return False
        new.pages = pages
        self.pool.write(pages, kv, num_kept)
        self._add(new)
        if new.user_id in evicted:
            self._evict(new, 0)
        return True

    def _has_room(self, user_id: str, num_pages: int, num_own: int) -> bool:
        """Return whether enough pages are free or can be freed; nothing is evicted yet."""
        capacity_bytes = self._policy.capacity_bytes
        if user_id in self._pinned_users:
            capacity_bytes = max(capacity_bytes, self.rules.pinned_bytes)
        if num_pages * self.pool.page_bytes > capacity_bytes:
            return False
        num_available = self.pool.num_free + num_own
        if num_available >= num_pages:
            return True
        others = [entry for entry in self._entry_by_user.values() if entry.user_id != user_id]
        num_available += sum(len(entry.pages) for entry in others if entry.num_leases == 0)
        if num_available < num_pages:
            return False
        for entry in others:
            if entry.num_leases:
                # Evicting a leased entry frees no page, so prefer to evict others.
                self._policy.touch(entry.user_id)
        return True

    def _admit(self, new: Entry, own: Entry | None, num_bytes: int) -> list[str]:
        """Return the users to evict for an entry, maybe its own; none for the pinned reserve."""
        if new.user_id in self._pinned_users:
            held_bytes = self._pinned_held_bytes - (0 if own is None else own.pinned_bytes)
            if held_bytes + num_bytes <= self.rules.pinned_bytes:
                new.pinned_bytes = num_bytes
        if new.pinned_bytes:
            self._policy.remove(new.user_id)
            return []
        return self._policy.put(new.user_id, num_bytes)

    def _resize(self, pages: list[int], num_pages: int) -> bool:
        """Allocate or free pages at the end of a list; return False if too few are free."""
        if len(pages) < num_pages:
            last = pages[-1] if pages else -1
            added = self.pool.allocate(num_pages - len(pages), after=last)
            if added is None:
                return False
            pages += added
        self.pool.free(pages[num_pages:])
        del pages[num_pages:]
        return True

    def _evict(self, entry: Entry, num_needed: int) -> None:
        """Evict an entry and offer it to the next tier; the caller needs so many free pages."""
        self._remove(entry, free_pages=False)
        remember(self._evicted_users, entry.user_id, 0.0)
        self.metrics.count("evictions", tier=PAGES)
        self.metrics.observe("evicted_age_seconds", self.clock() - entry.encoded_at, tier=PAGES)
        if self._on_evict is not None:
            kv = self.pool.read(entry.pages, entry.num_rows)
            if self.pool.num_free < num_needed:
                # Its pages are needed now.
                self._on_evict(entry, kv.clone(), lambda: None)
            elif self._on_evict(entry, kv, partial(self.release, entry)):
                entry.num_leases += 1
        self._free_if_unused(entry)

    def _drop(self, entry: Entry) -> None:
        """Remove an entry without offering it to the next tier."""
        self._policy.remove(entry.user_id)
        self._remove(entry)

    def _add(self, entry: Entry) -> None:
        self._entry_by_user[entry.user_id] = entry
        self._evicted_users.pop(hash(entry.user_id), None)
        self._pinned_held_bytes += entry.pinned_bytes
        if self.rules.share == CONTENT:
            for digest in (*entry.content.blocks, entry.content.whole):
                key = entry.content.identity, digest
                self._owners_by_digest.setdefault(key, {})[entry.user_id] = None

    def _remove(self, entry: Entry, *, free_pages: bool = True) -> None:
        del self._entry_by_user[entry.user_id]
        entry.dropped = True
        self._pinned_held_bytes -= entry.pinned_bytes
        if self.rules.share == CONTENT:
            for digest in (*entry.content.blocks, entry.content.whole):
                key = entry.content.identity, digest
                owners = self._owners_by_digest.get(key, {})
                owners.pop(entry.user_id, None)
                if not owners:
                    self._owners_by_digest.pop(key, None)
        if free_pages:
            self._free_if_unused(entry)

    def _free_if_unused(self, entry: Entry) -> None:
        if entry.dropped and entry.num_leases == 0:
            self.pool.free(entry.pages)


def remember(users: OrderedDict[int, float], user_id: str, value: float) -> None:
    """Store a value under the hash of a user id; only the last ``MAX_REMEMBERED`` users stay."""
    users[hash(user_id)] = value
    users.move_to_end(hash(user_id))
    if len(users) > MAX_REMEMBERED:
        users.popitem(last=False)
