"""How long this machine takes for a model's requests, by length of history and by candidates.

Every figure is the median of requests that an engine ranks one at a time, in turns with all others:
without a cache, with an empty one, with one that lacks the newest events, and on a hit. So a sum
that predicts a request has measured parts only.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from torchrec_kvshare.benchmark.options import ModelSizes
from torchrec_kvshare.benchmark.scenarios.tiers import (
    TTL_S,
    EncodedUser,
    Shelf,
    Subject,
    caches_for,
    encoded_user,
)
from torchrec_kvshare.benchmark.timing import interleaved_medians, timed
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.disk import MIN_CAPACITY_BYTES, DiskTier
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.open import MEMORY, OFF, TIER_KINDS
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.tiers import HostTier, Tier
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.export.exporter import Artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import USER
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.planning.traffic import Floats
from torchrec_kvshare.scoring.engine import Engine

NEW_EVENTS = 4  # of a history that has grown
MERGED_USERS = 8  # candidates of a merged batch, each with its own prefill
CACHED_WINDOWS = 4  # full windows that the measured cache has room for
FETCHED_VALUES = 1024  # of the longest history, which measured tiers have room for

Shelves = Mapping[tuple[str, str], Floats]


@dataclass(frozen=True, eq=False)
class Times:
    """Milliseconds by length of history [A] and number of candidates [B].

    Attributes:
        lengths: [A] events, ascending.
        candidates: [B] ascending.
        shared_ms: [A, B] of a request without a cache: its history is encoded once.
        miss_ms: [A, B] with a cache that has none of it.
        hit_ms: [A, B] with a cache that has all of it.
        grown_ms: [A, B] with a cache that lacks the last ``NEW_EVENTS`` events.
        merged_ms: [A] of one candidate whose history is encoded for it alone.
        lookup_ms: [A] of finding all of the K/V in pages, digests included.
        fetch_ms: [A] of bringing K/V into pages, by tier and codec.
        packet_bytes: [A] of the K/V, likewise.
    """

    lengths: Floats
    candidates: Floats
    shared_ms: Floats
    miss_ms: Floats
    hit_ms: Floats
    grown_ms: Floats
    merged_ms: Floats
    lookup_ms: Floats
    fetch_ms: Shelves
    packet_bytes: Shelves

    def at(self, table: Floats, lengths: Floats, candidates: Floats) -> Floats:
        """Interpolate a table [A, B] at lengths [R] and candidates [R].

        Beyond the measured sizes the value is that of the nearest one.
        """
        by_length = np.stack(
            [np.interp(lengths, self.lengths, column) for column in table.T], axis=1
        )  # [R, B]
        last = max(len(self.candidates) - 2, 0)
        low = np.clip(np.searchsorted(self.candidates, candidates, side="right") - 1, 0, last)
        high = np.minimum(low + 1, len(self.candidates) - 1)
        width = np.maximum(self.candidates[high] - self.candidates[low], 1e-9)
        share = np.clip((candidates - self.candidates[low]) / width, 0.0, 1.0)
        rows = np.arange(len(lengths))
        return np.asarray(by_length[rows, low] * (1.0 - share) + by_length[rows, high] * share)

    def at_length(self, values: Floats, lengths: Floats) -> Floats:
        """Interpolate values [A] at lengths [R]."""
        return np.asarray(np.interp(lengths, self.lengths, values))

    def cached_ms(self, lengths: Floats, candidates: Floats, computed: Floats) -> Floats:
        """Return the times of requests that had K/V of all but ``computed`` [R] events in pages."""
        hit, grown, miss = (
            self.at(table, lengths, candidates)
            for table in (self.hit_ms, self.grown_ms, self.miss_ms)
        )
        beyond = np.clip((computed - NEW_EVENTS) / np.maximum(lengths - NEW_EVENTS, 1.0), 0.0, 1.0)
        encoded = grown + beyond * np.maximum(miss - grown, 0.0)
        return np.where(computed > 0, encoded, hit)


def measure_times(
    artifact: Artifact,
    cache: CacheConfig,
    codecs_by_tier: Mapping[str, Sequence[str]],
    lengths: Sequence[int],
    candidates: Sequence[int],
    *,
    repeats: int,
    seed: int,
) -> Times:
    """Measure a model on this machine.

    Args:
        artifact: the model.
        cache: which tiers there are, and the size of pages.
        codecs_by_tier: codecs that each tier is measured with.
        lengths: of histories, in events, at most a window.
        candidates: of a request.
        repeats: turns of each figure.
        seed: of the requests.

    Raises:
        ConfigError: if the model's K/V may not be kept between requests.
        MissingExtraError: if a tier's packages are not installed.
        TierError: if a tier cannot be reached.
    """
    cells = [
        [_drawn(artifact, length, num, seed + row) for num in candidates]
        for row, length in enumerate(lengths)
    ]
    cached = new_engine(artifact, _roomy(artifact, cache))
    uncached = new_engine(artifact, CacheConfig(OFF))
    samples: dict[str, list[list[list[float]]]] = {
        name: [[[] for _ in candidates] for _ in lengths]
        for name in ("shared", "miss", "hit", "grown")
    }
    merged: list[list[float]] = [[] for _ in lengths]
    lookups: list[list[float]] = [[] for _ in lengths]
    batches = [_merged_batch(row[0]) for row in cells]
    for turn in range(repeats + 1):  # The first one warms up.
        for length, row in enumerate(cells):
            for number, request in enumerate(row):
                for name, latency_ms in _turn(cached, uncached, request).items():
                    if turn:
                        samples[name][length][number].append(latency_ms)
            _, lookup_ms = timed(partial(cached.prefetch, [row[-1]]))
            _, merged_ms = timed(partial(uncached.rank, batches[length]))
            if turn:
                lookups[length].append(lookup_ms)
                merged[length].append(merged_ms / MERGED_USERS)
    events = np.array([row[0].num_events for row in cells], dtype=np.float64)
    queues = np.array(candidates, dtype=np.float64)
    tables = {
        name: smoothed(np.array([[median(cell) for cell in row] for row in rows]), events, queues)
        for name, rows in samples.items()
    }
    fetch_ms, packet_bytes = _measure_tiers(
        artifact, cache, codecs_by_tier, lengths, repeats=repeats, seed=seed
    )
    return Times(
        lengths=events,
        candidates=queues,
        shared_ms=tables["shared"],
        miss_ms=tables["miss"],
        hit_ms=tables["hit"],
        grown_ms=tables["grown"],
        merged_ms=np.array([median(one) for one in merged]),
        lookup_ms=np.array([median(one) for one in lookups]),
        fetch_ms=fetch_ms,
        packet_bytes=packet_bytes,
    )


def smoothed(table: Floats, lengths: Floats, candidates: Floats) -> Floats:
    """Return a table's least-squares fit by 1, L, L², N and L N, in relative errors.

    That is how the work of a request grows. One slow moment then shifts no single size.
    """
    length, number = np.meshgrid(lengths, candidates, indexing="ij")
    terms = [np.ones_like(length), length, length**2, number, length * number]
    design = np.stack([term.ravel() for term in terms], axis=1)
    scale = np.abs(design).max(axis=0)
    values = table.ravel()
    fit, *_ = np.linalg.lstsq(design / scale / values[:, None], np.ones_like(values), rcond=None)
    # A fit may fall below zero where little was measured; a request takes some time in any case.
    return np.maximum((design / scale @ fit).reshape(table.shape), table.min() / 2)


def _turn(cached: Engine, uncached: Engine, request: Request) -> dict[str, float]:
    """Rank a request without a cache, on a miss, on a hit, and when its history has grown."""
    cached.forget(request.user_id)
    _, miss_ms = timed(partial(cached.rank, [request]))
    _, hit_ms = timed(partial(cached.rank, [request]))
    _, shared_ms = timed(partial(uncached.rank, [request]))
    cached.forget(request.user_id)
    cached.rank([_shorter(request)])
    _, grown_ms = timed(partial(cached.rank, [request]))
    return {"miss": miss_ms, "hit": hit_ms, "shared": shared_ms, "grown": grown_ms}


def _drawn(artifact: Artifact, num_events: int, num_candidates: int, seed: int) -> Request:
    raw = draw_raw_request(artifact.schema, num_events, num_candidates, seed)
    user = {USER: f"measured {num_events} {num_candidates}"}
    return parse_request(raw | user, artifact.schema)


def _shorter(request: Request) -> Request:
    """The request before its user's newest events."""
    events_by_history = {
        name: events.part(0, max(0, events.num_events - NEW_EVENTS))
        for name, events in request.events_by_history.items()
    }
    return replace(request, events_by_history=events_by_history)


