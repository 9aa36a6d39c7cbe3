"""Open an engine for an artifact with the configured cache, if the model allows that cache."""

import logging
import math
from collections.abc import Hashable
from pathlib import Path

from torchrec_kvshare.cache.codecs import Codec
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.open import CACHES, MEMORY, OFF, TIERED, codecs_of, new_stack, new_store
from torchrec_kvshare.cache.stack import TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.artifact import Manifest
from torchrec_kvshare.export.exporter import PT2, Artifact, load_artifact
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import CROSS_REQUEST, EXACT
from torchrec_kvshare.verify.deterministic import require_determinism

DEFAULT_CACHE = CacheConfig()

logger = logging.getLogger(__name__)


def new_engine(
    artifact: Artifact,
    cache: CacheConfig = DEFAULT_CACHE,
    *,
    deterministic: bool = False,
    stack: TierStack | None = None,
    store: KVStore | None = None,
    metrics: CacheMetrics | None = None,
) -> Engine:
    """Open an engine for a loaded artifact.

    Args:
        artifact: as ``load_artifact`` returns it.
        cache: where K/V is kept, and for how long.
        deterministic: require scores that are bit-equal whatever else is in the batch.
        stack: tiers of another engine in this process, which two models then share; None opens the
            tiers that ``cache`` names.
        store: of an engine in this process with the same ``kv_sharing_key``, whose pages and tiers
            both then use; None opens pages of its own.
        metrics: counters of the cache; by default the stack's, or new ones.

    Returns:
        The engine, its pages empty.

    Raises:
        ConfigError: if the cache cannot work as configured, the model's audit does not allow K/V
            between requests, a codec exceeds its budget, or scores in this process are not
            deterministic.
        MissingExtraError: if a tier's packages are not installed.
    """
    if cache.name not in CACHES:
        raise ConfigError(f"cache is {cache.name!r}; one of {CACHES} is allowed")
    manifest = artifact.manifest
    if deterministic:
        require_determinism(artifact.model, artifact.schema)
    if cache.name != OFF:
        _check_audit(manifest)
        extends = manifest.audit["append"] == EXACT
        for codec in codecs_of(cache, stack):
            check_codec(codec, manifest, cache, deterministic=deterministic)
        if cache.name == TIERED and stack is None:
            stack = new_stack(cache, manifest.break_even_events, metrics)
        if metrics is None:
            metrics = CacheMetrics() if stack is None else stack.metrics
        if store is None:
            towers = [*manifest.towers.values()]
            store = new_store(towers, cache, stack, extends=extends, metrics=metrics)
    items = None
    if cache.items and manifest.runtime == PT2:
        raise ConfigError(
            f"cache.items is {cache.items}; graphs of runtime {PT2} project candidates inside"
        )
    if cache.items and store is not None:
        items = ItemCache(cache.items, artifact.schema)
    version = manifest.version
    return Engine(artifact.model, artifact.schema, store, items=items, version=version)


def kv_sharing_key(manifest: Manifest) -> Hashable:
    """Return a key that is equal for artifacts whose engines may share a store."""
    return manifest.version.kv_versions, *manifest.towers.values(), manifest.audit["append"]


def open_offline_engine(
    folder: Path, key_file: str | None, capacity_bytes: int, *, deterministic: bool
) -> Engine:
    """Load an artifact for requests of a user that come one after the other.

    K/V stays for the next requests of its user, whose longer histories extend it, and gives way to
    that of later users; it does not expire. For a model that failed its audit there is no such
    K/V: requests with the same history share one prefill within a batch.

    Args:
        folder: the artifact.
        key_file: secret that it must be signed with; None loads any.
        capacity_bytes: of K/V.
        deterministic: as for ``new_engine``.

    Raises:
        ArtifactError: as ``load_artifact``.
        ConfigError: if the secret cannot be read, the capacity is too small for one page, or scores
            in this process are not deterministic.
    """
    artifact = load_artifact(folder, read_key(key_file, "artifact_key_file"))
    cache = CacheConfig(MEMORY, capacity_bytes, ttl_s=math.inf, idle_ttl_s=math.inf)
    if artifact.manifest.audit["scope"] != CROSS_REQUEST:
        logger.warning(
            "model %s failed its audit: requests share K/V within a batch only",
            artifact.manifest.model_version,
        )
        cache = CacheConfig(OFF)
    return new_engine(artifact, cache, deterministic=deterministic)


def check_codec(
    codec: Codec, manifest: Manifest, cache: CacheConfig, *, deterministic: bool
) -> None:
    """Refuse a lossy codec that was not measured on the model, or whose effect exceeds a budget."""
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
                f"codec {codec.name} exceeds cache.{budget}: {measured:.1e} was measured on "
                f"model {manifest.model_version}; {allowed:.1e} is allowed"
            )


def _check_audit(manifest: Manifest) -> None:
    """Refuse to keep the K/V of a model that failed its audit."""
    if manifest.audit["scope"] != CROSS_REQUEST:
        raise ConfigError(
            f"K/V of model {manifest.model_version} may be used within a request only: its audit "
            f"failed at {manifest.audit['failures']}; cache=off is allowed"
        )
