"""What one user's queue of N candidates costs in time and in memory, by the path that scores it.

``uncached_merged`` encodes the history once per candidate, ``request_shared`` once per request, and
``cross_request_hit`` finds its K/V in the cache. Before anything is measured the logits must agree.
All paths start from a parsed request and end with logits; each collates its own batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from torchrec_kvshare.benchmark.baselines.merged import MergedEmbeddingBagCollection, share_weights
from torchrec_kvshare.benchmark.memory import peak_allocated_bytes
from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import (
    fusion_costs,
    interleaved_medians,
    seed_model_speedup,
)
from torchrec_kvshare.benchmark.workload import (
    draw_requests,
    make_cache,
    make_dlrm,
    make_schema,
)
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features.batches import (
    collate,
    collate_candidates,
    collate_history,
    user_of_candidates,
)
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.history.pages import split_users
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.scoring.engine import expand
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

UNCACHED_MERGED = "uncached_merged"
REQUEST_SHARED = "request_shared"
CROSS_REQUEST_HIT = "cross_request_hit"
SEED_MODEL = "seed_model"
REPEATED_KV = "repeated_kv"

QUEUE_LENGTH = "queue_length"
MEMORY = "memory"

CHUNK_TRIAL_CANDIDATES = 50  # at 1000 events they fill the largest default chunk

Score = Callable[[], Tensor]


class Paths:
    """The three ways to score, over one model and one user's history.

    Args:
        schema: columns; its window is the history's length.
        ranker: the model, with one history; see ``workload.fill_zeros``.
        sizes: its page size and its body.
    """

    def __init__(self, schema: FeatureSchema, ranker: nn.Module, sizes: Sizes) -> None:
        self.schema = schema
        self.ranker = ranker
        self.model = RankingModel(ranker).eval()
        [tower] = self.model.collection.towers()
        longest = schema.histories[0].window.max_history
        self.cache = make_cache(tower, longest, num_users=1, page_size=sizes.page_size)

    def merged(self, chunk_rows: int) -> nn.Module:
        """The same ranking model over the same weights, its history pooled without sharing."""
        collection = self.model.collection
        merged = MergedEmbeddingBagCollection(collection, chunk_rows)
        return share_weights(self.ranker, collection, merged)

    def digests(self, request: Request) -> PrefixDigests:
        """The identity of the request's history."""
        events = request.events_by_history[HISTORY]
        identity = identity_of(UNNAMED, NO_CONTEXT, HISTORY, self.cache.pool.page_size)
        return PrefixDigests(events, self.schema, identity)

    @torch.no_grad()
    def put(self, request: Request) -> None:
        """Put the K/V of the request's history into the cache."""
        [planes] = self.model.prefill(collate_history([request], self.schema).sparse_features)
        [kv] = split_users(planes, self.model.num_rows([request.num_events]))
        entry = self.cache.put(request.user_id, self.digests(request).content, kv)
        assert entry is not None  # The cache was made for this history.
        self.cache.release(entry)

    @torch.no_grad()
    def uncached_merged(self, request: Request, merged: nn.Module) -> Tensor:
        """Logits [N], one whole sequence encoded per candidate."""
        batch = collate([request], self.schema)
        return merged(batch.dense_features, batch.sparse_features).squeeze(1)

    @torch.no_grad()
    def request_shared(self, request: Request) -> Tensor:
        """Logits [N], the history encoded once, for this request."""
        batch = collate([request], self.schema)
        return self.model(batch.dense_features, batch.sparse_features)

    @torch.no_grad()
    def cross_request_hit(self, request: Request, model: RankingFunctions | None = None) -> Tensor:
        """Logits [N] over K/V that the cache holds: what the engine does for a hit.

        Args:
            request: whose history's K/V was put.
            model: the same model in another runtime; None for the eager one.
        """
        digests = self.digests(request)
        entry = self.cache.lookup(request.user_id, digests).entry
        assert entry is not None
        batch = collate_candidates([request], self.schema)
        candidate_user = user_of_candidates([request])
        features = expand(batch.sparse_features, HISTORY, [entry.pages], candidate_user)
        model = model or self.model
        logits = model.score(batch.dense_features, features, [self.cache.pool.kv_pages])
        self.cache.release(entry)
        return logits

    def calls(self, request: Request, merged: nn.Module | None) -> dict[str, Score]:
        """The paths as calls without arguments; ``uncached_merged`` only with its model."""
        score_by_path: dict[str, Score] = {
            REQUEST_SHARED: lambda: self.request_shared(request),
            CROSS_REQUEST_HIT: lambda: self.cross_request_hit(request),
        }
        if merged is not None:
            score_by_path[UNCACHED_MERGED] = lambda: self.uncached_merged(request, merged)
        return score_by_path


