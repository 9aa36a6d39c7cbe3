"""The cache of K/V between requests: look up by identity, put, evict the least recently used user.

An entry is used again only if the digest of the whole history matches; anything else is a miss with
its reason. Entries of requests in flight are pinned: their pages outlive eviction and replacement.
"""

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from torchrec_kvshare.cache.pages import PagePool

HIT = "hit"
# Why K/V is not there, or not used.
COLD = "cold"
EVICTED = "evicted"
EDITED = "edited"
SHRUNK = "shrunk"
TOO_SHORT = "too_short"
NOT_ADMITTED = "not_admitted"

MAX_REMEMBERED_EVICTIONS = 65_536  # users; only so that a miss can say "evicted"


@dataclass(eq=False)
class Entry:
    """One history's K/V: its digest, its pages, and who holds it."""

    digest: bytes
    num_events: int
    pages: list[int]
    num_pins: int = 0
    dropped: bool = False


class Lookup(NamedTuple):
    """What a look-up found: an entry, or the reason why there is none."""

    entry: Entry | None
    reason: str


class KVCache:
    """Histories' K/V by user, within the byte budget of a page pool; safe to share between threads.

    Args:
        pool: where the K/V lies; the cache is its only user.

    Example:
        >>> import torch
        >>> cache = KVCache(PagePool(4096, 4, 2, 2, 8))
        >>> cache.lookup("7", b"abc", 3).reason
        'cold'
        >>> entry = cache.put("7", b"abc", torch.zeros(2, 3, 2, 8), 3)
        >>> cache.release(entry)
        >>> cache.lookup("7", b"abc", 3).reason, cache.lookup("7", b"xyz", 3).reason
        ('hit', 'edited')
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.counts: Counter[str] = Counter()
        self._entry_by_user: OrderedDict[str, Entry] = OrderedDict()
        self._evicted_users: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that hold K/V."""
        return (self.pool.num_pages - self.pool.num_free) * self.pool.page_bytes

    def lookup(self, user_id: str, digest: bytes, num_events: int) -> Lookup:
        """Find the K/V of exactly this history; a found entry is pinned until ``release``."""
        with self._lock:
            found = self._lookup(user_id, digest, num_events)
            self.counts[found.reason] += 1
            return found

    def put(self, user_id: str, digest: bytes, kv: Tensor, num_events: int) -> Entry | None:
        """Keep the K/V of a user's history in place of what the user had; pinned until ``release``.

        Args:
            user_id: whose it is.
            digest: of the whole history.
            kv: [planes, R, H, D].
            num_events: of the history.

        Returns:
            The entry, or None if the pages that nobody is using do not suffice: nothing has changed
            then.

        Raises:
            ShapeError: if the K/V is not of the pool's planes, heads and head width.
        """
        self.pool.check(kv)
        with self._lock:
            pages = self._make_room(user_id, self.pool.pages_for(kv.size(1)))
            if pages is None:
                self.counts[NOT_ADMITTED] += 1
                return None
            self.pool.write(pages, kv)
            entry = Entry(digest, num_events, pages, num_pins=1)
            self._entry_by_user[user_id] = entry
            self._evicted_users.pop(user_id, None)
            return entry

    def release(self, entry: Entry) -> None:
        """Unpin an entry that ``lookup`` or ``put`` gave out."""
        with self._lock:
            assert entry.num_pins > 0
            entry.num_pins -= 1
            self._free_if_unused(entry)

    def forget(self, user_id: str) -> int:
        """Drop what is kept of a user; returns the bytes that it was."""
        with self._lock:
            self._evicted_users.pop(user_id, None)
            entry = self._entry_by_user.get(user_id)
            if entry is None:
                return 0
            self._drop(user_id)
            return len(entry.pages) * self.pool.page_bytes

    def _lookup(self, user_id: str, digest: bytes, num_events: int) -> Lookup:
        entry = self._entry_by_user.get(user_id)
        if entry is None:
            return Lookup(None, EVICTED if user_id in self._evicted_users else COLD)
        if entry.digest != digest:
            return Lookup(None, SHRUNK if num_events < entry.num_events else EDITED)
        self._entry_by_user.move_to_end(user_id)
        entry.num_pins += 1
        return Lookup(entry, HIT)

    def _make_room(self, user_id: str, num_pages: int) -> list[int] | None:
        """Pages for a new entry, at the cost of the user's old one and the least recently used."""
        own = self._entry_by_user.get(user_id)
        victims = [] if own is None else [user_id]
        num_reachable = self.pool.num_free
        if own is not None and own.num_pins == 0:
            num_reachable += len(own.pages)
        for other, entry in self._entry_by_user.items():
            if num_reachable >= num_pages:
                break
            if entry.num_pins == 0 and other != user_id:
                victims.append(other)
                num_reachable += len(entry.pages)
        if num_reachable < num_pages:
            return None
        for victim in victims:
            self._drop(victim)
            if victim != user_id:
                self._remember_eviction(victim)
        return self.pool.allocate(num_pages)

    def _drop(self, user_id: str) -> None:
        entry = self._entry_by_user.pop(user_id)
        entry.dropped = True
        self._free_if_unused(entry)

    def _free_if_unused(self, entry: Entry) -> None:
        if entry.dropped and entry.num_pins == 0:
            self.pool.free(entry.pages)

    def _remember_eviction(self, user_id: str) -> None:
        self.counts["evictions"] += 1
        self._evicted_users[user_id] = None
        if len(self._evicted_users) > MAX_REMEMBERED_EVICTIONS:
            self._evicted_users.popitem(last=False)
