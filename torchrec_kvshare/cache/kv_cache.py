"""The device tier: K/V in pages, looked up by user and by what the history begins with.

K/V is used again as far as the digests of the events agree; what is missing has its reason. Entries
of requests in flight are held: their pages outlive eviction and replacement, and nobody writes to
them.
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
# Whose K/V a history may use.
USER = "user"
CONTENT = "content"
MAX_REMEMBERED = 65_536  # users that were evicted or forgotten, at most


@dataclass(frozen=True)
class Rules:
    """How long K/V is used, and by whom.

    Attributes:
        ttl_s: seconds after which K/V is encoded anew.
        idle_ttl_s: seconds after which it is, if nobody used it.
        share: ``user``, or ``content``: K/V of another user's history that begins in the same way
            is used too.
        pinned_bytes: kept for pinned users, whom nobody evicts.

    Raises:
        ConfigError: naming what cannot work.
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
    """One history's K/V: what it is of, its pages, how old it is, and who holds it."""

    user_id: str
    content: Content
    num_rows: int
    pages: list[int]
    encoded_at: float  # when its oldest K/V was, whatever was put behind that since
    known_at: float  # since when it is its user's: of no use if that was forgotten later
    used_at: float
    num_holders: int = 0
    dropped: bool = False
    pinned_bytes: int = 0  # of the reserve of pinned users
    num_published: int = 0  # events whose K/V lower tiers were given

    @property
    def num_events(self) -> int:
        """Events that it is of."""
        return self.content.num_events


class Lookup(NamedTuple):
    """What a look-up found.

    Attributes:
        entry: K/V of the history or of one that begins as it does, held; or None.
        reason: ``hit``, or why K/V of some events is missing.
        num_matched: events that both begin with.
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
    """Takes an evicted entry's K/V to the next tier, or does not; must not wait."""

    def __call__(self, entry: Entry, kv: Tensor, release: Callable[[], None]) -> bool:
        """Whether it was taken; ``release`` is called then, later, when ``kv`` was read."""


