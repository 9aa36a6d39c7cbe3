"""What a cache answers of requests in time order, by its capacity, its policy and what it shares.

Whose K/V stays depends on how many pages it has and not on what is in them. So a trace is replayed
without a model, on the store itself and with one number a row, looked up and put as the engine does
it. A stretch of it goes through an engine too, which must find the same, for the times of its
stages.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.workload import BYTES, fill_zeros, make_schema
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.cache.kv_cache import CONTENT, PAGES, USER, KVCache, Lookup, Rules
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.policies import LRU, TINY_LFU, Policy, new_policy
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.config import DataConfig
from torchrec_kvshare.data.dataset import Dataset, Ints, build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.errors import ConfigError, DataError, MissingExtraError, ParityError
from torchrec_kvshare.features.bags import Bags, single
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Events, Request
from torchrec_kvshare.features.schema import (
    ACTION,
    HISTORY,
    ITEM,
    NUM_RESERVED_ROWS,
    TIME,
    FeatureSchema,
    History,
    Window,
    item_key,
)
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.scoring.engine import Engine

CACHE_TRACE = "cache_trace"
ZIPF = "zipf"
# moka alone, without pages and holders.
LIBRARY_LRU = "library_lru"
LIBRARY_TINY_LFU = "library_tiny_lfu"
LOOKUP, ENCODE, SCORE = "lookup", "encode", "score"

CAPACITY_PERCENTS = (5, 10, 25, 50, 100)  # of what the K/V of all users of a trace takes
ONE_CAPACITY = 10  # percent, where sharing, expiry and the engine are tried
TTL_S = 300  # of trace time, where K/V expires
NO_TTL = 0
ENGINE_REQUESTS = 300  # of a trace, through an engine
BLOCKS_PER_WINDOW = 4  # as pipelines.train has it: 256 events in blocks of 64
LATE_SHARE = 4  # of a log, the part that is replayed: its last fourth

ZIPF_EXPONENT = 1.1
REQUESTS_PER_USER = 10  # mean
VISITS_PER_EVENT = 5  # of a user, until its history has one event more
SECONDS_PER_REQUEST = 1.0  # mean
SHORTEST_SHARE = 8  # of a window, the least that a user comes with: an eighth
TWINS = 10  # every tenth user has the events of the one before: the second account of a household
ZIPF_START = 1_700_000_000  # Unix seconds
FIRST_EVENT_S = 365 * 86_400  # before that
SECONDS_PER_EVENT = 3600

LIBRARY_BY_POLICY = {LRU: LIBRARY_LRU, TINY_LFU: LIBRARY_TINY_LFU}
UNIT_BY_METRIC = {
    "evictions": "entries",
    "held_bytes": "bytes",
    "capacity_bytes": "bytes",
    f"{LOOKUP}_ms": "ms",
    f"{ENCODE}_ms": "ms",
    f"{SCORE}_ms": "ms",
}
Figures = dict[str, float]


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they came.

    Attributes:
        data: where they are from.
        schema: their columns; one history.
        requests: each with an event at least; those whose history is the same share its ``Events``.
    """

    data: str
    schema: FeatureSchema
    requests: Sequence[Request]


class Setting(NamedTuple):
    """A cache that a trace is replayed on.

    Attributes:
        capacity_percent: of what the K/V of all users takes.
        policy: who leaves.
        share: whose K/V a history may use.
        ttl_s: seconds after which K/V is encoded anew; ``NO_TTL`` for never.
    """

    capacity_percent: int
    policy: str = LRU
    share: str = USER
    ttl_s: int = NO_TTL


def measure_cache_trace(plan: Plan, sizes: Sizes) -> list[Record]:
    """Hit rates of two traces, the data's own and a Zipf trace; times of the engine's stages.

    A trace starts with an empty cache, so a user's first request always misses. ``hit_rate`` is the
    share of requests of which all K/V was cached, ``hits_*`` by whose it was; the ``miss_*`` shares
    are the others by reason, where ``cold`` is also a history that has grown. ``event_hit_rate`` is
    the share of events. Figures of ``tiny_lfu`` are means over ``repeats``: its sketch is seeded at
    random.

    Args:
        plan: ``data``; ``requests``, how many of each trace; the first of ``histories``, which is
            the window; the first of ``candidates``; ``repeats``; ``seed``.
        sizes: of the tower, of K/V and of pages.

    Returns:
        The records; of the library only ``hit_rate``.

    Raises:
        ConfigError: if there is no request to replay.
        DataError: if the data cannot be read, or no late event of it has one before.
        MissingExtraError: if moka-py is not installed.
        ParityError: if the engine found something else than the replay.
    """
    if plan.requests < 1 or not plan.histories:
        raise ConfigError(
            f"requests is {plan.requests} and histories {list(plan.histories)}; scenario "
            f"{CACHE_TRACE} needs at least one of each"
        )
    max_history = plan.histories[0]
    num_candidates = plan.candidates[0]
    traces = [zipf_trace(max_history, plan.requests, num_candidates, plan.seed)]
    if plan.data is not None:
        history = History(HISTORY, Window(max_history, _block(max_history)))
        traces.insert(0, log_trace(plan.data, history, plan.requests, num_candidates, plan.seed))
    return [record for trace in traces for record in _trace_records(trace, plan, sizes)]


