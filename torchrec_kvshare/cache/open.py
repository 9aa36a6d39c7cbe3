"""A store and its tiers from a config: what ``cache=memory`` and ``cache=tiered`` open.

A new tier is one more row of ``TIER_KINDS``: where its config stands, and how it is opened.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.codecs import Codec, get_codec
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.cache.kv_cache import PAGES, KVCache, Rules
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.pages import PagePool, TowerSizes
from torchrec_kvshare.cache.policies import new_policy
from torchrec_kvshare.cache.private import read_secret
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.stack import Level, TierLimits, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.config import CacheConfig, DiskConfig, HostConfig, RemoteConfig
from torchrec_kvshare.errors import TierError

MEMORY, TIERED, OFF = "memory", "tiered", "off"
CACHES = (MEMORY, TIERED, OFF)

TierConfig = HostConfig | DiskConfig | RemoteConfig
Clock = Callable[[], float]

logger = logging.getLogger(__name__)


def new_store(
    towers: Sequence[TowerSizes],
    cache: CacheConfig,
    stack: TierStack | None,
    *,
    extends: bool,
    metrics: CacheMetrics,
    clock: Clock | None = None,
) -> KVStore:
    """Open page pools for a model's K/V.

    Args:
        towers: sizes of the K/V of each history; the capacity is divided by the size of a full
            window.
        cache: capacity, policy and lifetimes.
        stack: tiers below the pages, which engines may share; None for pages alone.
        extends: whether cached K/V may be extended by new events.
        metrics: where lookups and evictions are counted.
        clock: Unix seconds, the same as the stack's; the process's by default.

    Returns:
        The store, its pages empty.

    Raises:
        ConfigError: if the capacity is too small for one page.
    """
    window_sizes = [t.num_planes * t.num_heads * t.head_dim * t.max_rows for t in towers]
    caches = []
    for tower, window_size in zip(towers, window_sizes, strict=True):
        share = window_size / sum(window_sizes)
        pool = PagePool(
            int(cache.capacity_bytes * share),
            page_size=cache.page_size,
            num_planes=tower.num_planes,
            num_heads=tower.num_heads,
            head_dim=tower.head_dim,
        )
        pinned_bytes = int(cache.pinned_bytes * share)
        at_rest = int(pool.capacity_bytes * cache.watermark) - pinned_bytes
        caches.append(
            KVCache(
                pool,
                Rules(cache.ttl_s, cache.idle_ttl_s, cache.share, pinned_bytes),
                policy=new_policy(cache.policy, max(at_rest, pool.page_bytes)),
                clock=clock or steady_clock(),
                on_evict=None if stack is None else stack.demote,
                metrics=metrics,
            )
        )
    metrics.gauge("held_bytes", lambda: sum(one.held_bytes for one in caches), tier=PAGES)
    metrics.gauge("pinned_entries", lambda: sum(one.num_leased for one in caches))
    capacity_bytes = sum(one.pool.capacity_bytes for one in caches)
    metrics.gauge("capacity_bytes", lambda: capacity_bytes, tier=PAGES)
    return KVStore(
        caches,
        stack,
        extends=extends,
        min_events=cache.min_events,
        context=cache.context,
        wait_s=cache.wait_ms / 1e3,
    )


def new_stack(
    cache: CacheConfig,
    break_even_events: Mapping[str, int],
    metrics: CacheMetrics | None = None,
    clock: Clock | None = None,
) -> TierStack:
    """Open the tiers below the pages.

    Args:
        cache: which tiers, and how they are used.
        break_even_events: by tier, the shortest history that is fetched faster than it is encoded;
            used where the config gives no ``min_events``.
        metrics: where everything is counted; new ones by default.
        clock: Unix seconds; the process's by default. A remote tier has its server's in any case.

    Raises:
        ConfigError: if a tier cannot work as configured.
        MissingExtraError: if a tier's packages are not installed.
    """
    metrics, clock = metrics or CacheMetrics(), clock or steady_clock()
    levels = []
    for name, tier in configured_tiers(cache).items():
        min_events = tier.min_events
        if min_events is None:
            min_events = break_even_events.get(name, 0)
        levels.append(TIER_KINDS[name].open(cache, min_events, metrics, clock))
    key = read_key(cache.key_file, "cache.key_file")
    if key is None and cache.remote.url is not None:
        logger.warning(
            "cache.key_file is null: K/V in the remote tier has checksums but no signature, so "
            "anyone who can write there can change scores"
        )
    limits = TierLimits(
        cache.queue_length, cache.queue_bytes, cache.max_failures, cache.pause_ms / 1e3
    )
    return TierStack(levels, cache.ttl_s, key, limits, clock, metrics)


def configured_tiers(cache: CacheConfig) -> dict[str, TierConfig]:
    """Configs of the tiers that a cache uses, by name, fastest first."""
    found = {name: kind.config(cache) for name, kind in TIER_KINDS.items()}
    return {name: config for name, config in found.items() if config is not None}


def codecs_of(cache: CacheConfig, stack: TierStack | None) -> list[Codec]:
    """Codecs of an open stack, or else of the tiers that a config would open."""
    if stack is not None:
        return [level.codec for level in stack.levels]
    if cache.name != TIERED:
        return []
    return [get_codec(tier.codec) for tier in configured_tiers(cache).values()]


class TierKind(NamedTuple):
    """How one kind of tier is configured and opened.

    Attributes:
        config: the tier's part of a cache config; None where the config uses no such tier.
        open: the tier with its level, given the config, ``min_events``, the metrics and the clock.
    """

    config: Callable[[CacheConfig], TierConfig | None]
    open: Callable[[CacheConfig, int, CacheMetrics, Clock], Level]


def _open_host(cache: CacheConfig, min_events: int, metrics: CacheMetrics, clock: Clock) -> Level:
    host = cache.host
    metrics.gauge("capacity_bytes", lambda: host.capacity_bytes, tier=HostTier.name)
    tier = HostTier(
        new_policy(cache.policy, host.capacity_bytes),
        cache.ttl_s,
        clock,
        lambda *_: metrics.count("evictions", tier=HostTier.name),
    )
    return Level(tier, get_codec(host.codec), min_events, takes_evicted=True)


def _open_disk(cache: CacheConfig, min_events: int, metrics: CacheMetrics, clock: Clock) -> Level:
    disk = cache.disk
    assert disk.folder is not None
    metrics.gauge("capacity_bytes", lambda: disk.capacity_bytes, tier=DiskTier.name)
    tier = DiskTier(Path(disk.folder), disk.capacity_bytes, cache.ttl_s, clock)
    deadline_s = disk.deadline_ms / 1e3
    return Level(
        tier, get_codec(disk.codec), min_events, deadline_s, second_touch=cache.second_touch
    )


def _open_remote(
    cache: CacheConfig, min_events: int, _metrics: CacheMetrics, _clock: Clock
) -> Level:
    remote = cache.remote
    assert remote.url is not None
    password = None
    if remote.password_file is not None:
        password = read_secret(remote.password_file, "cache.remote.password_file").decode()
    deadline_s = remote.deadline_ms / 1e3
    tier = RemoteTier(
        remote.url,
        timeout_s=deadline_s,
        ttl_s=cache.ttl_s,
        cluster=remote.cluster,
        username=remote.username,
        password=password,
        tls_ca_file=_path(remote.tls_ca_file),
        tls_cert_file=_path(remote.tls_cert_file),
        tls_key_file=_path(remote.tls_key_file),
    )
    try:
        tier.check()
    except TierError as error:  # The tier may come up later; until then every look-up misses.
        logger.warning("%s", error)
    return Level(
        tier, get_codec(remote.codec), min_events, deadline_s, second_touch=cache.second_touch
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


TIER_KINDS = {
    HostTier.name: TierKind(lambda c: c.host if c.host.capacity_bytes else None, _open_host),
    DiskTier.name: TierKind(lambda c: None if c.disk.folder is None else c.disk, _open_disk),
    RemoteTier.name: TierKind(lambda c: None if c.remote.url is None else c.remote, _open_remote),
}
