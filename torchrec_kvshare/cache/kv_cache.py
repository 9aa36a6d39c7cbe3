"""The cache of K/V between requests: look up by identity, put, evict the least recently used user.

K/V is used again as far as the digests of the events agree; what is missing has its reason. Entries
of requests in flight are pinned: their pages outlive eviction and replacement, and nobody writes
to them.
"""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.cache.identity import PrefixDigests
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.errors import ConfigError

HIT = "hit"
# Why K/V is not there, or not used.
COLD = "cold"
EXPIRED = "expired"
EVICTED = "evicted"
EDITED = "edited"
SHRUNK = "shrunk"
SLID = "slid"
TOO_SHORT = "too_short"
NOT_ADMITTED = "not_admitted"

MAX_REMEMBERED_EVICTIONS = 65_536  # users; only so that a miss can say "evicted"


@dataclass(eq=False)
class Entry:
    """One history's K/V: what it is of, its pages, how old it is, and who holds it."""

    digests: tuple[bytes, ...]
    whole_digest: bytes
    first_event: int
    num_events: int
    pages: list[int]
    encoded_at: float  # seconds: when its oldest K/V was put, whatever was put behind that since
    used_at: float
    num_pins: int = 0
    dropped: bool = False


class Lookup(NamedTuple):
    """What a look-up found.

    Attributes:
        entry: K/V of the history or of one that begins as it does, pinned; or None.
        reason: ``hit``, or why K/V of some events is missing.
        num_matched: events that both begin with.
    """

    entry: Entry | None
    reason: str
    num_matched: int