# --- traces


def log_trace(
    data: DataConfig, history: History, num_requests: int, num_candidates: int, seed: int
) -> Trace:
    """The first requests of a log's last fourth.

    Every event is a request of its user at its time, whose history is the strictly earlier events,
    cut to the window. First events of users have none and are left out.

    Args:
        data: the log.
        history: its window.
        num_requests: at most.
        num_candidates: of every request, the same for all.
        seed: of the candidates.

    Raises:
        DataError: if the log cannot be read, or nothing is left.
    """
    dataset = build_dataset(load_log(data), [history])
    num_early = len(dataset.time) * (LATE_SHARE - 1) // LATE_SHARE
    late = np.argsort(dataset.time, kind="stable")[num_early:]
    late = late[dataset.num_earlier[late] > 0][:num_requests]
    if not len(late):
        raise DataError(f"no event of the last fourth of data {data.name} has one before")
    template = _template(dataset.schema, num_candidates, seed)
    known: dict[tuple[int, int], dict[str, Events]] = {}
    requests = []
    for place, user in zip(late.tolist(), dataset.event_user[late].tolist(), strict=True):
        num_earlier = int(dataset.num_earlier[place])
        if (user, num_earlier) not in known:
            events = _events_of(dataset, history.window, user, num_earlier)
            known[user, num_earlier] = {history.name: events}
        requests.append(
            replace(
                template,
                user_id=dataset.log.users.ids[user],
                user_row=int(dataset.user_row[user]),
                time=int(dataset.time[place]),
                events_by_history=known[user, num_earlier],
            )
        )
    return Trace(data.name, dataset.schema, requests)


