"""An engine from an artifact and a config: which tiers there are, and if the model allows them."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torchrec_kvshare.audit import CROSS_REQUEST, EXACT
from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.codecs import Codec, get_codec
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.cache.kv_cache import DEVICE, KVCache, Rules
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import new_policy
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.stack import Level, Limits, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.deterministic import require_determinism
from torchrec_kvshare.engine import Engine
from torchrec_kvshare.errors import ConfigError, TierError
from torchrec_kvshare.export.artifact import Manifest
from torchrec_kvshare.export.exporter import PT2, Artifact
from torchrec_kvshare.private import read_secret

MEMORY, TIERED, OFF = "memory", "tiered", "off"
CACHES = (MEMORY, TIERED, OFF)
DEFAULT_CACHE = CacheConfig()

logger = logging.getLogger(__name__)


def new_engine(
    artifact: Artifact,
    cache: CacheConfig = DEFAULT_CACHE,
    deterministic: bool = False,
    stack: TierStack | None = None,
    metrics: CacheMetrics | None = None,
) -> Engine:
    """An engine for a loaded artifact.

    Args:
        artifact: as ``load_artifact`` gives it.
        cache: where K/V is kept, and for how long.
        deterministic: scores bit-equal whatever else is scored, or an error.
        stack: tiers of another engine of this process, so that two models live side by side; None
            opens those that ``cache`` names.
        metrics: where everything is counted; the stack's, or new ones, by default.

    Returns:
        The engine, its device empty.

    Raises:
        ConfigError: if the cache cannot work as configured, if the model's audit allows no K/V
            between requests, if a codec is beyond its budget, or if the scores of this process are
            not deterministic.
        MissingExtraError: if a tier's packages are not installed.
    """
    if cache.name not in CACHES:
        raise ConfigError(f"cache is {cache.name!r}; one of {CACHES} is allowed")
    manifest = artifact.manifest
    if deterministic:
        require_determinism(artifact.model, artifact.schema)
    store = None
    if cache.name != OFF:
        _check_audit(manifest)
        extends = manifest.audit["append"] == EXACT
        for codec in _codecs(cache, stack):
            _check_codec(codec, manifest, cache, deterministic)
        if cache.name == TIERED and stack is None:
            stack = new_stack(cache, manifest.break_even_events, metrics)
        if metrics is None:
            metrics = CacheMetrics() if stack is None else stack.metrics
        store = new_store(manifest, cache, stack, extends, metrics)
    items = None
    if cache.items and manifest.runtime == PT2:
        raise ConfigError(
            f"cache.items is {cache.items}; graphs of runtime {PT2} project candidates inside"
        )
    if cache.items and store is not None:
        items = ItemCache(cache.items, artifact.schema)
    return Engine(artifact.model, artifact.schema, store, items, manifest.version)


def new_store(
    manifest: Manifest,
    cache: CacheConfig,
    stack: TierStack | None,
    extends: bool,
    metrics: CacheMetrics,
) -> KVStore:
    """Pages for a model's K/V, on top of tiers that may be shared."""
    clock = steady_clock()
    towers = manifest.towers.values()
    # What one user's full window takes of each history.
    weights = [t.num_planes * t.num_heads * t.head_dim * t.max_rows for t in towers]
    caches = []
    for tower, weight in zip(towers, weights, strict=True):
        share = weight / sum(weights)
        pool = PagePool(
            int(cache.capacity_bytes * share),
            cache.page_size,
            tower.num_planes,
            tower.num_heads,
            tower.head_dim,
        )
        pinned_bytes = int(cache.pinned_bytes * share)
        at_rest = int(pool.capacity_bytes * cache.watermark) - pinned_bytes
        caches.append(
            KVCache(
                pool,
                Rules(cache.ttl_s, cache.idle_ttl_s, cache.share, pinned_bytes),
                new_policy(cache.policy, max(at_rest, pool.page_bytes)),
                clock,
                None if stack is None else stack.take,
                metrics,
            )
        )
    metrics.gauge("held_bytes", lambda: sum(one.held_bytes for one in caches), tier=DEVICE)
    metrics.gauge("pinned_entries", lambda: sum(one.num_held for one in caches))
    capacity_bytes = sum(one.pool.capacity_bytes for one in caches)
    metrics.gauge("capacity_bytes", lambda: capacity_bytes, tier=DEVICE)
    return KVStore(caches, stack, extends, cache.min_events, cache.context, cache.wait_ms / 1e3)


