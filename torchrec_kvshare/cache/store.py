"""All K/V that is kept between requests for one model: pages on the device, and the tiers below.

What is asked for is brought to the device and held there, wherever it lay; what is put goes on to
the tiers that want it.
"""

import logging
import time
from collections.abc import Collection, Hashable, Sequence

from torch import Tensor

from torchrec_kvshare.cache.identity import Content, PrefixDigests
from torchrec_kvshare.cache.kv_cache import CONTENT, PAGES, Entry, KVCache, Lookup
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.reasons import COLD, EVICTED, EXPIRED, TIER_ERROR
from torchrec_kvshare.cache.single_flight import Flights
from torchrec_kvshare.cache.stack import TierStack, Want
from torchrec_kvshare.errors import ShapeError
from torchrec_kvshare.features.ids import canonical_id
from torchrec_kvshare.features.schema import RawId

logger = logging.getLogger(__name__)

NOT_HERE = (COLD, EVICTED, EXPIRED)


class KVStore:
    """Where an engine's K/V lies, and which of it may be used.

    Args:
        caches: on the device, one for each history of the schema; they share one clock and metrics.
        stack: tiers below them, with the same clock; other models' stores may share it.
        extends: whether K/V may be extended by new events; else whole histories alone are used.
        min_events: requests with fewer are not kept.
        context: context columns that history rows read; K/V is kept apart by their values.
        wait_s: for another request that is encoding the same history.

    Example:
        >>> from torchrec_kvshare.cache.pages import PagePool
        >>> store = KVStore([KVCache(PagePool(4096, 4, 2, 2, 8))])
        >>> store.forget("7")
        {'pages': 0}
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        stack: TierStack | None = None,
        extends: bool = True,
        min_events: int = 0,
        context: Sequence[str] = (),
        wait_s: float = 1.0,
    ) -> None:
        self.caches = tuple(caches)
        self.stack = stack
        self.extends = extends
        self.min_events = min_events
        self.context = tuple(context)
        self.flights = Flights()
        self.wait_s = wait_s

    @property
    def metrics(self) -> CacheMetrics:
        """What all of it counts."""
        return self.caches[0].metrics

    def fetch(self, wants: Sequence[tuple[int, Want]], lookups: Sequence[Lookup]) -> list[Lookup]:
        """Ask the tiers below for what the device lacks, and bring it up.

        Args:
            wants: each with the number of its history.
            lookups: what the device had.

        Returns:
            The look-ups that are the best now; their entries are held, as those given still are.
        """
        if self.stack is None or not wants:
            return list(lookups)
        best = []
        fetched = self.stack.fetch([want for _, want in wants])
        for (number, want), found, lookup in zip(wants, fetched, lookups, strict=True):
            record = found.record
            if record is None:
                # The device knows better what became of K/V that it has, or had a part of.
                is_known = lookup.entry is not None or lookup.reason not in NOT_HERE
                best.append(
                    lookup if is_known or not found.reason else lookup._replace(reason=found.reason)
                )
                continue
            try:
                entry = self.caches[number].put(
                    want.user_id, record.content, record.kv, encoded_at=record.encoded_at
                )
            except ShapeError as error:  # Somebody wrote K/V that no model of ours made.
                logger.warning("K/V in tier %s is not used: %s", found.tier, error)
                self.metrics.count("tier_failures", tier=found.tier, kind="corrupt")
                best.append(lookup._replace(reason=TIER_ERROR))
                continue
            if entry is None:
                best.append(lookup)
            else:
                entry.num_published = entry.num_events
                best.append(Lookup(entry, found.reason, found.num_matched, lookup.at, found.tier))
        return best

    def put(
        self, number: int, user_id: str, content: Content, kv: Tensor, lookup: Lookup, num_kept: int
    ) -> Entry | None:
        """Keep rows behind the first ``num_kept`` of what was looked up; see ``KVCache.put``."""
        cache = self.caches[number]
        base = lookup.entry if num_kept else None
        entry = cache.put(user_id, content, kv, base, num_kept, lookup.at)
        if entry is not None and self.stack is not None:
            self.stack.publish(cache, entry)
        return entry

    def rows(self, number: int, entry: Entry | None, num_rows: int) -> Tensor:
        """The first rows [planes, R, H, D] of an entry; no rows of none."""
        return self.caches[number].pool.read([] if entry is None else entry.pages, num_rows)

    def release(self, number: int, entry: Entry) -> None:
        """Give back what a look-up or ``put`` gave out."""
        self.caches[number].release(entry)

    def flight_key(self, user_id: str, histories: Sequence[PrefixDigests]) -> Hashable:
        """What two requests have in common that need the same K/V."""
        is_shared = self.caches[0].rules.share == CONTENT
        wholes = tuple((history.identity, history.whole) for history in histories)
        return ("" if is_shared else user_id, wholes)

    def join(self, keys: Sequence[Hashable]) -> None:
        """Wait until others have encoded what these requests need, as far as the time allows."""
        deadline = time.monotonic() + self.wait_s
        for key in keys:
            has_landed = self.flights.wait(key, max(0.0, deadline - time.monotonic()))
            self.metrics.count("flights", outcome="joined" if has_landed else "timed_out")
            self.metrics.count("hits_by_scope", float(has_landed), scope="request")

    def knows(self, user_id: str) -> bool:
        """Whether the device has K/V of a user; which, and whether it is right, is not asked."""
        return all(cache.knows(user_id) for cache in self.caches)

    def count_hit(self, user_id: str, lookups: Sequence[Lookup]) -> None:
        """Count a request whose K/V was all there, by whose it was."""
        owners = {lookup.entry.user_id for lookup in lookups if lookup.entry is not None}
        is_own = owners <= {user_id}
        self.metrics.count("hits_by_scope", scope="cross_request" if is_own else "cross_user")

    def forget(self, user_id: RawId) -> dict[str, int | None]:
        """Drop a user's K/V from every tier; what is being encoded now is not kept either.

        Args:
            user_id: in any spelling that a request may have.

        Returns:
            Bytes dropped by tier; None for a tier that could not be reached, and is to be asked
            again.
        """
        user = canonical_id(user_id)
        # The device last: what is brought up meanwhile goes too.
        below = {} if self.stack is None else self.stack.forget(user)
        dropped = sum(cache.forget(user) for cache in self.caches)
        self.metrics.count("forgotten_bytes", dropped, tier=PAGES)
        return {PAGES: dropped} | below

    def clear(self, model_version: str) -> dict[str, int | None]:
        """Drop the K/V of one model version from every tier; bytes as in ``forget``."""
        dropped = {PAGES: sum(cache.clear(model_version) for cache in self.caches)}
        return dropped | ({} if self.stack is None else self.stack.clear(model_version))

    def close(self) -> None:
        """Write what waits, and let go of the tiers below."""
        if self.stack is not None:
            self.stack.close()

    def pin(self, user_ids: Collection[RawId]) -> None:
        """Keep these users' K/V, from the next time it is put, where nobody evicts it."""
        for cache in self.caches:
            for user_id in user_ids:
                cache.pin(canonical_id(user_id))

    def unpin(self, user_ids: Collection[RawId]) -> None:
        """Let these users be evicted again."""
        for cache in self.caches:
            for user_id in user_ids:
                cache.unpin(canonical_id(user_id))