def measure_queue_length(plan: Plan, sizes: Sizes) -> list[Record]:
    """Latency of one request against its number of candidates.

    Args:
        plan: what is measured.
        sizes: the model's sizes.

    Returns:
        Records of ``latency_ms``, ``requests_per_s``, ``speedup_vs_uncached``,
        ``speedup_vs_request_shared``, ``seed_model_speedup``, and per history ``fusion_cost_ratio``
        and the ``chunk_rows`` that ``uncached_merged`` was given. Long histories have nothing to
        compare with ``uncached_merged`` or the seed model.

    Raises:
        ParityError: if the logits of two paths differ.
    """
    records = []
    for history in (*plan.histories, *plan.long_histories):
        bench = _Bench(QUEUE_LENGTH, plan, sizes, history)
        shared_ms = []
        for request, score_by_path in bench.cases():
            latency_ms = interleaved_medians(score_by_path, plan.repeats)
            shared_ms.append(latency_ms[REQUEST_SHARED])
            records += bench.latency_records(request.num_candidates, latency_ms)
        if len(set(plan.candidates)) > 1:
            history_cost, candidate_cost = fusion_costs(plan.candidates, shared_ms)
            ratio = candidate_cost / history_cost
            records.append(bench.record(REQUEST_SHARED, "fusion_cost_ratio", ratio, "x"))
        records += bench.chunk_records()
    return records


def measure_memory(plan: Plan, sizes: Sizes) -> list[Record]:
    """Peak memory of scoring one request against its number of candidates.

    ``uncached_merged`` computes a chunk of candidates at a time, so its peak stops growing where a
    chunk is full; what it pays for that is time. ``repeated_kv_bytes`` is what copying one user's
    K/V to all candidates would add.

    Args:
        plan: what is measured; ``repeats`` is not used, the counts are exact.
        sizes: the model's sizes.

    Returns:
        Records of ``peak_bytes``, above what was allocated before; of ``kv_bytes_held``, the pages
        in the pool after the request; and of ``repeated_kv_bytes``.

    Raises:
        ParityError: if the logits of two paths differ.
    """
    records = []
    for history in (*plan.histories, *plan.long_histories):
        bench = _Bench(MEMORY, plan, sizes, history)
        [tower] = bench.paths.model.collection.towers()
        user_kv_bytes = 4 * prod(tower.kv_shape) * tower.encoder.num_rows(history)
        for request, score_by_path in bench.cases():
            queue = request.num_candidates
            for path, score in score_by_path.items():
                peak_bytes = peak_allocated_bytes(score)
                records.append(bench.record(path, "peak_bytes", peak_bytes, "bytes", queue))
            held_bytes = bench.paths.cache.held_bytes
            repeated_bytes = (queue - 1) * user_kv_bytes
            records += [
                bench.record(CROSS_REQUEST_HIT, "kv_bytes_held", held_bytes, "bytes", queue),
                bench.record(REPEATED_KV, "repeated_kv_bytes", repeated_bytes, "bytes", queue),
            ]
        records += bench.chunk_records()
    return records


