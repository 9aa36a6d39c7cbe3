"""Replays of a model's traffic: what a cache of some config would find, and how long requests take.

The store is the one that the config opens, with one number in place of a row's K/V and the trace's
clock. Tiers below the pages are stood in for by memory with room for as many packets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from torchrec_kvshare.benchmark.replay import TraceClock, WeightlessEngine
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.leases import CacheUse, Wanted
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.open import TIERED, configured_tiers, new_store
from torchrec_kvshare.cache.pages import TowerSizes
from torchrec_kvshare.cache.policies import LRU, new_policy
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.cache.stack import Level, TierStack
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.export.exporter import Artifact
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.planning.times import Times
from torchrec_kvshare.planning.trace import Trace
from torchrec_kvshare.planning.traffic import Floats
from torchrec_kvshare.verify.audit import EXACT

BYTES = 4  # of a float32
LEAST_HEADER_BYTES = 500.0  # of a packet
MOST_BYTES = 2**40  # of a stand-in for a tier without a budget


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a cache does for the traffic.

    Attributes:
        uses: of each request.
        hit_rate: share of requests of which all K/V was found.
        event_hit_rate: share of events whose K/V was found: a history that has grown is no hit,
            but nearly all of it is found.
        request_ms: [R] time of each request.
    """

    uses: Sequence[CacheUse]
    hit_rate: float
    event_hit_rate: float
    request_ms: Floats

    @property
    def mean_ms(self) -> float:
        return float(self.request_ms.mean())

    @property
    def p50_ms(self) -> float:
        return float(np.percentile(self.request_ms, 50))

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.request_ms, 99))


