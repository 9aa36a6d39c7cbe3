"""Proof, before an artifact is kept, that its scores are the model's: cached and uncached alike.

Requests are drawn from the schema alone, so that no data set is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features.batches import (
    collate,
    collate_candidates,
    collate_history,
    user_of_candidates,
)
from torchrec_kvshare.features.draw import draw_ragged_requests
from torchrec_kvshare.features.request import Request, distinct_histories
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingFunctions
from torchrec_kvshare.scoring.engine import Engine, expand

# float32 against the float64 reference: the worst of 800 drawn batches was 1.1e-6.
LOGIT_TOLERANCE = 2e-5
PARITY_PAGE_SIZE = 4


def score_through_pages(
    model: RankingFunctions, requests: list[Request], schema: FeatureSchema
) -> Tensor:
    """Logits [C] of requests whose K/V went into pages, as the engine does it."""
    firsts, _ = distinct_histories(requests)
    kv_by_history = model.prefill(collate_history(requests, schema).sparse_features)
    rows = [model.num_rows(requests[first].num_events_by_history) for first in firsts]
    kv_by_user = split_histories(kv_by_history, rows)
    batch = collate_candidates(requests, schema)
    features = batch.sparse_features
    tables = []
    for history, parts in zip(schema.histories, zip(*kv_by_user, strict=True), strict=True):
        table, pages = write_pages(parts)
        features = expand(features, history.name, pages, user_of_candidates(requests))
        tables.append(table)
    return model.score(batch.dense_features, features, tables)


def score_extended(
    model: RankingFunctions, requests: Sequence[Request], schema: FeatureSchema
) -> Tensor:
    """Logits [C] of requests of which the engine had cached half of each history before."""
    halves = [
        replace(
            request,
            events_by_history={
                name: events.part(0, events.num_events // 2)
                for name, events in request.events_by_history.items()
            },
        )
        for request in requests
    ]
    num_pages = sum(request.num_events + 1 for request in requests)  # a page each is plenty
    caches = []
    for kv in model.prefill(collate_history(requests, schema).sparse_features):
        shape = (kv.size(0), kv.size(2), kv.size(3))
        page_bytes = math.prod(shape) * PARITY_PAGE_SIZE * kv.element_size()
        caches.append(KVCache(PagePool(num_pages * page_bytes, PARITY_PAGE_SIZE, *shape)))
    engine = Engine(model, schema, KVStore(caches), version=UNNAMED)
    engine.rank(halves)
    answers = engine.rank(requests)
    return torch.tensor(
        [score for answer in answers for score in answer.scores], dtype=torch.float64
    ).logit()


def write_pages(parts: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
    """A table of small pages that holds some histories' K/V, and the pages of each."""
    num_planes, _, num_heads, head_dim = parts[0].shape
    num_pages = sum(-(-part.size(1) // PARITY_PAGE_SIZE) for part in parts)
    page_bytes = num_planes * PARITY_PAGE_SIZE * num_heads * head_dim * 4
    pool = PagePool(
        max(num_pages, 1) * page_bytes, PARITY_PAGE_SIZE, num_planes, num_heads, head_dim
    )
    pages_by_user = []
    for part in parts:
        pages = pool.allocate(pool.pages_for(part.size(1)))
        assert pages is not None
        pool.write(pages, part)
        pages_by_user.append(pages)
    return pool.kv_pages, pages_by_user


@torch.no_grad()
def check_parity(
    exported: RankingFunctions,
    eager: RankingFunctions,
    schema: FeatureSchema,
    extends: bool,
    tolerance: float,
    seed: int = 0,
) -> dict[str, float]:
    """Compare an exported model with the eager one, and its own paths with each other.

    Args:
        exported: the model as a fresh load of the artifact gives it.
        eager: the model that was exported, in eval mode.
        schema: its columns.
        extends: whether its K/V may be extended, so that this is compared too.
        tolerance: of the exported logits against the eager ones; the others have
            ``LOGIT_TOLERANCE``.
        seed: of the requests drawn.

    Returns:
        The greatest absolute differences of logits, by what was compared.

    Raises:
        ParityError: naming what differs by more than is allowed.
    """
    requests = draw_ragged_requests(schema, seed)
    batch = collate(requests, schema)
    uncached = exported(batch.dense_features, batch.sparse_features)
    one_by_one = torch.cat([_alone(exported, request, schema) for request in requests])
    differences = {
        "exported_eager": uncached - eager(batch.dense_features, batch.sparse_features),
        "cached_uncached": score_through_pages(exported, requests, schema) - uncached,
        "one_by_one_together": one_by_one - uncached,
    }
    if extends:
        differences["extended_uncached"] = score_extended(exported, requests, schema) - uncached
    greatest = {name: float(diff.abs().max()) for name, diff in differences.items()}
    for name, value in greatest.items():
        allowed = tolerance if name == "exported_eager" else LOGIT_TOLERANCE
        if not value <= allowed:
            raise ParityError(f"{name} logits differ by {value}; at most {allowed} is allowed")
    return greatest


def _alone(model: RankingFunctions, request: Request, schema: FeatureSchema) -> Tensor:
    batch = collate([request], schema)
    return model(batch.dense_features, batch.sparse_features)