def assert_parity(logits_by_path: Mapping[str, Tensor]) -> None:
    """Check that all paths give the logits of ``request_shared``.

    Args:
        logits_by_path: [N] each.

    Raises:
        ParityError: naming the path and by how much it differs.
    """
    for path, logits in logits_by_path.items():
        difference = float((logits - logits_by_path[REQUEST_SHARED]).abs().max())
        if not difference <= LOGIT_TOLERANCE:
            raise ParityError(
                f"{path} logits differ by {difference} from {REQUEST_SHARED}; at most "
                f"{LOGIT_TOLERANCE} is allowed"
            )


class _Bench:
    """One history length of one scenario: its model, its requests and its records."""

    def __init__(self, scenario: str, plan: Plan, sizes: Sizes, history: int) -> None:
        self.scenario = scenario
        self.sizes = sizes
        self.history = history
        schema = make_schema(history, num_users=1)
        self.paths = Paths(schema, make_dlrm(schema, sizes, plan.seed), sizes)
        self.requests = draw_requests(schema, plan.candidates, user=0, seed=plan.seed)
        self.paths.put(self.requests[0])
        self.merged_max_candidates = plan.merged_max_candidates
        self.chunk_rows: int | None = None
        if history in plan.histories:
            trial = min(max(plan.candidates), CHUNK_TRIAL_CANDIDATES)
            [request] = draw_requests(schema, [trial], user=0, seed=plan.seed)
            self.chunk_rows = fastest_chunk_rows(self.paths, request, plan.merged_chunk_rows)

    def cases(self) -> Iterator[tuple[Request, dict[str, Score]]]:
        """Each request and the paths that score it, called once and found to agree."""
        merged = None if self.chunk_rows is None else self.paths.merged(self.chunk_rows)
        for request in self.requests:
            short_enough = request.num_candidates <= self.merged_max_candidates
            score_by_path = self.paths.calls(request, merged if short_enough else None)
            assert_parity({path: score() for path, score in score_by_path.items()})
            yield request, score_by_path

    def latency_records(self, queue: int, latency_ms: dict[str, float]) -> list[Record]:
        records = []
        for path, value in latency_ms.items():
            records.append(self.record(path, "latency_ms", value, "ms", queue))
            records.append(self.record(path, "requests_per_s", 1e3 / value, "1/s", queue))
            if path != UNCACHED_MERGED and UNCACHED_MERGED in latency_ms:
                speedup = latency_ms[UNCACHED_MERGED] / value
                records.append(self.record(path, "speedup_vs_uncached", speedup, "x", queue))
        over_shared = latency_ms[REQUEST_SHARED] / latency_ms[CROSS_REQUEST_HIT]
        records.append(
            self.record(CROSS_REQUEST_HIT, "speedup_vs_request_shared", over_shared, "x", queue)
        )
        if self.chunk_rows is not None:
            speedup = seed_model_speedup(queue)
            records.append(self.record(SEED_MODEL, "seed_model_speedup", speedup, "x", queue))
        return records

    def chunk_records(self) -> list[Record]:
        if self.chunk_rows is None:
            return []
        return [self.record(UNCACHED_MERGED, "chunk_rows", self.chunk_rows, "rows")]

    def record(
        self, path: str, metric: str, value: float, unit: str, queue: int | None = None
    ) -> Record:
        case: Case = self.sizes.case(CAUSAL) | {
            "path": path,
            "history": self.history,
            "users": 1,
        }
        if queue is not None:
            case["candidates"] = queue
        return Record(self.scenario, case, metric, value, unit)


def fastest_chunk_rows(paths: Paths, request: Request, choices: Sequence[int]) -> int:
    """The chunk that gives ``uncached_merged`` its best time.

    Args:
        paths: the model.
        request: what is scored in the trial.
        choices: rows of a chunk.

    Returns:
        One of the choices.
    """
    score_by_rows = {
        str(rows): partial(paths.uncached_merged, request, paths.merged(rows)) for rows in choices
    }
    for score in score_by_rows.values():
        score()
    latency_ms = interleaved_medians(score_by_rows, repeats=3)
    return int(min(latency_ms, key=lambda rows: latency_ms[rows]))