class KVCache:
    """Histories' K/V by user, within the byte budget of a page pool; safe to share between threads.

    Args:
        pool: where the K/V lies; the cache is its only user.
        ttl_s: seconds after which K/V is encoded anew.
        idle_ttl_s: seconds after which it is, if nobody used it.
        clock: seconds that only go forward.

    Raises:
        ConfigError: if a time to live is not above zero.

    Example:
        >>> from torchrec_kvshare.data.schema import FeatureSchema, History, Window
        >>> from torchrec_kvshare.features import Events
        >>> schema = FeatureSchema({}, (), False, (), (), (History("history", Window(8, 4)),))
        >>> three = PrefixDigests(Events({"time": torch.arange(3)}, {}, 0), schema, 4)
        >>> cache = KVCache(PagePool(4096, 4, 2, 2, 8))
        >>> cache.lookup("7", three).reason
        'cold'
        >>> cache.release(cache.put("7", three, torch.zeros(2, 3, 2, 8)))
        >>> cache.lookup("7", three).reason
        'hit'
    """

    def __init__(
        self,
        pool: PagePool,
        ttl_s: float = math.inf,
        idle_ttl_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, seconds in (("ttl_s", ttl_s), ("idle_ttl_s", idle_ttl_s)):
            if not seconds > 0.0:
                raise ConfigError(f"{name} is {seconds}; it must be above 0 seconds")
        self.pool = pool
        self.ttl_s = ttl_s
        self.idle_ttl_s = idle_ttl_s
        self._clock = clock
        self.counts: Counter[str] = Counter()
        self._entry_by_user: OrderedDict[str, Entry] = OrderedDict()
        self._evicted_users: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that hold K/V."""
        return (self.pool.num_pages - self.pool.num_free) * self.pool.page_bytes

    def lookup(self, user_id: str, history: PrefixDigests) -> Lookup:
        """Find K/V of what a history begins with; a found entry is pinned until ``release``."""
        with self._lock:
            found = self._lookup(user_id, history)
            self.counts[found.reason] += 1
            return found

    def put(
        self,
        user_id: str,
        history: PrefixDigests,
        kv: Tensor,
        base: Entry | None = None,
        num_kept: int = 0,
    ) -> Entry | None:
        """Keep the K/V of a user's history in place of what the user had; pinned until ``release``.

        Args:
            user_id: whose it is.
            history: what it is of.
            kv: [planes, R, H, D], the rows behind those kept.
            base: an entry that the caller has pinned, whose first rows are the history's too.
            num_kept: how many of them.

        Returns:
            The entry, or None if the pages that nobody is using do not suffice: nothing has changed
            then.

        Raises:
            ShapeError: if the K/V is not of the pool's planes, heads and head width.
        """
        self.pool.check(kv)
        with self._lock:
            if base is not None and base.num_pins == 1 and not base.dropped:
                entry = self._grow(user_id, base, kv, num_kept)
            else:
                if base is not None:  # Someone else reads its pages, or will.
                    kv = torch.cat([self.pool.read(base.pages, num_kept), kv], dim=1)
                entry = self._replace(user_id, kv, base)
            if entry is None:
                self.counts[NOT_ADMITTED] += 1
                return None
            entry.digests, entry.whole_digest = history.blocks, history.whole
            entry.first_event, entry.num_events = history.first_event, history.num_events
            entry.num_pins += 1
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

    def _lookup(self, user_id: str, history: PrefixDigests) -> Lookup:
        entry = self._entry_by_user.get(user_id)
        if entry is None:
            return Lookup(None, EVICTED if user_id in self._evicted_users else COLD, 0)
        now = self._clock()
        if now - entry.encoded_at > self.ttl_s or now - entry.used_at > self.idle_ttl_s:
            self._drop(user_id)
            return Lookup(None, EXPIRED, 0)
        if entry.first_event != history.first_event:
            return Lookup(None, SLID, 0)
        reason, num_matched = _compare(entry, history)
        if num_matched == 0:
            return Lookup(None, reason, 0)
        self._entry_by_user.move_to_end(user_id)
        entry.used_at = now
        entry.num_pins += 1
        return Lookup(entry, reason, num_matched)

    def _replace(self, user_id: str, kv: Tensor, base: Entry | None) -> Entry | None:
        """A new entry in place of what the user had, without its identity yet."""
        own = self._entry_by_user.get(user_id)
        num_pages = self.pool.pages_for(kv.size(1))
        freed = 0 if own is None or own.num_pins else len(own.pages)
        if not self._make_room(user_id, num_pages - freed):
            return None
        if own is not None:
            self._drop(user_id)
        pages = self.pool.allocate(num_pages)
        assert pages is not None
        self.pool.write(pages, kv)
        now = self._clock()
        entry = Entry((), b"", 0, 0, pages, now if base is None else base.encoded_at, now)
        self._entry_by_user[user_id] = entry
        self._evicted_users.pop(user_id, None)
        return entry

    def _grow(self, user_id: str, entry: Entry, kv: Tensor, num_kept: int) -> Entry | None:
        """Put rows behind the kept ones of an entry that nobody else reads."""
        num_pages = self.pool.pages_for(num_kept + kv.size(1))
        missing = num_pages - len(entry.pages)
        if not self._make_room(user_id, missing):
            return None
        if missing > 0:
            added = self.pool.allocate(missing, after=entry.pages[-1])
            assert added is not None
            entry.pages += added
        self.pool.free(entry.pages[num_pages:])
        del entry.pages[num_pages:]
        self.pool.write(entry.pages, kv, num_kept)
        return entry

    def _make_room(self, user_id: str, num_pages: int) -> bool:
        """Drop the least recently used of other users until so many pages are free, or nothing."""
        victims = []
        num_reachable = self.pool.num_free
        for other, entry in self._entry_by_user.items():
            if num_reachable >= num_pages:
                break
            if entry.num_pins == 0 and other != user_id:
                victims.append(other)
                num_reachable += len(entry.pages)
        if num_reachable < num_pages:
            return False
        for victim in victims:
            self._drop(victim)
            self._remember_eviction(victim)
        return True

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


def _compare(entry: Entry, history: PrefixDigests) -> tuple[str, int]:
    """Why K/V of some of a history's events is missing, and with how many both begin."""
    num_events = entry.num_events
    if num_events <= history.num_events and entry.whole_digest == history.at(num_events):
        return (HIT if num_events == history.num_events else COLD), num_events
    num_blocks = 0
    for ours, theirs in zip(history.blocks, entry.digests, strict=False):
        if ours != theirs:
            break
        num_blocks += 1
    reason = SHRUNK if history.num_events < num_events else EDITED
    return reason, num_blocks * history.block