def _merged_batch(request: Request) -> list[Request]:
    one = request.part(0, 1)
    return [replace(one, user_id=f"{one.user_id} {number}") for number in range(MERGED_USERS)]


def _roomy(artifact: Artifact, cache: CacheConfig) -> CacheConfig:
    """A cache of pages with room for some full windows."""
    window_bytes = sum(
        4 * one.num_planes * one.num_heads * one.head_dim * (one.max_rows + cache.page_size)
        for one in artifact.manifest.towers.values()
    )
    return replace(
        CacheConfig(MEMORY),
        page_size=cache.page_size,
        capacity_bytes=2 * CACHED_WINDOWS * window_bytes,
        context=cache.context,
        ttl_s=TTL_S,
        idle_ttl_s=TTL_S,
    )


def _measure_tiers(
    artifact: Artifact,
    cache: CacheConfig,
    codecs_by_tier: Mapping[str, Sequence[str]],
    lengths: Sequence[int],
    *,
    repeats: int,
    seed: int,
) -> tuple[Shelves, Shelves]:
    """Measure fetching each length from each tier in each codec, and the bytes that it has."""
    spec = TowerSpec(**artifact.manifest.encoder)
    subject = Subject(
        artifact.model,
        artifact.schema,
        artifact.manifest.version,
        case=ModelSizes(dim=spec.dim).case(spec.kind),
        lengths=lengths,
    )
    users = [encoded_user(subject, length, cache.page_size, seed) for length in lengths]
    pages = caches_for(users, cache.page_size)
    fetch_ms: dict[tuple[str, str], Floats] = {}
    packet_bytes: dict[tuple[str, str], Floats] = {}
    with ExitStack() as stack:
        shelves = [
            Shelf(_opened(name, cache, users, stack), get_codec(codec))
            for name, codecs in codecs_by_tier.items()
            for codec in codecs
        ]
        num_bytes = {
            (shelf.tier.name, shelf.codec.name): [shelf.put(user) for user in users]
            for shelf in shelves
        }
        calls: dict[tuple[str, str, int], Callable[[], object]] = {
            (shelf.tier.name, shelf.codec.name, row): partial(shelf.fetch, user, pages)
            for shelf in shelves
            for row, user in enumerate(users)
        }
        for call in calls.values():
            call()
        latency_ms = interleaved_medians(calls, repeats)
    for tier, codec in num_bytes:
        key = tier, codec
        fetch_ms[key] = np.array([latency_ms[tier, codec, row] for row in range(len(users))])
        packet_bytes[key] = np.array(num_bytes[key], dtype=np.float64)
    return fetch_ms, packet_bytes


def _opened(name: str, cache: CacheConfig, users: Sequence[EncodedUser], stack: ExitStack) -> Tier:
    """Open a tier of its kind for a measurement: a folder of its own, or the configured server."""
    largest = max(record.kv.numel() * 4 for user in users for record in user.records)
    capacity_bytes = max(MIN_CAPACITY_BYTES, FETCHED_VALUES * largest)
    if name == HostTier.name:
        return HostTier(LruPolicy(capacity_bytes), TTL_S)
    if name == DiskTier.name:
        assert cache.disk.folder is not None
        parents = [Path(cache.disk.folder), *Path(cache.disk.folder).absolute().parents]
        parent = next(one for one in parents if one.is_dir())
        folder = stack.enter_context(TemporaryDirectory(prefix="kvshare-advise-", dir=parent))
        tier: Tier = DiskTier(Path(folder) / "tier", capacity_bytes, TTL_S)
        stack.callback(tier.close)
        return tier
    assert name == RemoteTier.name
    tier = TIER_KINDS[name].open(cache, 0, CacheMetrics(), time.time).tier
    stack.callback(tier.close)
    for user in users:
        stack.callback(tier.forget, user.key, time.time())
    return tier