def new_stack(
    cache: CacheConfig, break_even_events: Mapping[str, int], metrics: CacheMetrics | None = None
) -> TierStack:
    """The tiers below the device that a config names.

    Args:
        cache: which tiers, and how they are used.
        break_even_events: by tier, from how many events on fetching beats encoding here.
        metrics: where everything is counted; new ones by default.

    Raises:
        ConfigError: if a tier cannot work as configured.
        MissingExtraError: if a tier's packages are not installed.
    """

    def least(min_events: int | None, tier: str) -> int:
        return break_even_events.get(tier, 0) if min_events is None else min_events

    metrics = metrics or CacheMetrics()
    levels = []
    host, disk, remote = cache.host, cache.disk, cache.remote
    for name, capacity_bytes in (
        (HostTier.name, host.capacity_bytes),
        (DiskTier.name, 0 if disk.folder is None else disk.capacity_bytes),
    ):
        metrics.gauge("capacity_bytes", partial(int, capacity_bytes), tier=name)
    if host.capacity_bytes:
        policy = new_policy(cache.policy, host.capacity_bytes)
        levels.append(
            Level(
                HostTier(
                    policy,
                    cache.ttl_s,
                    steady_clock(),
                    lambda *_: metrics.count("evictions", tier=HostTier.name),
                ),
                get_codec(host.codec),
                least(host.min_events, HostTier.name),
                takes_evicted=True,
            )
        )
    if disk.folder is not None:
        levels.append(
            Level(
                DiskTier(Path(disk.folder), disk.capacity_bytes, cache.ttl_s, steady_clock()),
                get_codec(disk.codec),
                least(disk.min_events, DiskTier.name),
                disk.deadline_ms / 1e3,
                second_touch=cache.second_touch,
            )
        )
    if remote.url is not None:
        levels.append(
            Level(
                _remote_tier(cache),
                get_codec(remote.codec),
                least(remote.min_events, RemoteTier.name),
                remote.deadline_ms / 1e3,
                second_touch=cache.second_touch,
            )
        )
    limits = Limits(cache.queue_length, cache.queue_bytes, cache.max_failures, cache.pause_ms / 1e3)
    key = read_key(cache.key_file, "cache.key_file")
    if key is None and remote.url is not None:
        logger.warning(
            "cache.key_file is null: K/V in the remote tier has checksums and no signature, and "
            "who can write to it can change scores"
        )
    return TierStack(levels, cache.ttl_s, key, limits, metrics=metrics)


def _codecs(cache: CacheConfig, stack: TierStack | None) -> list[Codec]:
    """Codecs of a stack, or of the tiers that a config names."""
    if stack is not None:
        return [level.codec for level in stack.levels]
    if cache.name != TIERED:
        return []
    host, disk, remote = cache.host, cache.disk, cache.remote
    named = (
        (host.codec, host.capacity_bytes),
        (disk.codec, disk.folder is not None),
        (remote.codec, remote.url is not None),
    )
    return [get_codec(codec) for codec, is_named in named if is_named]


def _remote_tier(cache: CacheConfig) -> RemoteTier:
    remote = cache.remote
    assert remote.url is not None
    password = None
    if remote.password_file is not None:
        password = read_secret(remote.password_file, "cache.remote.password_file").decode()
    tier = RemoteTier(
        remote.url,
        timeout_s=remote.deadline_ms / 1e3,
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
    except TierError as error:  # It may be mended, or started, while we go on without it.
        logger.warning("%s", error)
    return tier


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _check_codec(codec: Codec, manifest: Manifest, cache: CacheConfig, deterministic: bool) -> None:
    """Refuse a codec that changes scores by more than its budget, or by nobody knows how much."""
    if codec.is_exact:
        return
    if deterministic:
        raise ConfigError(f"deterministic is true, and codec {codec.name} changes scores")
    figures = manifest.codecs.get(codec.name)
    if figures is None:
        raise ConfigError(
            f"codec {codec.name} was not measured on model {manifest.model_version}; "
            "python -m pipelines.benchmark scenario=codec artifact=DIR data=NAME does that"
        )
    worst_by_budget = {
        "max_auc_change": (abs(figures["auc_change"]), cache.max_auc_change),
        "max_top10_loss": (1.0 - figures["top10_overlap"], cache.max_top10_loss),
        "max_score_difference": (figures["max_score_difference"], cache.max_score_difference),
    }
    for budget, (measured, allowed) in worst_by_budget.items():
        if not measured <= allowed:
            raise ConfigError(
                f"codec {codec.name} is beyond cache.{budget}: {measured:.1e} was measured on "
                f"model {manifest.model_version}; {allowed:.1e} is allowed"
            )


def _check_audit(manifest: Manifest) -> None:
    """Refuse to keep K/V of a model that failed its audit."""
    if manifest.audit["scope"] != CROSS_REQUEST:
        raise ConfigError(
            f"K/V of model {manifest.model_version} may be used within a request only: its audit "
            f"failed at {manifest.audit['failures']}; cache=off is allowed"
        )
