"""What an engine with an advised cache does with the traffic that the advice was for."""

from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np

from torchrec_kvshare.benchmark.replay import DRAIN_S, TraceClock
from torchrec_kvshare.benchmark.timing import timed
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.open import MEMORY, OFF, TIERED, new_stack, new_store
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.export.exporter import Artifact
from torchrec_kvshare.planning.advice import Advice
from torchrec_kvshare.planning.trace import Trace
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import EXACT

NUM_WARM_UP = 32  # requests, ranked before by an engine of their own


@dataclass(frozen=True)
class Measured:
    """What an engine with the advised cache did."""

    hit_rate: float
    event_hit_rate: float
    p50_ms: float
    p99_ms: float
    mean_ms: float


def validate(advice: Advice, artifact: Artifact, trace: Trace) -> Measured:
    """Rank the traffic with an engine that has the advised cache, each request at its time.

    A remote tier is left out: its server's clock cannot be set to the trace's.
    """
    with TemporaryDirectory(prefix="kvshare-validate-") as folder:
        cache = replace(advice.cache, remote=replace(advice.cache.remote, url=None))
        if cache.disk.folder is not None:
            # K/V dated by the trace's clock has no place among that of today.
            cache = replace(cache, disk=replace(cache.disk, folder=folder))
        return _measured(artifact, trace, cache)


def _measured(artifact: Artifact, trace: Trace, cache: CacheConfig) -> Measured:
    engine, clock = engine_at(artifact, cache)
    warm_up, _ = engine_at(artifact, replace(cache, name=OFF if cache.name == OFF else MEMORY))
    for request in trace.requests[:NUM_WARM_UP]:
        warm_up.rank([request])
    latencies_ms, num_hits, num_cached = [], 0, 0
    for request in trace.requests:
        clock.now = float(request.time)
        [answer], latency_ms = timed(partial(engine.rank, [request]))
        latencies_ms.append(latency_ms)
        num_hits += answer.cache.status == HIT
        num_cached += answer.cache.cached_events
        if engine.store is not None and engine.store.stack is not None:
            engine.store.stack.drain(DRAIN_S)
    engine.close()
    return Measured(
        num_hits / len(trace.requests),
        num_cached / max(sum(request.num_events for request in trace.requests), 1),
        float(np.percentile(latencies_ms, 50)),
        float(np.percentile(latencies_ms, 99)),
        float(np.mean(latencies_ms)),
    )


def engine_at(artifact: Artifact, cache: CacheConfig) -> tuple[Engine, TraceClock]:
    """Open an engine whose cache has the clock of a trace."""
    clock = TraceClock()
    manifest = artifact.manifest
    store = None
    if cache.name != OFF:
        metrics = CacheMetrics()
        stack = None
        if cache.name == TIERED:
            stack = new_stack(cache, manifest.break_even_events, metrics, clock)
        store = new_store(
            [*manifest.towers.values()],
            cache,
            stack,
            extends=manifest.audit["append"] == EXACT,
            metrics=metrics,
            clock=clock,
        )
    return Engine(artifact.model, artifact.schema, store, version=manifest.version), clock
