"""Time of a request stage by stage, with the cache and without.

Both engines answer the same requests one at a time under torch's profiler. The first round is the
phase ``cold``: the cached engine misses and its prefill shows. The rounds after it are the phase
``warm``: the cached engine hits. Stages are the profiler's events with the names of
``model/stages.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils.tensorboard import SummaryWriter

from torchrec_kvshare.benchmark.options import ModelSizes
from torchrec_kvshare.benchmark.results import TENSORBOARD_FOLDER, fixed_width
from torchrec_kvshare.benchmark.workload import (
    draw_requests,
    make_cache,
    make_dlrm,
    make_schema,
)
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.model.stages import ATTEND, EXPAND, LOOKUP, PREFILL, SCORE
from torchrec_kvshare.scoring.engine import Engine

COLD = "kvshare/cold"
WARM = "kvshare/warm"
REQUEST = "kvshare/request"  # parsed request to answer, collating included

EVENT_BY_STAGE = {"lookup": LOOKUP, "prefill": PREFILL, "expand": EXPAND, "attend": ATTEND}
RANK = "rank"
TOTAL = "total"
STAGES = (*EVENT_BY_STAGE, RANK, TOTAL)
NUM_OPERATORS = 20

Stages = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class EngineProfile:
    """Profile of one engine.

    Attributes:
        latencies_ms: by phase (``cold``, ``warm``) and stage, one per request that had the stage.
        operators: table of the operators that took the most time.
        trace: path of the Chrome trace.
    """

    latencies_ms: Mapping[str, Stages]
    operators: str
    trace: Path


def profile_scoring(
    folder: Path,
    *,
    history: int,
    num_candidates: int,
    num_users: int,
    num_rounds: int,
    sizes: ModelSizes,
    page_size: int,
    seed: int,
) -> dict[str, EngineProfile]:
    """Profile a cached and an uncached engine over one model and the same requests.

    Args:
        folder: gets ``cached.trace.json``, ``uncached.trace.json`` and their TensorBoard runs.
        history: events of each user.
        num_candidates: candidates of each request.
        num_users: users, one request each.
        num_rounds: warm rounds; every request is answered once per round.
        sizes: the model's sizes.
        page_size: rows per page of K/V.
        seed: of weights and requests.

    Returns:
        Profiles named ``cached`` and ``uncached``.
    """
    schema = make_schema(history, num_users)
    model = RankingModel(make_dlrm(schema, sizes, seed)).eval()
    requests = [
        request
        for user in range(num_users)
        for request in draw_requests(schema, [num_candidates], user, seed + user)
    ]
    [tower] = model.collection.towers()
    cache = make_cache(tower, history, num_users, page_size)
    engine_by_name = {
        "cached": Engine(model, schema, KVStore([cache]), version=UNNAMED),
        "uncached": Engine(model, schema, None, version=UNNAMED),
    }
    # torch sets things up at its first call, which is the cost of neither engine.
    warm_up = make_cache(tower, history, 1, page_size)
    Engine(model, schema, KVStore([warm_up]), version=UNNAMED).rank(requests[:1])
    engine_by_name["uncached"].rank(requests[:1])
    folder.mkdir(parents=True, exist_ok=True)
    profile_by_name = {}
    for name, engine in engine_by_name.items():
        trace = folder / f"{name}.trace.json"
        profile_by_name[name] = profile_engine(engine, requests, num_rounds, trace)
        write_profile(folder / TENSORBOARD_FOLDER / name, profile_by_name[name])
    return profile_by_name


def profile_engine(
    engine: Engine, requests: Sequence[Request], num_rounds: int, trace: Path
) -> EngineProfile:
    """Answer requests one at a time, in a cold round and in warm ones, under the profiler.

    Args:
        engine: an engine with an empty cache or without one.
        requests: one per user.
        num_rounds: warm rounds.
        trace: path for the Chrome trace.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for phase, rounds in ((COLD, 1), (WARM, num_rounds)):
            with record_function(phase):
                for request in [*requests] * rounds:
                    with record_function(REQUEST):
                        engine.rank([request])
    profiler.export_chrome_trace(str(trace))
    operators = profiler.key_averages().table("self_cpu_time_total", row_limit=NUM_OPERATORS)
    return EngineProfile(stage_latencies(profiler.events()), operators, trace)