def zipf_trace(max_history: int, num_requests: int, num_candidates: int, seed: int) -> Trace:
    """Users who come by Zipf's law, and whose histories grow by an event every few visits.

    Args:
        max_history: of the window; users come with an eighth of it or more.
        num_requests: one a second, on average.
        num_candidates: of every request, the same for all.
        seed: same seed, same trace.
    """
    num_users = max(1, num_requests // REQUESTS_PER_USER)
    rng = np.random.default_rng(seed)
    weights = np.arange(1, num_users + 1) ** -ZIPF_EXPONENT
    users = rng.choice(num_users, num_requests, p=weights / weights.sum())
    times = ZIPF_START + rng.exponential(SECONDS_PER_REQUEST, num_requests).cumsum().astype(int)
    shortest = max(1, max_history // SHORTEST_SHARE)
    num_first = rng.integers(shortest, max_history + 1, num_users)
    is_twin = np.arange(num_users) % TWINS == TWINS - 1
    owner_by_user = np.arange(num_users) - is_twin
    schema = make_schema(max_history, num_users, _block(max_history))
    window = schema.histories[0].window
    template = _template(schema, num_candidates, seed)
    num_visits = [0] * num_users
    known: dict[tuple[int, int], dict[str, Events]] = {}
    requests = []
    for user, at in zip(users.tolist(), times.tolist(), strict=True):
        owner = int(owner_by_user[user])
        num_events = int(num_first[owner]) + num_visits[user] // VISITS_PER_EVENT
        num_visits[user] += 1
        if (owner, num_events) not in known:
            of_owner = np.random.default_rng([seed, owner])
            events = _drawn_events(schema, window, of_owner, num_events)
            known[owner, num_events] = {HISTORY: events}
        requests.append(
            replace(
                template,
                user_id=str(user),
                user_row=user + NUM_RESERVED_ROWS,
                time=at,
                events_by_history=known[owner, num_events],
            )
        )
    return Trace(ZIPF, schema, requests)


def _block(max_history: int) -> int:
    return max_history // math.gcd(max_history, BLOCKS_PER_WINDOW)


def _template(schema: FeatureSchema, num_candidates: int, seed: int) -> Request:
    """A request without events: what candidates cost depends on their number alone."""
    return parse_request(draw_raw_request(schema, 0, num_candidates, seed), schema)


def _events_of(dataset: Dataset, window: Window, user: int, num_earlier: int) -> Events:
    start = window.start(num_earlier)
    first = int(dataset.user_offsets[user])
    read = slice(first + start, first + num_earlier)
    items = dataset.item[read]
    columns = {ITEM: dataset.item_row[items], TIME: dataset.time[read]}
    if dataset.schema.has_action:
        columns[ACTION] = dataset.action_row[dataset.action[read]]
    bags = {}
    for name, rows in dataset.item_attributes.items():
        values, lengths = rows.take(items)
        bags[name] = Bags(torch.from_numpy(values), torch.from_numpy(lengths))
    return Events(_tensors(columns), bags, start)


def _drawn_events(
    schema: FeatureSchema, window: Window, rng: np.random.Generator, num_events: int
) -> Events:
    """The window of a user's first events; a longer history begins as the shorter ones do."""
    start = window.start(num_events)
    numbers = rng.integers(2**31, size=num_events)[start:]

    def drawn(key: str) -> Ints:
        return NUM_RESERVED_ROWS + numbers % (schema.num_rows(key) - NUM_RESERVED_ROWS)

    rows = {column: drawn(column) for column in schema.event_columns}
    bags = {c: single(torch.from_numpy(drawn(item_key(c)))) for c in schema.item_attributes}
    places = np.arange(start, num_events)
    rows[TIME] = ZIPF_START - FIRST_EVENT_S + SECONDS_PER_EVENT * places
    return Events(_tensors(rows), bags, start)


def _tensors(columns: dict[str, Ints]) -> dict[str, Tensor]:
    return {column: torch.from_numpy(values) for column, values in columns.items()}


# --- replay


class _Clock:
    """The time of the request that is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Replay:
    """A trace that can be replayed on any cache, its digests made once.

    Args:
        trace: what comes, in order.
        page_size: rows per page; one row an event.
        row_bytes: of the K/V of one event, for the figures in bytes.

    Attributes:
        num_pages: that the K/V of all users takes, each at its longest.
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

    def figures(self, setting: Setting) -> Figures:
        """Replay the trace on an empty cache.

        Returns:
            What ``measure_cache_trace`` says of it.
        """
        clock = _Clock()
        store = KVStore([KVCache(*self._parts(setting, (1, 1, 1)), clock)])
        zeros = torch.zeros(1, self._max_history, 1, 1)
        for request, history in zip(self.trace.requests, self._digests, strict=True):
            clock.now = float(request.time)
            lookup = store.caches[0].lookup(request.user_id, history)
            held = [lookup.entry]
            num_missing = history.num_events - lookup.num_matched
            if lookup.reason == HIT:
                store.count_hit(request.user_id, [lookup])
            else:
                kv = zeros[:, :num_missing]
                content, num_kept = history.content, lookup.num_matched
                held.append(store.put(0, request.user_id, content, kv, lookup, num_kept))
            for entry in held:
                if entry is not None:
                    store.release(0, entry)
            store.metrics.count("events", lookup.num_matched, source="cached")
            store.metrics.count("events", num_missing, source="computed")
        return self._read(store, setting)

    def library_figures(self, setting: Setting) -> Figures:
        """Replay the trace on moka alone: who is there with all of a history's events is a hit."""
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
                cache.run_pending_tasks()  # Until then it may hold more than its capacity.
        return {"hit_rate": num_hits / len(self._digests)}

    @torch.no_grad()
    def stages_ms(self, setting: Setting, model: nn.Module) -> Figures:
        """Rank the trace with an engine.

        Args:
            setting: of its cache; the policy must be one that does not draw.
            model: a ranking model of the trace's columns, whose history is causal.

        Returns:
            Median milliseconds of a look-up, digests included; of encoding, whole or the rest,
            where something missed; of scoring.

        Raises:
            ParityError: if what it found is not what ``figures`` gives.
        """
        stages = _Stages()
        clock = _Clock()
        timed = _TimedModel(model, stages).eval()
        [tower] = timed.collection.towers()
        cache = _TimedCache(stages, *self._parts(setting, tower.kv_shape), clock)
        store = KVStore([cache])
        engine = Engine(timed, self.trace.schema, store, version=UNNAMED)
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
        # Beyond the capacity one history for the request in flight, even if it is not admitted.
        num_in_flight = self._pages_for(self._max_history)
        pool = PagePool((num_pages + num_in_flight) * page_bytes, self.page_size, *kv_shape)
        rules = Rules(setting.ttl_s or math.inf, share=setting.share)
        return _Parts(pool, rules, new_policy(setting.policy, num_pages * page_bytes))

    def _read(self, store: KVStore, setting: Setting) -> Figures:
        """What a store has counted over the whole trace."""
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
    """What a cache is made of."""

    pool: PagePool
    rules: Rules
    policy: Policy


class _Stages:
    """Milliseconds of every call, by stage."""

    def __init__(self) -> None:
        self._samples_by_stage: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._samples_by_stage[stage].append((time.perf_counter() - start) * 1e3)

    def medians(self) -> Figures:
        return {f"{stage}_ms": median(each) for stage, each in self._samples_by_stage.items()}


class _TimedCache(KVCache):
    """A cache whose look-ups are timed."""

    def __init__(self, stages: _Stages, *parts: Any) -> None:
        super().__init__(*parts)
        self._stages = stages

    def lookup(self, user_id: str, history: PrefixDigests) -> Lookup:
        with self._stages.timed(LOOKUP):
            return super().lookup(user_id, history)


class _TimedModel(RankingModel):
    """A model whose encoding and scoring are timed."""

    def __init__(self, model: nn.Module, stages: _Stages) -> None:
        super().__init__(model)
        self._stages = stages

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        with self._stages.timed(ENCODE):
            return super().prefill(features)

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        with self._stages.timed(ENCODE):
            return super().extend(features, cached, cached_rows)

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        with self._stages.timed(SCORE):
            return super().score(dense, features, kv_pages, items)


# --- records


def _trace_records(trace: Trace, plan: Plan, sizes: Sizes) -> Iterator[Record]:
    row_bytes = 2 * sizes.num_layers * sizes.dim * BYTES  # keys and values of each layer
    replay = Replay(trace, sizes.page_size, row_bytes)
    max_history = trace.schema.histories[0].window.max_history

    def records(path: str, setting: Setting, figures: Figures, more: Case) -> Iterator[Record]:
        case: Case = {"path": path, "data": trace.data, "history": max_history}
        for metric, value in figures.items():
            unit = UNIT_BY_METRIC.get(metric, "x")
            yield Record(CACHE_TRACE, case | setting._asdict() | more, metric, value, unit)

    for setting in _settings():
        num_repeats = plan.repeats if setting.policy == TINY_LFU else 1
        figures = [replay.figures(setting) for _ in range(num_repeats)]
        yield from records(setting.policy, setting, _means(figures), {})
        if setting.share == USER and setting.ttl_s == NO_TTL:
            figures = [replay.library_figures(setting) for _ in range(num_repeats)]
            yield from records(LIBRARY_BY_POLICY[setting.policy], setting, _means(figures), {})
    stretch = replace(trace, requests=trace.requests[:ENGINE_REQUESTS])
    setting = Setting(ONE_CAPACITY)
    stages_ms = Replay(stretch, sizes.page_size, row_bytes).stages_ms(
        setting, _drawn_model(trace.schema, sizes, plan.seed)
    )
    num_candidates = trace.requests[0].num_candidates
    model_case = sizes.case(CAUSAL) | {"candidates": num_candidates, "users": 1}
    yield from records(setting.policy, setting, stages_ms, model_case)


def _settings() -> list[Setting]:
    return [
        *(Setting(each, policy) for each in CAPACITY_PERCENTS for policy in (LRU, TINY_LFU)),
        *(Setting(ONE_CAPACITY, policy, CONTENT) for policy in (LRU, TINY_LFU)),
        Setting(ONE_CAPACITY, ttl_s=TTL_S),
    ]


def _means(figures: Sequence[Figures]) -> Figures:
    """Of each metric; a reason that a replay never had counts as 0 there."""
    metrics = dict.fromkeys(metric for each in figures for metric in each)
    return {metric: fmean(each.get(metric, 0.0) for each in figures) for metric in metrics}


def _drawn_model(schema: FeatureSchema, sizes: Sizes, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fill_zeros(dlrm_with_history(schema, sizes.spec(CAUSAL), [sizes.dim, 1]))
