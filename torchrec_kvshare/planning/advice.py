"""Which cache suits a model, a machine and its traffic: each setting with what else it could be.

The traffic is replayed on caches of several sizes, policies and lives (``benchmark/replay.py``): so
hits are counted, not estimated. Times are measured (``times.py``), and a request's time is the sum
of the measured parts that its replay says it needs. Of caches that find the same share of
events, within a point, the one that keeps the least for the shortest time is chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from torchrec_kvshare.benchmark.plots import BLUE, GREEN, Axis, Line, Picture
from torchrec_kvshare.cache.break_even import break_even_events
from torchrec_kvshare.cache.codecs import CODECS, get_codec
from torchrec_kvshare.cache.disk import DiskTier
from torchrec_kvshare.cache.open import (
    MEMORY,
    OFF,
    TIERED,
    configured_tiers,
)
from torchrec_kvshare.cache.policies import LRU, TINY_LFU
from torchrec_kvshare.cache.reasons import EVICTED
from torchrec_kvshare.cache.remote import RemoteTier
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.config import AdviseConfig, CacheConfig
from torchrec_kvshare.errors import ConfigError, MissingExtraError
from torchrec_kvshare.export.exporter import Artifact
from torchrec_kvshare.export.open import check_codec
from torchrec_kvshare.features.tensors import FLOAT32
from torchrec_kvshare.planning.replays import Predicted, Replays
from torchrec_kvshare.planning.times import NEW_EVENTS, Times, measure_times
from torchrec_kvshare.planning.trace import Trace

ADVISE = "advise"
MERGED, SHARED, CACHED = "merged", "request_shared", "cross_request"
POINT = 0.01  # of a hit rate: less is not worth bytes or age
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the K/V of all users of the traffic
LIVES_S = (60.0, 300.0, 1800.0, 7200.0, 28_800.0, 86_400.0)
IN_FLIGHT = 16  # requests that need room beside K/V at rest, as server.batch_requests
MIB = 2**20
NUM_LENGTHS = 5  # that are measured
TABLE_CANDIDATES = (1, 10, 50, 100, 500)

PICTURE_BY_NAME = {
    "event_hit_rate": Picture(
        metrics=("event_hit_rate",),
        label="events whose K/V is found [share]",
        panels=Axis("data", "{}"),
        across=Axis("mib", "K/V at rest in pages [MiB]"),
        line_by_path={
            LRU: Line("least recently used", BLUE),
            TINY_LFU: Line("TinyLFU", GREEN),
        },
        case={},
        is_logarithmic=False,
    )
}


class Choice(NamedTuple):
    """One setting of the advice.

    Attributes:
        setting: its name.
        value: what it should be.
        why: the figures for it.
        instead: the nearest alternative.
        why_not: the figures against that.
    """

    setting: str
    value: str
    why: str
    instead: str
    why_not: str


@dataclass(frozen=True, eq=False)
class Advice:
    """The advice for a model, a machine and its traffic.

    Attributes:
        cache: what to configure; ``off`` if a cache does not pay.
        scope: ``cross_request``, or ``request_shared`` if a cache does not pay.
        predicted: what it does.
        mean_ms_by_scope: of a request.
        choices: each setting, with its alternative.
        curve: shares of events found in pages alone, as (policy, bytes at rest, share).
    """

    cache: CacheConfig
    scope: str
    predicted: Predicted
    mean_ms_by_scope: dict[str, float]
    choices: Sequence[Choice]
    curve: Sequence[tuple[str, float, float]]


def smallest_codec(artifact: Artifact, cache: CacheConfig) -> tuple[str, str]:
    """Return the codec with the fewest bytes that the manifest allows, and why none has fewer."""
    bytes_ratio, reasons = {}, []
    for name in CODECS:
        try:
            check_codec(get_codec(name), artifact.manifest, cache, deterministic=False)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            bytes_ratio[name] = artifact.manifest.codecs.get(name, {}).get("bytes_ratio", 1.0)
    return min(bytes_ratio, key=lambda name: bytes_ratio[name]), "; ".join(reasons[:1])


class Advisor:
    """Chooses one setting after the other, each by replays of the whole traffic.

    Args:
        artifact: the model.
        trace: the traffic.
        times: of the model on this machine.
        cache: what there is: the most bytes of pages and of the host tier, a disk, a server.
        max_ttl_s: longest age of K/V that is allowed.

    Raises:
        ConfigError: if there is no room for a user at rest beside a request.
    """

    def __init__(
        self,
        artifact: Artifact,
        trace: Trace,
        times: Times,
        cache: CacheConfig,
        max_ttl_s: float,
    ) -> None:
        self._artifact = artifact
        self._trace = trace
        self._times = times
        self._given = cache
        self._max_ttl_s = max_ttl_s
        self._replays = Replays(artifact, trace, times, cache.page_size)
        if cache.capacity_bytes < 2 * self._replays.window_bytes():
            raise ConfigError(
                f"cache.capacity_bytes is {cache.capacity_bytes}; one full window at rest and one "
                f"in flight need {2 * self._replays.window_bytes()}"
            )
        self._choices: list[Choice] = []
        self._curve: list[tuple[str, float, float]] = []

    def advise(self) -> Advice:
        """Replay, choose, and predict what the chosen cache does."""
        cache = self._with_ttl()
        cache, predicted = self._with_capacity(cache)
        cache, predicted = self._with_policy(cache, predicted)
        cache, predicted = self._with_tiers(cache, predicted)
        cache, predicted = self._with_min_events(cache, predicted)
        scope, cache, predicted, by_scope = self._with_scope(cache, predicted)
        return Advice(cache, scope, predicted, by_scope, self._choices, self._curve)

    # --- one setting each

    def _with_ttl(self) -> CacheConfig:
        """The shortest life that loses less than a point of what the longest finds."""
        lives = sorted({*(one for one in LIVES_S if one < self._max_ttl_s), self._max_ttl_s})
        found = {}
        for ttl_s in reversed(lives):
            found[ttl_s] = self._replays.predict(self._pages(1.0, ttl_s))
            if not _is_as_good(found[ttl_s], found[lives[-1]]):
                break
        chosen = min(one for one in found if _is_as_good(found[one], found[lives[-1]]))
        other = min(found) if min(found) < chosen else lives[-1]
        self._choices.append(
            Choice(
                "ttl_s, idle_ttl_s",
                f"{chosen:g} s",
                f"{_found(found[chosen])} with room for all",
                f"{other:g} s",
                _found(found[other]),
            )
        )
        return self._pages(1.0, chosen)

    def _with_capacity(self, cache: CacheConfig) -> tuple[CacheConfig, Predicted]:
        """The fewest bytes that lose less than a point of what the most bytes find."""
        most = max(self._given.capacity_bytes - self._in_flight_bytes(), 0)
        all_bytes = self._replays.all_bytes
        affordable = [share for share in SHARES if share * all_bytes <= most]
        if not affordable or affordable[-1] < 1.0:
            affordable.append(max(most / all_bytes, 1e-6))
        found: dict[float, tuple[CacheConfig, Predicted]] = {}
        for share in reversed(affordable):
            sized = self._pages(share, cache.ttl_s)
            found[share] = sized, self._replays.predict(sized)
            self._curve.append((LRU, share * all_bytes, found[share][1].event_hit_rate))
            if not _is_as_good(found[share][1], found[affordable[-1]][1]):
                break
        best = found[affordable[-1]][1]
        chosen = min(one for one in found if _is_as_good(found[one][1], best))
        sized, predicted = found[chosen]
        instead, why_not = "less", "the least that was tried"
        if (less := min(found)) < chosen:
            instead, why_not = f"{_mib(less * all_bytes)} at rest", _found(found[less][1])
        self._choices.append(
            Choice(
                "capacity_bytes",
                f"{sized.capacity_bytes} ({_mib(sized.capacity_bytes)})",
                f"{_found(predicted)} with {_mib(chosen * all_bytes)} at rest, "
                f"{chosen:.0%} of all users' K/V",
                instead,
                why_not,
            )
        )
        self._choices.append(
            Choice(
                "watermark",
                f"{sized.watermark:g}",
                f"leaves {_mib(self._in_flight_bytes())} for requests in flight",
                "1.0",
                "requests in flight would find no free page",
            )
        )
        return sized, predicted

    def _with_policy(
        self, cache: CacheConfig, predicted: Predicted
    ) -> tuple[CacheConfig, Predicted]:
        """TinyLFU only where it finds a point more: it is a trap for bursts."""
        other = replace(cache, policy=TINY_LFU)
        try:
            tried = self._replays.predict(other)
        except MissingExtraError as error:
            self._choices.append(Choice("policy", LRU, "needs no extra", TINY_LFU, str(error)))
            return cache, predicted
        at_rest = cache.capacity_bytes * cache.watermark
        self._curve.append((TINY_LFU, at_rest, tried.event_hit_rate))
        if tried.event_hit_rate > predicted.event_hit_rate + POINT:
            self._choices.append(Choice("policy", TINY_LFU, _found(tried), LRU, _found(predicted)))
            return other, tried
        self._choices.append(Choice("policy", LRU, _found(predicted), TINY_LFU, _found(tried)))
        return cache, predicted

    def _with_tiers(
        self, cache: CacheConfig, predicted: Predicted
    ) -> tuple[CacheConfig, Predicted]:
        """Each tier that there is, if requests become faster by it."""
        codec, why_no_smaller = smallest_codec(self._artifact, self._given)
        for name in configured_tiers(self._given) if self._given.name == TIERED else ():
            tried = self._with_tier(cache, name, codec)
            found = self._replays.predict(tried)
            num_evicted = sum(use.reason == EVICTED for use in predicted.uses)
            figures = (
                f"mean {found.mean_ms:.2f} ms, {_found(found)}",
                f"mean {predicted.mean_ms:.2f} ms, {_found(predicted)}, "
                f"{num_evicted / len(predicted.uses):.3f} missed because of evictions",
            )
            if found.mean_ms < predicted.mean_ms and not _is_as_good(predicted, found):
                self._choices.append(
                    Choice(f"tier {name}", f"yes, {codec}", figures[0], "no", figures[1])
                )
                if why_no_smaller:
                    self._choices.append(
                        Choice(
                            f"{name}.codec", codec, "fewest bytes allowed", "fewer", why_no_smaller
                        )
                    )
                cache, predicted = tried, found
            else:
                keeps = "" if name == HostTier.name else "; it would survive a restart"
                self._choices.append(
                    Choice(f"tier {name}", "no", figures[1], f"yes, {codec}", figures[0] + keeps)
                )
        return cache, predicted

    def _with_min_events(
        self, cache: CacheConfig, predicted: Predicted
    ) -> tuple[CacheConfig, Predicted]:
        """Histories for which the cache costs more than it saves, in this traffic."""
        ratios = self._cost_ratios(predicted)
        least = break_even_events(ratios)
        shortest = min(ratios)
        why = f"at {shortest} events a request takes {ratios[shortest]:.2f} of one without a cache"
        if least == shortest or least > max(ratios):
            self._choices.append(Choice("min_events", "0", why, "more", "nothing is gained by it"))
            return cache, predicted
        limited = replace(cache, min_events=least)
        found = self._replays.predict(limited)
        means = f"mean {found.mean_ms:.2f} ms", f"mean {predicted.mean_ms:.2f} ms"
        if found.mean_ms > (1.0 - POINT) * predicted.mean_ms:
            self._choices.append(Choice("min_events", "0", means[1], str(least), means[0]))
            return cache, predicted
        self._choices.append(Choice("min_events", str(least), f"{means[0]}; {why}", "0", means[1]))
        return limited, found

    def _with_scope(
        self, cache: CacheConfig, predicted: Predicted
    ) -> tuple[str, CacheConfig, Predicted, dict[str, float]]:
        """Keep K/V between requests only if that is faster than without."""
        shared = self._replays.predict_shared()
        by_scope = {
            MERGED: float(self._replays.merged_ms().mean()),
            SHARED: shared.mean_ms,
            CACHED: predicted.mean_ms,
        }
        scope = CACHED if predicted.mean_ms < shared.mean_ms else SHARED
        others = [name for name in (CACHED, SHARED, MERGED) if name != scope]
        self._choices.insert(
            0,
            Choice(
                "scope",
                scope,
                f"mean {by_scope[scope]:.2f} ms",
                ", ".join(others),
                "mean " + ", ".join(f"{by_scope[name]:.2f} ms" for name in others),
            ),
        )
        if scope == SHARED:
            cache, predicted = replace(self._given, name=OFF, capacity_bytes=0), shared
        return scope, cache, predicted, by_scope

    # --- parts

    def _cost_ratios(self, predicted: Predicted) -> dict[int, float]:
        """By length: the mean time with the cache over the time without, of this traffic."""
        shared = self._replays.predict_shared().request_ms
        row = np.searchsorted(self._times.lengths, self._replays.lengths)
        row = np.minimum(row, len(self._times.lengths) - 1)
        return {
            int(self._times.lengths[one]): float(
                predicted.request_ms[row == one].mean() / shared[row == one].mean()
            )
            for one in np.unique(row)
        }

    def _in_flight_bytes(self) -> int:
        return min(IN_FLIGHT * self._replays.window_bytes(), self._given.capacity_bytes // 2)

    def _pages(self, share: float, ttl_s: float) -> CacheConfig:
        """A cache of pages alone, with room for a share of all users' K/V and what is in flight."""
        at_rest = max(math.ceil(share * self._replays.all_bytes), self._replays.window_bytes())
        capacity = at_rest + self._in_flight_bytes()
        # A multiple, so that the replay's capacity is the same number of pages.
        capacity = -(-capacity // self._replays.row_numbers) * self._replays.row_numbers
        watermark = min(0.999, math.ceil(1e4 * at_rest / capacity) / 1e4)
        return replace(
            self._given,
            name=MEMORY,
            capacity_bytes=capacity,
            watermark=watermark,
            policy=LRU,
            ttl_s=ttl_s,
            idle_ttl_s=ttl_s,
            min_events=0,
            pinned_bytes=0,
            host=replace(self._given.host, capacity_bytes=0),
            disk=replace(self._given.disk, folder=None),
            remote=replace(self._given.remote, url=None),
        )

    def _with_tier(self, cache: CacheConfig, name: str, codec: str) -> CacheConfig:
        least = self._fetch_break_even(name, codec)
        if name == HostTier.name:
            packets = len({request.user_id for request in self._trace.requests})
            mean_bytes = self._replays.mean_packet_bytes(name, codec)
            needed = math.ceil(packets * mean_bytes)
            capacity = min(self._given.host.capacity_bytes, needed)
            host = replace(self._given.host, capacity_bytes=capacity, codec=codec, min_events=least)
            return replace(cache, name=TIERED, host=host)
        if name == DiskTier.name:
            disk = replace(self._given.disk, codec=codec, min_events=least)
            return replace(cache, name=TIERED, disk=disk)
        assert name == RemoteTier.name
        remote = replace(self._given.remote, codec=codec, min_events=least)
        return replace(cache, name=TIERED, remote=remote)

    def _fetch_break_even(self, name: str, codec: str) -> int:
        """The shortest history that is fetched faster than it is encoded, by what was measured."""
        prefill = np.maximum(self._times.miss_ms - self._times.hit_ms, 1e-6).mean(axis=1)
        ratios = self._times.fetch_ms[name, codec] / prefill
        by_length = {
            int(length): float(ratio)
            for length, ratio in zip(self._times.lengths, ratios, strict=True)
        }
        least = break_even_events(by_length)
        return 0 if least == min(by_length) else least


def advise(artifact: Artifact, trace: Trace, config: AdviseConfig) -> tuple[Advice, Times]:
    """Measure the model on this machine, replay its traffic, and choose a cache.

    Raises:
        ConfigError: if the model's K/V may not be kept between requests.
        MissingExtraError: if a tier's packages are not installed.
        TierError: if a tier cannot be reached.
    """
    cache = config.cache
    codec, _ = smallest_codec(artifact, cache)
    tiers = configured_tiers(cache) if cache.name == TIERED else {}
    queues = [request.num_candidates for request in trace.requests if request.num_candidates]
    times = measure_times(
        artifact,
        cache,
        {name: sorted({FLOAT32, codec}) for name in tiers},
        _lengths(artifact, max(request.num_events for request in trace.requests)),
        sorted({*TABLE_CANDIDATES, int(np.median(queues or [1])), max(queues, default=1)}),
        repeats=config.repeats,
        seed=config.seed,
    )
    return Advisor(artifact, trace, times, cache, config.max_ttl_s).advise(), times


def _lengths(artifact: Artifact, longest: int) -> list[int]:
    """Return lengths that double up to the longest of the traffic, which a window cuts."""
    window = max(history.window.max_history for history in artifact.schema.histories)
    length = max(2 * NEW_EVENTS, min(longest, window))
    lengths = [length]
    while len(lengths) < NUM_LENGTHS and (length := length // 2) >= 2 * NEW_EVENTS:
        lengths.append(length)
    return sorted(lengths)


def _is_as_good(one: Predicted, other: Predicted) -> bool:
    return one.event_hit_rate >= other.event_hit_rate - POINT


def _found(predicted: Predicted) -> str:
    return f"{predicted.event_hit_rate:.3f} of events found"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.1f} MiB"