def stage_latencies(events: Sequence[FunctionEvent]) -> dict[str, dict[str, list[float]]]:
    """Return latencies by phase and stage, one per request that had the stage.

    ``rank`` is scoring without prefill and attention: embedding look-ups and the model's own
    layers. ``total`` includes what is in no stage: collating an uncached batch, putting K/V into
    pages, making the answer.

    Args:
        events: events of the profiler.

    Returns:
        Milliseconds; phases are ``cold`` and ``warm``, stages those of ``STAGES``.
    """
    ours = [event for event in events if event.name.startswith("kvshare/")]
    phases = [event for event in ours if event.name in (COLD, WARM)]
    latencies_ms: dict[str, dict[str, list[float]]] = {}
    for phase in phases:
        samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
        inside = _inside(phase, ours)
        for request in [event for event in inside if event.name == REQUEST]:
            for stage, value_ms in _stages_of(request, inside).items():
                samples[stage].append(value_ms)
        latencies_ms[phase.name.removeprefix("kvshare/")] = samples
    return latencies_ms


def write_profile(folder: Path, profiled: EngineProfile) -> None:
    """Write a TensorBoard run: histogram and median of every stage, and the operators.

    Tags are the same for every engine, so that runs in sibling folders show side by side.

    Args:
        folder: folder of the run.
        profiled: the profile; a stage without a latency is left out.
    """
    with SummaryWriter(str(folder)) as writer:
        for phase, stages in profiled.latencies_ms.items():
            for stage, samples in stages.items():
                if samples:
                    writer.add_histogram(f"{phase}/{stage}_ms", np.array(samples))
                    writer.add_scalar(f"{phase}/{stage}_median_ms", median(samples))
        writer.add_text("operators", fixed_width(profiled.operators))


def stage_table(profile_by_name: Mapping[str, EngineProfile]) -> str:
    """Return the median milliseconds of each stage as text, one line per engine and phase.

    Args:
        profile_by_name: as ``profile_scoring`` returns them.

    Returns:
        Text without a newline at its end; a stage without a latency is a dash.
    """
    lines = [f"{'median ms':>16}" + "".join(f"{stage:>10}" for stage in STAGES)]
    for name, profiled in profile_by_name.items():
        for phase, stages in profiled.latencies_ms.items():
            cells = [f"{median(stages[s]):.3f}" if stages[s] else "-" for s in STAGES]
            lines.append(f"{name + ' ' + phase:>16}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _stages_of(request: FunctionEvent, events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Return the milliseconds of each stage of one request."""
    inside = _inside(request, events)
    stages = {
        stage: _total_ms(inside, name)
        for stage, name in EVENT_BY_STAGE.items()
        if any(event.name == name for event in inside)
    }
    for score in inside:
        if score.name == SCORE:
            nested = _inside(score, inside)
            own_ms = _total_ms([score], SCORE)
            stages[RANK] = own_ms - _total_ms(nested, ATTEND) - _total_ms(nested, PREFILL)
    return stages | {TOTAL: _total_ms([request], REQUEST)}


def _inside(outer: FunctionEvent, events: Sequence[FunctionEvent]) -> list[FunctionEvent]:
    """Return the events that start while another event runs."""
    span = outer.time_range
    return [e for e in events if e is not outer and span.start <= e.time_range.start < span.end]


def _total_ms(events: Sequence[FunctionEvent], name: str) -> float:
    return sum(event.time_range.elapsed_us() for event in events if event.name == name) / 1e3