class Replays:
    """Replays of one trace on caches of the same model.

    Args:
        artifact: the model.
        trace: the traffic.
        times: of the model on this machine.
        page_size: rows per page.
    """

    def __init__(self, artifact: Artifact, trace: Trace, times: Times, page_size: int) -> None:
        self._artifact = artifact
        self._trace = trace
        self._times = times
        self._page_size = page_size
        self._wanted_by_request: dict[int, Wanted] = {}
        self._towers = [*artifact.manifest.towers.values()]
        # One number stands for the K/V of a row.
        self.row_numbers = max(
            one.num_planes * one.num_heads * one.head_dim for one in self._towers
        )
        self.lengths = np.array([r.num_events for r in trace.requests], dtype=np.float64)
        self.candidates = np.array([r.num_candidates for r in trace.requests], dtype=np.float64)
        self.all_bytes = self._bytes_of_all()

    def predict(self, cache: CacheConfig) -> Predicted:
        """Replay the traffic on an empty cache."""
        clock = TraceClock()
        metrics = CacheMetrics()
        store = new_store(
            [TowerSizes(1, 1, 1, one.max_rows) for one in self._towers],
            replace(cache, capacity_bytes=cache.capacity_bytes // self.row_numbers),
            self._stack(cache, clock, metrics),
            extends=self._artifact.manifest.audit["append"] == EXACT,
            metrics=metrics,
            clock=clock,
        )
        engine = WeightlessEngine(
            self._artifact.model, self._artifact.schema, store, self._wanted_by_request
        )
        uses = engine.replay(self._trace.requests, clock)
        engine.close()
        num_hits = sum(use.status == HIT for use in uses)
        num_cached = sum(use.cached_events for use in uses)
        num_events = num_cached + sum(use.computed_events for use in uses)
        return Predicted(
            uses,
            num_hits / len(uses),
            num_cached / max(num_events, 1),
            self._request_ms(uses, cache),
        )

    def predict_shared(self) -> Predicted:
        """Without a cache: each request's history is encoded for it."""
        shared = self._times.at(self._times.shared_ms, self.lengths, self.candidates)
        return Predicted((), 0.0, 0.0, shared)

    def merged_ms(self) -> Floats:
        """Return [R] the times of requests whose history is encoded for each candidate."""
        return self._times.at_length(self._times.merged_ms, self.lengths) * self.candidates

    def window_bytes(self) -> int:
        """Bytes of the pages of a full window of every history."""
        return sum(self._page_bytes(one) * self._pages_for(one.max_rows) for one in self._towers)

    def mean_packet_bytes(self, tier: str, codec: str) -> float:
        """Mean bytes of a request's K/V in a tier."""
        return float(
            self._times.at_length(self._times.packet_bytes[tier, codec], self.lengths).mean()
        )

    def _request_ms(self, uses: Sequence[CacheUse], cache: CacheConfig) -> Floats:
        times = self._times
        computed = np.array([use.computed_events for use in uses], dtype=np.float64)
        request_ms = times.cached_ms(self.lengths, self.candidates, computed)
        is_short = self.lengths < cache.min_events
        shared = times.at(times.shared_ms, self.lengths, self.candidates)
        request_ms = np.where(is_short, shared, request_ms)
        for name, tier in configured_tiers(cache).items() if cache.name == TIERED else ():
            is_here = np.array([use.tier == name for use in uses])
            fetch = times.at_length(times.fetch_ms[name, tier.codec], self.lengths)
            request_ms = request_ms + np.where(is_here, fetch, 0.0)
        return request_ms

    def _stack(
        self, cache: CacheConfig, clock: TraceClock, metrics: CacheMetrics
    ) -> TierStack | None:
        """Stand-ins for the tiers, all in memory, with as many mean packets of the small K/V.

        What a disk or a remote tier holds depends on its bytes and on ``ttl_s``, as in memory.
        """
        if cache.name != TIERED:
            return None
        levels = []
        small = self._small_packet_bytes()
        for name, tier in configured_tiers(cache).items():
            capacity_bytes = getattr(tier, "capacity_bytes", None)
            packet = self.mean_packet_bytes(name, tier.codec)
            num_packets = math.inf if capacity_bytes is None else capacity_bytes / packet
            room = int(min(num_packets * small, MOST_BYTES))
            policy = new_policy(cache.policy if name == HostTier.name else LRU, max(1, room))
            stand_in = HostTier(policy, cache.ttl_s, clock)
            stand_in.name = name
            least = tier.min_events
            if least is None:
                least = self._artifact.manifest.break_even_events.get(name, 0)
            takes_evicted = name == HostTier.name
            second_touch = cache.second_touch and not takes_evicted
            levels.append(
                Level(
                    stand_in,
                    get_codec(FLOAT32),
                    least,
                    takes_evicted=takes_evicted,
                    second_touch=second_touch,
                )
            )
        return TierStack(levels, cache.ttl_s, clock=clock, metrics=metrics)

    def _small_packet_bytes(self) -> float:
        """Mean bytes of a packet whose rows are one number: mostly its header."""
        name = next(name for name, codec in self._times.packet_bytes if codec == FLOAT32)
        # Headers have the digests of all pages, so they are measured, not guessed.
        large = self._times.at_length(self._times.packet_bytes[name, FLOAT32], self.lengths)
        body = self.lengths * self.row_numbers * BYTES
        return float(
            np.maximum(large - body, LEAST_HEADER_BYTES).mean() + (self.lengths * BYTES).mean()
        )

    def _bytes_of_all(self) -> int:
        """Bytes of pages for the K/V of all users, each at its longest, by the fullest history."""
        longest: dict[str, list[int]] = {}
        for request in self._trace.requests:
            rows = self._artifact.model.num_kv_rows(request.num_events_by_history)
            known = longest.setdefault(request.user_id, [0] * len(rows))
            longest[request.user_id] = [max(pair) for pair in zip(known, rows, strict=True)]
        window_sizes = [one.max_rows for one in self._towers]
        needed = []
        for number, sizes in enumerate(self._towers):
            pages = sum(self._pages_for(rows[number]) for rows in longest.values())
            # The capacity is divided by the sizes of full windows.
            share = window_sizes[number] / sum(window_sizes)
            needed.append(pages * self._page_bytes(sizes) / share)
        return math.ceil(max(needed))

    def _pages_for(self, num_rows: int) -> int:
        return -(-num_rows // self._page_size)

    def _page_bytes(self, sizes: TowerSizes) -> int:
        return BYTES * self._page_size * sizes.num_planes * sizes.num_heads * sizes.head_dim
