"""All K/V kept between requests for one model: the ``pages`` tier and the tiers below it.

K/V found in a lower tier is promoted to pages and leased there. New K/V is put into pages and
published to the lower tiers.
"""

import logging
import time
from collections.abc import Collection, Hashable, Sequence

from torch import Tensor

from torchrec_kvshare.cache.identity import Content, PrefixDigests
from torchrec_kvshare.cache.kv_cache import CONTENT, PAGES, Entry, KVCache, Lookup
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.reasons import COLD, EVICTED, EXPIRED, TIER_ERROR
from torchrec_kvshare.cache.single_flight import SingleFlight
from torchrec_kvshare.cache.stack import MissingKV, TierStack
from torchrec_kvshare.errors import ShapeError
from torchrec_kvshare.features.ids import canonical_id
from torchrec_kvshare.features.schema import RawId

logger = logging.getLogger(__name__)

NOT_IN_PAGES = (COLD, EVICTED, EXPIRED)


class KVStore:
    """An engine's K/V store.

    Args:
        caches: the ``pages`` tier, one cache per history of the schema, with one clock and metrics.
        stack: tiers below, with the same clock; may be shared with other models' stores.
        extends: whether cached K/V may be extended by new events; else only whole histories are
            reused.
        min_events: requests with fewer are scored without the cache.
        context: context columns that history rows read; their values are part of the key.
        wait_s: maximum wait for another request that is encoding the same history.

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
        *,
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
        self.single_flight = SingleFlight()
        self.wait_s = wait_s

    @property
    def metrics(self) -> CacheMetrics:
        """Metrics of all tiers."""
        return self.caches[0].metrics

    def fetch(
        self, missing: Sequence[tuple[int, MissingKV]], lookups: Sequence[Lookup]
    ) -> list[Lookup]:
        """Fetch from the tiers below what is missing in pages, and promote it.

        Args:
            missing: each with the index of its history.
            lookups: their results in pages.

        Returns:
            The best look-up for each; entries that were promoted are leased, and those of
            ``lookups`` still are.
        """
        if self.stack is None or not missing:
            return list(lookups)
        best = []
        fetched = self.stack.fetch([missing_kv for _, missing_kv in missing])
        for (index, missing_kv), found, lookup in zip(missing, fetched, lookups, strict=True):
            record = found.record
            if record is None:
                # If pages have an entry, or had one that differs, their reason is the better one.
                is_known = lookup.entry is not None or lookup.reason not in NOT_IN_PAGES
                best.append(
                    lookup if is_known or not found.reason else lookup._replace(reason=found.reason)
                )
                continue
            try:
                entry = self.caches[index].put(
                    missing_kv.user_id, record.content, record.kv, encoded_at=record.encoded_at
                )
            except ShapeError as error:  # Foreign K/V under our key: no model of ours wrote it.
                logger.warning("K/V in tier %s is not used: %s", found.tier, error)
                self.metrics.count("tier_failures", tier=found.tier, kind="corrupt")
                best.append(lookup._replace(reason=TIER_ERROR))
                continue
            if entry is None:
                best.append(lookup)
            else:
                entry.num_published = entry.num_events
                best.append(
                    Lookup(
                        entry,
                        found.reason,
                        num_matched=found.num_matched,
                        at=lookup.at,
                        tier=found.tier,
                    )
                )
        return best

    def put(
        self, index: int, user_id: str, content: Content, kv: Tensor, lookup: Lookup, num_kept: int
    ) -> Entry | None:
        """Keep rows after the first ``num_kept`` of the looked-up entry, and publish the entry.

        See ``KVCache.put``; ``index`` is that of the history.
        """
        cache = self.caches[index]
        base = lookup.entry if num_kept else None
        entry = cache.put(user_id, content, kv, base=base, num_kept=num_kept, encoded_at=lookup.at)
        if entry is not None and self.stack is not None:
            self.stack.publish(cache, entry)
        return entry

    def rows(self, index: int, entry: Entry | None, num_rows: int) -> Tensor:
        """Return the first rows [planes, R, H, D] of an entry of a history; none for None."""
        return self.caches[index].pool.read([] if entry is None else entry.pages, num_rows)

    def release(self, index: int, entry: Entry) -> None:
        """End one lease of an entry of a history."""
        self.caches[index].release(entry)

    def single_flight_key(self, user_id: str, histories: Sequence[PrefixDigests]) -> Hashable:
        """Return a key that is equal for requests that need the same K/V."""
        is_shared = self.caches[0].rules.share == CONTENT
        wholes = tuple((history.identity, history.whole) for history in histories)
        return ("" if is_shared else user_id, wholes)

    def join(self, keys: Sequence[Hashable]) -> None:
        """Wait at most ``wait_s`` until other requests have encoded the K/V of these keys."""
        deadline = time.monotonic() + self.wait_s
        for key in keys:
            has_joined = self.single_flight.wait(key, max(0.0, deadline - time.monotonic()))
            self.metrics.count("flights", outcome="joined" if has_joined else "timed_out")
            self.metrics.count("hits_by_scope", float(has_joined), scope="request")

    def contains(self, user_id: str) -> bool:
        """Return whether pages have K/V of a user in every history, valid or not."""
        return all(cache.contains(user_id) for cache in self.caches)

    def count_hit(self, user_id: str, lookups: Sequence[Lookup]) -> None:
        """Count a full hit by its scope: the user's own K/V, or another user's."""
        owners = {lookup.entry.user_id for lookup in lookups if lookup.entry is not None}
        is_own = owners <= {user_id}
        self.metrics.count("hits_by_scope", scope="cross_request" if is_own else "cross_user")

    def forget(self, user_id: RawId) -> dict[str, int | None]:
        """Drop a user's K/V from every tier; K/V that is being encoded now will be refused.

        Args:
            user_id: in any spelling that a request may use.

        Returns:
            Bytes dropped by tier; None for a tier that could not be reached: call again later.
        """
        user = canonical_id(user_id)
        # Pages last, so that K/V promoted meanwhile is dropped too.
        below = {} if self.stack is None else self.stack.forget(user)
        dropped = sum(cache.forget(user) for cache in self.caches)
        self.metrics.count("forgotten_bytes", dropped, tier=PAGES)
        return {PAGES: dropped} | below

    def clear(self, kv_version: str) -> dict[str, int | None]:
        """Drop the K/V of one version, see ``KVVersion``, from every tier; bytes as in ``forget``.

        All models whose ``ModelVersion.kv_versions`` name it lose that K/V.
        """
        dropped = {PAGES: sum(cache.clear(kv_version) for cache in self.caches)}
        return dropped | ({} if self.stack is None else self.stack.clear(kv_version))

    def close(self) -> None:
        """Write queued K/V, then close the tiers below."""
        if self.stack is not None:
            self.stack.close()

    def pin(self, user_ids: Collection[RawId]) -> None:
        """Put these users' K/V into the pinned reserve, as far as it has room for them."""
        for cache in self.caches:
            for user_id in user_ids:
                cache.pin(canonical_id(user_id))

    def unpin(self, user_ids: Collection[RawId]) -> None:
        """Make these users' K/V evictable again."""
        for cache in self.caches:
            for user_id in user_ids:
                cache.unpin(canonical_id(user_id))
