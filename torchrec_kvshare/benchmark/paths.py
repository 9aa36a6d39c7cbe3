"""The paths that score one request: history encoded per candidate, per request, or from the cache.

``uncached_merged`` encodes the history once per candidate, ``request_shared`` once per request, and
``cross_request_hit`` finds its K/V in the cache. All paths start from a parsed request and end with
logits; each collates its own batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from torchrec_kvshare.benchmark.baselines.merged import merged_ranker
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import draw_requests, make_cache
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features.batches import collate, collate_history
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema
from torchrec_kvshare.history.pages import split_users
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.scoring.engine import score_pages
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

UNCACHED_MERGED = "uncached_merged"
REQUEST_SHARED = "request_shared"
CROSS_REQUEST_HIT = "cross_request_hit"

TRIAL_CANDIDATES = 50  # at 1000 events they fill the largest default chunk
TRIAL_REPEATS = 3

Score = Callable[[], Tensor]


class Paths:
    """Three ways to score the candidates of one user with one model.

    Args:
        schema: the columns; its window has the length of the history.
        ranker: a ranking model with one history; see ``workload.fill_zeros``.
        page_size: rows per page of K/V.
    """

    def __init__(self, schema: FeatureSchema, ranker: nn.Module, page_size: int) -> None:
        self.schema = schema
        self.ranker = ranker
        self.model = RankingModel(ranker).eval()
        [tower] = self.model.collection.towers()
        longest = schema.histories[0].window.max_history
        self.cache = make_cache(tower, longest, num_users=1, page_size=page_size)

    def merged(self, chunk_rows: int) -> nn.Module:
        """Return the model over the same weights, its history encoded once per candidate."""
        return merged_ranker(self.ranker, chunk_rows)

    def digests(self, request: Request) -> PrefixDigests:
        """Return the digests of the request's history."""
        events = request.events_by_history[HISTORY]
        identity = identity_of(UNNAMED, NO_CONTEXT, HISTORY, self.cache.pool.page_size)
        return PrefixDigests(events, self.schema, identity)

    @torch.no_grad()
    def put(self, request: Request) -> None:
        """Put the K/V of the request's history into the cache."""
        [planes] = self.model.prefill(collate_history([request], self.schema).sparse_features)
        [kv] = split_users(planes, self.model.num_kv_rows([request.num_events]))
        entry = self.cache.put(request.user_id, self.digests(request).content, kv)
        assert entry is not None  # The cache was made for this history.
        self.cache.release(entry)

    @torch.no_grad()
    def uncached_merged(self, request: Request, merged: nn.Module) -> Tensor:
        """Return logits [N, 1]; the history is encoded once per candidate."""
        batch = collate([request], self.schema)
        return merged(batch.dense_features, batch.sparse_features)

    @torch.no_grad()
    def request_shared(self, request: Request) -> Tensor:
        """Return logits [N, 1]; the history is encoded once for the request."""
        batch = collate([request], self.schema)
        return self.model(batch.dense_features, batch.sparse_features)

    @torch.no_grad()
    def cross_request_hit(self, request: Request, model: RankingFunctions | None = None) -> Tensor:
        """Return logits [N, 1] over K/V from the cache, as the engine does on a hit.

        Args:
            request: a request whose K/V is in the cache.
            model: the same model in another runtime; None for the eager one.
        """
        digests = self.digests(request)
        entry = self.cache.lookup(request.user_id, digests).entry
        assert entry is not None
        tables = [self.cache.pool.kv_pages]
        logits = score_pages(
            model or self.model,
            [request],
            self.schema,
            pages_by_history=[[entry.pages]],
            tables=tables,
        )
        self.cache.release(entry)
        return logits

    def calls(self, request: Request, merged: nn.Module | None) -> dict[str, Score]:
        """Return the paths as calls without arguments; ``uncached_merged`` needs its model."""
        score_by_path: dict[str, Score] = {
            REQUEST_SHARED: lambda: self.request_shared(request),
            CROSS_REQUEST_HIT: lambda: self.cross_request_hit(request),
        }
        if merged is not None:
            score_by_path[UNCACHED_MERGED] = lambda: self.uncached_merged(request, merged)
        return score_by_path


def assert_parity(logits_by_path: Mapping[str, Tensor]) -> None:
    """Check that all paths give the logits of ``request_shared``.

    Args:
        logits_by_path: [N, 1] each.

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


def fastest_chunk_rows(
    paths: Paths, candidates: Sequence[int], seed: int, choices: Sequence[int]
) -> int:
    """Return the chunk size that is fastest for ``uncached_merged``.

    Args:
        paths: the model; its window is the history that is scored.
        candidates: the queue lengths to be measured; the trial has at most ``TRIAL_CANDIDATES``.
        seed: of the request that is scored.
        choices: rows of a chunk.
    """
    trial = min(max(candidates), TRIAL_CANDIDATES)
    [request] = draw_requests(paths.schema, [trial], user=0, seed=seed)
    score_by_rows = {
        rows: partial(paths.uncached_merged, request, paths.merged(rows)) for rows in choices
    }
    for score in score_by_rows.values():
        score()
    latency_ms = interleaved_medians(score_by_rows, TRIAL_REPEATS)
    return min(latency_ms, key=lambda rows: latency_ms[rows])
