"""Hit rates of requests in time order, by the cache's capacity, its policy and what it shares.

A trace is replayed without a model, with one number per row (``replay.py``). The first requests go
through an engine with a model too, which must find the same; its stages are timed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.benchmark.options import (
    DataOptions,
    ModelSizes,
    PageSize,
    TimedOptions,
)
from torchrec_kvshare.benchmark.plots import BLUE, GREEN, GREY, RED, Axis, Line, Picture
from torchrec_kvshare.benchmark.replay import RowPerEvent, TraceClock, WeightlessEngine
from torchrec_kvshare.benchmark.request_traces import (
    Trace,
    as_tensors,
    request_template,
    window_block,
    zipf_trace,
)
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import timed
from torchrec_kvshare.benchmark.workload import BYTES, make_dlrm
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.cache.kv_cache import CONTENT, PAGES, USER, KVCache, Lookup, Rules
from torchrec_kvshare.cache.leases import Wanted
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LRU, TINY_LFU, Policy, new_policy
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import DataConfig
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.requests import late_events
from torchrec_kvshare.errors import ConfigError, MissingExtraError, ParityError
from torchrec_kvshare.features.bags import Bags
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import (
    HISTORY,
    ITEM,
    TIME,
    History,
    Window,
)
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

CACHE_TRACE = "cache_trace"
# moka alone, without pages and leases.
LIBRARY_LRU = "library_lru"
LIBRARY_TINY_LFU = "library_tiny_lfu"
# Metrics of the engine's stages.
LOOKUP_MS, ENCODE_MS, SCORE_MS = "lookup_ms", "encode_ms", "score_ms"

CAPACITY_PERCENTS = (5, 10, 25, 50, 100)  # of the K/V of all users of a trace
ONE_CAPACITY = 10  # percent, for sharing, expiry and the engine
TTL_S = 300  # of trace time, where K/V expires
NO_TTL = 0
ENGINE_REQUESTS = 300  # the first of a trace, through an engine

LIBRARY_BY_POLICY = {LRU: LIBRARY_LRU, TINY_LFU: LIBRARY_TINY_LFU}
UNIT_BY_METRIC = {
    "evictions": "entries",
    "held_bytes": "bytes",
    "capacity_bytes": "bytes",
    LOOKUP_MS: "ms",
    ENCODE_MS: "ms",
    SCORE_MS: "ms",
}
LINE_BY_PATH = {
    LRU: Line("least recently used", BLUE),
    TINY_LFU: Line("TinyLFU", GREEN),
    LIBRARY_LRU: Line("moka alone, least recently used", GREY, is_dashed=True),
    LIBRARY_TINY_LFU: Line("moka alone, TinyLFU", RED, is_dashed=True),
}

Result = TypeVar("Result")
Figures = dict[str, float]


def _over_capacity(metric: str, label: str) -> Picture:
    return Picture(
        metrics=(metric,),
        label=label,
        panels=Axis("data", "data {}"),
        across=Axis("capacity_percent", "capacity [% of the K/V of all users]"),
        line_by_path=LINE_BY_PATH,
        case={"share": USER, "ttl_s": NO_TTL},
        is_logarithmic=False,
    )


PICTURE_BY_NAME = {
    "hit_rate": _over_capacity("hit_rate", "requests of which all K/V was cached [share]"),
    "event_hit_rate": _over_capacity("event_hit_rate", "events whose K/V was cached [share]"),
}


@dataclass
class CacheTraceOptions(TimedOptions, DataOptions, ModelSizes, PageSize):
    """Options of ``scenario=cache_trace``."""

    histories: list[int] = field(default_factory=lambda: [256])  # the first is the window
    candidates: list[int] = field(default_factory=lambda: [100])  # the first is used
    requests: int = 20_000  # of each trace, at most


class Setting(NamedTuple):
    """A cache that a trace is replayed on.

    Attributes:
        capacity_percent: of the K/V of all users.
        policy: eviction policy.
        share: whose K/V a history may use.
        ttl_s: seconds until K/V expires; ``NO_TTL`` for never.
    """

    capacity_percent: int
    policy: str = LRU
    share: str = USER
    ttl_s: int = NO_TTL


def measure_cache_trace(options: CacheTraceOptions) -> list[Record]:
    """Measure hit rates of two traces, the data's own and a Zipf trace, and the engine's stages.

    A trace starts with an empty cache, so a user's first request always misses. ``hit_rate`` is the
    share of requests of which all K/V was cached, ``hits_*`` by whose it was; the ``miss_*`` shares
    are the others by reason, where ``cold`` is also a history that has grown. ``event_hit_rate`` is
    the share of events. Figures of ``tiny_lfu`` are means over ``repeats``: its sketch is seeded at
    random.

    Returns:
        The records; of the library only ``hit_rate``.

    Raises:
        ConfigError: if there is no window.
        DataError: if the data cannot be read, or no late event has an earlier one of its user.
        MissingExtraError: if moka-py is not installed.
        ParityError: if the engine found something else than the replay.
    """
    if not options.histories:
        raise ConfigError("histories is []; its first number is the window")
    max_history = options.histories[0]
    history = History(HISTORY, Window(max_history, window_block(max_history)))
    num_requests, num_candidates, seed = options.requests, options.candidates[0], options.seed
    traces = (
        log_trace(options.data, history, num_requests, num_candidates, seed=seed),
        zipf_trace(max_history, num_requests, num_candidates, seed),
    )
    return [record for trace in traces for record in _trace_records(trace, options)]


# --- traces


def log_trace(
    data: DataConfig, history: History, num_requests: int, num_candidates: int, seed: int
) -> Trace:
    """Return the first requests of the last fourth of a log.

    Every event is a request of its user at its time; the history is the strictly earlier events,
    cut to the window. A user's first event has none and is left out.

    Args:
        data: the log.
        history: the window.
        num_requests: at most.
        num_candidates: candidates of every request, the same for all.
        seed: of the candidates.

    Raises:
        DataError: if the log cannot be read, or nothing is left.
    """
    dataset = build_dataset(load_log(data), [history])
    late = late_events(dataset, num_requests, data.name)
    template = request_template(dataset.schema, num_candidates, seed)
    known: dict[tuple[int, int], dict[str, Events]] = {}
    requests = []
    for event, user in zip(late.tolist(), dataset.event_user[late].tolist(), strict=True):
        num_earlier = int(dataset.num_earlier[event])
        if (user, num_earlier) not in known:
            events = _events_of(dataset, history.window, user, num_earlier)
            known[user, num_earlier] = {history.name: events}
        requests.append(
            replace(
                template,
                user_id=dataset.log.users.ids[user],
                user_row=int(dataset.user_row[user]),
                time=int(dataset.time[event]),
                events_by_history=known[user, num_earlier],
            )
        )
    return Trace(data.name, dataset.schema, requests)


def _events_of(dataset: Dataset, window: Window, user: int, num_earlier: int) -> Events:
    start = window.start(num_earlier)
    first = int(dataset.user_offsets[user])
    read = slice(first + start, first + num_earlier)
    items = dataset.item[read]
    columns = {ITEM: dataset.item_row[items], TIME: dataset.time[read]}
    for name, of_events in dataset.event_attributes.items():
        columns[name] = of_events.take(read)
    bags = {}
    for name, rows in dataset.item_attributes.items():
        values, lengths = rows.take(items)
        bags[name] = Bags(torch.from_numpy(values), torch.from_numpy(lengths))
    floats = {
        name: torch.from_numpy(dataset.event_floats[read, index].copy())
        for index, name in enumerate(dataset.schema.event_floats)
    }
    return Events(as_tensors(columns), bags, start, floats)


# --- replay


class Replay:
    """A trace that can be replayed on any cache; its digests are made once.

    Args:
        trace: the requests.
        page_size: rows per page; one row per event.
        row_bytes: bytes of the K/V of one event, for the figures in bytes.

    Attributes:
        num_pages: pages of the K/V of all users, each at its longest.
    """

    def __init__(self, trace: Trace, page_size: int, row_bytes: int) -> None:
        self.trace = trace
        self.page_size = page_size
        self.row_bytes = row_bytes
        [history] = trace.schema.histories
        self._max_history = history.window.max_history
        identity = identity_of(UNNAMED, NO_CONTEXT, history.name, page_size)
        digests_by_events: dict[int, PrefixDigests] = {}
        self._digests = []
        pages_by_user: dict[str, int] = {}
        for request in trace.requests:
            events = request.events_by_history[history.name]
            if id(events) not in digests_by_events:
                digests_by_events[id(events)] = PrefixDigests(events, trace.schema, identity)
            self._digests.append(digests_by_events[id(events)])
            known = pages_by_user.get(request.user_id, 0)
            pages_by_user[request.user_id] = max(known, self._pages_for(events.num_events))
        self.num_pages = sum(pages_by_user.values())
        self._wanted_by_request = {
            id(request): Wanted(request.user_id, [digests])
            for request, digests in zip(trace.requests, self._digests, strict=True)
        }

    def figures(self, setting: Setting) -> Figures:
        """Replay the trace on an empty cache.

        Returns:
            The figures that ``measure_cache_trace`` names.
        """
        clock = TraceClock()
        store = KVStore([KVCache(*self._parts(setting, (1, 1, 1)), clock)])
        engine = WeightlessEngine(RowPerEvent(), self.trace.schema, store, self._wanted_by_request)
        engine.replay(self.trace.requests, clock)
        return self._read(store, setting)

    def library_figures(self, setting: Setting) -> Figures:
        """Replay the trace on moka alone: a user's entry with the same history is a hit."""
        try:
            from moka_py import Moka
        except ImportError as error:
            raise MissingExtraError("tiers", f"scenario {CACHE_TRACE}") from error
        assert setting.policy in (LRU, TINY_LFU)
        cache: Moka[str, PrefixDigests] = Moka(
            self._capacity_pages(setting),
            policy="lru" if setting.policy == LRU else "tiny_lfu",
            weigher=lambda _, history: self._pages_for(history.num_events),
        )
        num_hits = 0
        for request, history in zip(self.trace.requests, self._digests, strict=True):
            found = cache.get(request.user_id)
            if found is not None and found.whole == history.whole:
                num_hits += 1
            else:
                cache.set(request.user_id, history)
                cache.run_pending_tasks()  # Before, it may hold more than its capacity.
        return {"hit_rate": num_hits / len(self._digests)}

    @torch.no_grad()
    def stages_ms(self, setting: Setting, model: nn.Module) -> Figures:
        """Rank the trace with an engine.

        Args:
            setting: of the engine's cache; its policy must not be seeded at random.
            model: a causal ranking model with the trace's columns.

        Returns:
            Median milliseconds of a look-up, digests included; of encoding what was missing; of
            scoring.

        Raises:
            ParityError: if the engine's cache found something else than ``figures``.
        """
        stages = _Stages()
        clock = TraceClock()
        timed_model = _TimedModel(model, stages).eval()
        [tower] = timed_model.collection.towers()
        cache = _TimedCache(stages, *self._parts(setting, tower.kv_shape), clock)
        store = KVStore([cache])
        engine = Engine(timed_model, self.trace.schema, store, version=UNNAMED)
        for request in self.trace.requests:
            clock.now = float(request.time)
            engine.rank([request])
        found, expected = self._read(store, setting), self.figures(setting)
        if found != expected:
            raise ParityError(f"an engine on data {self.trace.data} found {found}, not {expected}")
        return stages.medians()

    def _pages_for(self, num_events: int) -> int:
        return -(-num_events // self.page_size)

    def _capacity_pages(self, setting: Setting) -> int:
        return max(1, self.num_pages * setting.capacity_percent // 100)

    def _parts(self, setting: Setting, kv_shape: tuple[int, int, int]) -> "_Parts":
        page_bytes = self.page_size * math.prod(kv_shape) * BYTES
        num_pages = self._capacity_pages(setting)
        # One history more, for the request in flight, even if it is not admitted.
        num_in_flight = self._pages_for(self._max_history)
        pool = PagePool((num_pages + num_in_flight) * page_bytes, self.page_size, *kv_shape)
        rules = Rules(setting.ttl_s or math.inf, share=setting.share)
        return _Parts(pool, rules, new_policy(setting.policy, num_pages * page_bytes))

    def _read(self, store: KVStore, setting: Setting) -> Figures:
        """Return what a store counted over the whole trace."""
        snapshot = store.metrics.snapshot()
        num_requests = len(self.trace.requests)
        outcomes = {
            dict(series.labels)["outcome"]: value / num_requests
            for series, value in snapshot.values.items()
            if series.name == "lookups"
        }
        hits = {
            f"hits_{scope}": snapshot.value("hits_by_scope", scope=scope) / num_requests
            for scope in ("cross_request", "cross_user")
        }
        pool = store.caches[0].pool
        page_bytes = self.page_size * self.row_bytes
        return {
            "hit_rate": outcomes.pop(HIT, 0.0),
            "event_hit_rate": snapshot.hit_rate(),
            **hits,
            **{f"miss_{reason}": share for reason, share in sorted(outcomes.items())},
            "evictions": snapshot.value("evictions", tier=PAGES),
            "held_bytes": float((pool.num_pages - pool.num_free) * page_bytes),
            "capacity_bytes": float(self._capacity_pages(setting) * page_bytes),
        }


class _Parts(NamedTuple):
    """The parts of a cache."""

    pool: PagePool
    rules: Rules
    policy: Policy


class _Stages:
    """Milliseconds of every call, by metric."""

    def __init__(self) -> None:
        self._samples_by_metric: dict[str, list[float]] = defaultdict(list)

    def timed(self, metric: str, call: Callable[[], Result]) -> Result:
        result, latency_ms = timed(call)
        self._samples_by_metric[metric].append(latency_ms)
        return result

    def medians(self) -> Figures:
        return {metric: median(samples) for metric, samples in self._samples_by_metric.items()}


class _TimedCache(KVCache):
    """A cache whose look-ups are timed."""

    def __init__(self, stages: _Stages, *parts: Any) -> None:
        super().__init__(*parts)
        self._stages = stages

    def lookup(self, user_id: str, history: PrefixDigests) -> Lookup:
        return self._stages.timed(LOOKUP_MS, partial(super().lookup, user_id, history))


class _TimedModel(RankingModel):
    """A model whose encoding and scoring are timed."""

    def __init__(self, model: nn.Module, stages: _Stages) -> None:
        super().__init__(model)
        self._stages = stages

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        return self._stages.timed(ENCODE_MS, partial(super().prefill, features))

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        call = partial(super().extend, features, cached, cached_rows)
        return self._stages.timed(ENCODE_MS, call)

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        call = partial(super().score, dense, features, kv_pages, items)
        return self._stages.timed(SCORE_MS, call)


# --- records


def _trace_records(trace: Trace, options: CacheTraceOptions) -> Iterator[Record]:
    row_bytes = 2 * options.num_layers * options.dim * BYTES  # keys and values of each layer
    replay = Replay(trace, options.page_size, row_bytes)
    max_history = trace.schema.histories[0].window.max_history

    def records(path: str, setting: Setting, figures: Figures, more: Case) -> Iterator[Record]:
        case: Case = {"path": path, "data": trace.data, "history": max_history}
        for metric, value in figures.items():
            unit = UNIT_BY_METRIC.get(metric, "x")
            yield Record(CACHE_TRACE, case | setting._asdict() | more, metric, value, unit=unit)

    for setting in _settings():
        num_repeats = options.repeats if setting.policy == TINY_LFU else 1
        figures = [replay.figures(setting) for _ in range(num_repeats)]
        yield from records(setting.policy, setting, _means(figures), {})
        if setting.share == USER and setting.ttl_s == NO_TTL:
            figures = [replay.library_figures(setting) for _ in range(num_repeats)]
            yield from records(LIBRARY_BY_POLICY[setting.policy], setting, _means(figures), {})
    first = replace(trace, requests=trace.requests[:ENGINE_REQUESTS])
    setting = Setting(ONE_CAPACITY)
    model = make_dlrm(trace.schema, options, options.seed)
    stages_ms = Replay(first, options.page_size, row_bytes).stages_ms(setting, model)
    num_candidates = trace.requests[0].num_candidates
    model_case = options.case(CAUSAL) | {"candidates": num_candidates, "users": 1}
    yield from records(setting.policy, setting, stages_ms, model_case)


def _settings() -> list[Setting]:
    return [
        *(Setting(each, policy) for each in CAPACITY_PERCENTS for policy in (LRU, TINY_LFU)),
        *(Setting(ONE_CAPACITY, policy, CONTENT) for policy in (LRU, TINY_LFU)),
        Setting(ONE_CAPACITY, ttl_s=TTL_S),
    ]


def _means(figures: Sequence[Figures]) -> Figures:
    """Return the mean of each metric; a reason that a replay never had counts as 0."""
    metrics = dict.fromkeys(metric for each in figures for metric in each)
    return {metric: fmean(each.get(metric, 0.0) for each in figures) for metric in metrics}