class KVCache:
    """Histories' K/V by user, within the byte budget of a page pool; safe to share between threads.

    Args:
        pool: where the K/V lies; the cache is its only user.
        rules: how long it is used, and by whom.
        policy: who leaves when it is full; the least recently used user by default. Pages beyond
            its capacity serve requests in flight and K/V on its way to the next tier.
        clock: Unix seconds that only go forward.
        on_evict: the next tier.
        metrics: where look-ups and evictions are counted.

    Raises:
        ConfigError: if the policy and pinned users were promised more than the pool has.

    Example:
        >>> from torchrec_kvshare.features.schema import FeatureSchema, History, Window
        >>> from torchrec_kvshare.cache.identity import Identity
        >>> from torchrec_kvshare.features.parse import Events
        >>> schema = FeatureSchema({}, (), False, (), (), (History("history", Window(8, 4)),))
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
        # Only where users share content.
        self._owners_by_digest: dict[tuple[Identity, bytes], dict[str, None]] = {}
        self._pinned_users: set[str] = set()
        self._pinned_held_bytes = 0
        # By hashes of users: 64 bits however long an id is. Two users that share one, once in
        # 2**64 pairs, cost a wrong reason or K/V that is not kept.
        self._evicted_users: OrderedDict[int, float] = OrderedDict()
        self._forgotten_at: OrderedDict[int, float] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that hold K/V."""
        return (self.pool.num_pages - self.pool.num_free) * self.pool.page_bytes

    def lookup(self, user_id: str, history: PrefixDigests) -> Lookup:
        """Find K/V of what a history begins with; a found entry is held until ``release``."""
        start = time.perf_counter()
        with self._lock:
            now = self.clock()
            entry, reason, num_matched = self._lookup(user_id, history, now)
            self._policy.touch(user_id)
            if entry is not None:
                if entry.user_id != user_id:
                    self._policy.touch(entry.user_id)
                entry.used_at = now
                entry.num_holders += 1
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
        """Keep the K/V of a user's history in place of what the user had; held until ``release``.

        Args:
            user_id: whose it is.
            content: the history.
            kv: [planes, R, H, D], the rows behind those kept.
            base: an entry that the caller holds, whose first rows are the history's too.
            num_kept: how many of them.
            encoded_at: Unix seconds; now by default, with a base the base's if that is older.

        Returns:
            The entry, or None if the pages that nobody is using do not suffice or the user was
            forgotten since ``encoded_at``; the base is as it was then.

        Raises:
            ShapeError: if the K/V is not of the pool's planes, heads and head width.
        """
        self.pool.check(kv)
        with self._lock:
            now = self.clock()
            # What is forgotten is what was made of this user's events.
            known_at = encoded_at = now if encoded_at is None else encoded_at
            if base is not None:
                encoded_at = min(encoded_at, base.encoded_at)
            if base is not None and base.user_id == user_id:
                known_at = min(known_at, base.known_at)
            num_rows = num_kept + kv.size(1)
            new = Entry(user_id, content, num_rows, [], encoded_at, known_at, now, 1)
            if known_at > self._forgotten_at.get(hash(user_id), -math.inf):
                if self._place(new, kv, base, num_kept):
                    return new
                remember(self._evicted_users, user_id, 0.0)
        self.metrics.count("not_kept", tier=PAGES)
        return None

    def knows(self, user_id: str) -> bool:
        """Whether there is K/V of a user, right for its history or not."""
        return user_id in self._entry_by_user

    @property
    def num_held(self) -> int:
        """Entries that somebody reads."""
        with self._lock:
            return sum(entry.num_holders > 0 for entry in self._entry_by_user.values())

    def hold(self, entry: Entry) -> Tensor:
        """The K/V [planes, R, H, D] of an entry that the caller holds, held once more."""
        with self._lock:
            assert entry.num_holders > 0
            entry.num_holders += 1
        return self.pool.read(entry.pages, entry.num_rows)

    def release(self, entry: Entry) -> None:
        """Give back an entry that ``lookup``, ``put`` or ``hold`` gave out."""
        with self._lock:
            assert entry.num_holders > 0
            entry.num_holders -= 1
            self._free_if_unused(entry)

    def forget(self, user_id: str) -> int:
        """Drop what is kept of a user, pinned or not; K/V that is being encoded now is not kept.

        Returns:
            Bytes that were dropped.
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

    def clear(self, model_version: str) -> int:
        """Drop the K/V of one model version; returns the bytes that it was."""
        with self._lock:
            entries = [
                entry
                for entry in self._entry_by_user.values()
                if entry.content.identity.model_version == model_version
            ]
            num_pages = sum(len(entry.pages) for entry in entries)
            for entry in entries:
                self._drop(entry)
            return num_pages * self.pool.page_bytes

    def pin(self, user_id: str) -> None:
        """Keep a user's K/V, from the next time it is put, where nobody evicts it."""
        with self._lock:
            self._pinned_users.add(user_id)

    def unpin(self, user_id: str) -> None:
        """Let a user be evicted again, from the next time its K/V is put."""
        with self._lock:
            self._pinned_users.discard(user_id)

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
        """The entry of another user that begins as the history does, for longer than so far."""
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

    def _place(self, new: Entry, kv: Tensor, base: Entry | None, num_kept: int) -> bool:
        """Put rows into pages and the entry in place of what its user had; False for no room."""
        own = self._entry_by_user.get(new.user_id)
        grows = base is not None and base is own and base.num_holders == 1
        num_pages = self.pool.pages_for(new.num_rows)
        num_own = len(own.pages) if own is not None and (grows or not own.num_holders) else 0
        if not self._has_room(new.user_id, num_pages, num_own):
            return False
        # One without rows counts as a page: what has no size would never leave.
        leavers = self._admit(new, own, max(num_pages, 1) * self.pool.page_bytes)
        for leaver in leavers:
            if leaver != new.user_id:
                self._evict(self._entry_by_user[leaver], num_pages - num_own)
        if base is not None and not grows:  # Someone else reads its pages, or will.
            kv = torch.cat([self.pool.read(base.pages, num_kept), kv], dim=1)
            num_kept = 0
        if own is not None and not grows:
            self._take_out(own)
        pages = own.pages if own is not None and grows else []
        has_pages = self._resize(pages, num_pages)
        if own is not None and grows:
            if has_pages:  # Otherwise they stay with the entry that the caller holds.
                own.pages = []
                written = own.content.blocks
                if new.content.blocks[: len(written)] == written:
                    new.num_published = own.num_published
            self._take_out(own)
        if not has_pages:
            self._policy.remove(new.user_id)
            return False
        new.pages = pages
        self.pool.write(pages, kv, num_kept)
        self._take_in(new)
        if new.user_id in leavers:
            self._evict(new, 0)
        return True

    def _has_room(self, user_id: str, num_pages: int, num_own: int) -> bool:
        """Whether so many pages can be had, for all that is known before anybody leaves."""
        capacity_bytes = self._policy.capacity_bytes
        if user_id in self._pinned_users:
            capacity_bytes = max(capacity_bytes, self.rules.pinned_bytes)
        if num_pages * self.pool.page_bytes > capacity_bytes:
            return False
        num_reachable = self.pool.num_free + num_own
        if num_reachable >= num_pages:
            return True
        others = [one for one in self._entry_by_user.values() if one.user_id != user_id]
        num_reachable += sum(len(one.pages) for one in others if one.num_holders == 0)
        if num_reachable < num_pages:
            return False
        for one in others:
            if one.num_holders:
                self._policy.touch(one.user_id)  # In use now: let those go that free pages.
        return True

    def _admit(self, new: Entry, own: Entry | None, num_bytes: int) -> list[str]:
        """Users that leave for an entry, maybe its own; none where the reserve has room for it."""
        if new.user_id in self._pinned_users:
            held_bytes = self._pinned_held_bytes - (0 if own is None else own.pinned_bytes)
            if held_bytes + num_bytes <= self.rules.pinned_bytes:
                new.pinned_bytes = num_bytes
        if new.pinned_bytes:
            self._policy.remove(new.user_id)
            return []
        return self._policy.put(new.user_id, num_bytes)

    def _resize(self, pages: list[int], num_pages: int) -> bool:
        """Add pages or give some back; False if there are too few."""
        if len(pages) < num_pages:
            last = pages[-1] if pages else -1
            added = self.pool.allocate(num_pages - len(pages), after=last)
            if added is None:
                return False
            pages += added
        self.pool.free(pages[num_pages:])
        del pages[num_pages:]
        return True

    def _evict(self, entry: Entry, num_wanted: int) -> None:
        """Let an entry leave, to the next tier if there is one."""
        self._take_out(entry, still_read=True)
        remember(self._evicted_users, entry.user_id, 0.0)
        self.metrics.count("evictions", tier=PAGES)
        self.metrics.observe("evicted_age_seconds", self.clock() - entry.encoded_at, tier=PAGES)
        if self._on_evict is not None:
            kv = self.pool.read(entry.pages, entry.num_rows)
            if self.pool.num_free < num_wanted:
                # Its pages are wanted at once.
                self._on_evict(entry, kv.clone(), lambda: None)
            elif self._on_evict(entry, kv, partial(self.release, entry)):
                entry.num_holders += 1
        self._free_if_unused(entry)

    def _drop(self, entry: Entry) -> None:
        """Let an entry go for good."""
        self._policy.remove(entry.user_id)
        self._take_out(entry)

    def _take_in(self, entry: Entry) -> None:
        self._entry_by_user[entry.user_id] = entry
        self._evicted_users.pop(hash(entry.user_id), None)
        self._pinned_held_bytes += entry.pinned_bytes
        if self.rules.share == CONTENT:
            for digest in (*entry.content.blocks, entry.content.whole):
                key = entry.content.identity, digest
                self._owners_by_digest.setdefault(key, {})[entry.user_id] = None

    def _take_out(self, entry: Entry, still_read: bool = False) -> None:
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
        if not still_read:
            self._free_if_unused(entry)

    def _free_if_unused(self, entry: Entry) -> None:
        if entry.dropped and entry.num_holders == 0:
            self.pool.free(entry.pages)


def remember(users: OrderedDict[int, float], user_id: str, value: float) -> None:
    """Note something of a user by a hash of its id; the last ``MAX_REMEMBERED`` users stay."""
    users[hash(user_id)] = value
    users.move_to_end(hash(user_id))
    if len(users) > MAX_REMEMBERED:
        users.popitem(last=False)
