"""Hit rate and latency of a trace while new versions of the model are published.

A Zipf trace goes through an engine, request by request, in the trace's own time. A version is
published every few minutes of it: one whose ranking stage alone is new, or one whose every weight
is. Each version takes over as in a server: engines whose K/V is the same share a store, and the
users that asked most are encoded first.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from torchrec_kvshare.benchmark.options import ModelSizes, Options, PageSize
from torchrec_kvshare.benchmark.request_traces import Trace, zipf_trace
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import timed
from torchrec_kvshare.benchmark.workload import make_cache, make_dlrm
from torchrec_kvshare.cache.identity import ModelVersion, version_of
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.models import HotUsers, warm_up

PUBLISH = "publish"
NEVER, RANKING_STAGE, EVERYTHING = "never", "ranking_stage", "everything"
STAGE = ("over_arch", "dense_arch", ".bag_")
HOT_BYTES = 2**20
CHECKED = 50  # every so many requests, the scores are compared with those without a cache
TOLERANCE = 2e-6  # of a probability


@dataclass
class PublishOptions(Options, ModelSizes, PageSize):
    """Options of ``scenario=publish``."""

    histories: list[int] = field(default_factory=lambda: [256])  # the first is the window
    candidates: list[int] = field(default_factory=lambda: [20])  # the first is used
    requests: int = 4200  # of the trace; one a second
    minutes: list[int] = field(default_factory=lambda: [1, 5, 60])  # between two versions
    warm_users: list[int] = field(default_factory=lambda: [0, 64])  # that a version starts with


class Published(NamedTuple):
    """What is published during a replay.

    Attributes:
        change: ``never``, ``ranking_stage`` or ``everything``.
        minutes: of trace time between two versions.
        warm_users: that a version starts with.
    """

    change: str
    minutes: int = 0
    warm_users: int = 0


def measure_publish(options: PublishOptions) -> list[Record]:
    """Replay the trace once without a new version, and once for each kind and interval.

    Returns:
        ``hit_rate``, the share of requests of which all K/V was cached; ``p50_ms`` and ``p99_ms``
        of a request, which the engine answers alone; ``num_versions``; ``warm_up_ms``, the mean
        time of encoding hot users per version; and ``hit_rate_loss`` against no new version.

    Raises:
        ParityError: if scores differ from those without a cache.
    """
    trace = zipf_trace(options.histories[0], options.requests, options.candidates[0], options.seed)
    model = RankingModel(make_dlrm(trace.schema, options, options.seed)).eval()
    settings = [Published(NEVER)]
    for minutes in options.minutes:
        settings.append(Published(RANKING_STAGE, minutes))
        settings += [Published(EVERYTHING, minutes, num_hot) for num_hot in options.warm_users]
    case = options.case(CAUSAL) | {"history": options.histories[0]}
    case |= {"candidates": options.candidates[0], "requests": len(trace.requests)}
    records: list[Record] = []
    hit_rate = 0.0
    for setting in settings:
        replay = _Replay(trace, model, options.page_size, setting)
        figures = replay.figures()
        if setting.change == NEVER:
            hit_rate = figures["hit_rate"]
        figures["hit_rate_loss"] = hit_rate - figures["hit_rate"]
        records += _records(case, setting, figures)
    return records


def _records(case: Case, setting: Published, figures: dict[str, float]) -> Iterator[Record]:
    of_setting: Case = {
        "path": setting.change,
        "minutes": setting.minutes,
        "warm_users": setting.warm_users,
    }
    for metric, value in figures.items():
        unit = "ms" if metric.endswith("_ms") else "1" if metric.startswith("num_") else "x"
        yield Record(PUBLISH, case | of_setting, metric, value, unit=unit)


class _Replay:
    """A trace over versions of a model, one after the other."""

    def __init__(
        self, trace: Trace, model: RankingModel, page_size: int, setting: Published
    ) -> None:
        self._trace = trace
        self._model = model
        self._page_size = page_size
        self._setting = setting
        self._hot = HotUsers(setting.warm_users, HOT_BYTES)
        self._engine = self._engine_of(version_of(model, trace.schema))
        self._num_versions = 0
        self._warm_up_s = 0.0

    def figures(self) -> dict[str, float]:
        uncached = Engine(self._model, self._trace.schema, None, version=self._engine.version)
        interval_s = 60.0 * self._setting.minutes
        publish_at = self._trace.requests[0].time + interval_s
        statuses: Counter[str] = Counter()
        latencies_ms = []
        for number, request in enumerate(self._trace.requests):
            while interval_s and request.time >= publish_at:
                self._publish()
                publish_at += interval_s
            [answer], latency_ms = timed(partial(self._engine.rank, [request]))
            latencies_ms.append(latency_ms)
            statuses[answer.cache.status] += 1
            if self._setting.warm_users:
                self._hot.remember(request.user_id, {"number": number})
            if number % CHECKED == 0 and self._setting.change == NEVER:
                [expected] = uncached.rank([request])
                worst = np.abs(np.subtract(answer.ranking_scores, expected.ranking_scores)).max()
                if worst > TOLERANCE:
                    raise ParityError(f"scores differ by {worst:.1e}; {TOLERANCE} is allowed")
        return {
            "hit_rate": statuses[HIT] / len(latencies_ms),
            "p50_ms": float(np.percentile(latencies_ms, 50)),
            "p99_ms": float(np.percentile(latencies_ms, 99)),
            "num_versions": float(self._num_versions),
            "warm_up_ms": 1e3 * self._warm_up_s / max(1, self._num_versions),
        }

    def _publish(self) -> None:
        """Let a new version take over; its cost is that of these weights, so they score on."""
        self._num_versions += 1
        version = self._changed_version()
        if version.kv_versions == self._engine.version.kv_versions:
            schema, store = self._trace.schema, self._engine.store
            self._engine = Engine(self._model, schema, store, version=version)
        else:
            self._engine = self._engine_of(version)
        users = [self._trace.requests[raw["number"]] for raw in self._hot.hottest()]
        self._warm_up_s += warm_up(self._engine, users, share=1.0)

    def _changed_version(self) -> ModelVersion:
        """Return the version of the model with another ranking stage, or other weights at all."""
        other = copy.deepcopy(self._model)
        for name, weight in other.ranker.named_parameters():
            if self._setting.change == EVERYTHING or any(part in name for part in STAGE):
                with torch.no_grad():
                    weight.add_(1e-3 * self._num_versions)
        return version_of(other, self._trace.schema)

    def _engine_of(self, version: ModelVersion) -> Engine:
        """Return an engine whose pages have room for all users."""
        [tower] = self._model.collection.towers()
        num_users = len({request.user_id for request in self._trace.requests})
        max_history = self._trace.schema.histories[0].window.max_history
        cache = make_cache(tower, max_history, num_users + 1, self._page_size)
        return Engine(self._model, self._trace.schema, KVStore([cache]), version=version)
