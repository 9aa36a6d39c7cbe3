"""Proof that an exported model scores as the eager one, cached, uncached and one by one.

It runs before an artifact is kept. Requests are drawn from the schema alone, so that no data set
is needed.
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
from torchrec_kvshare.features.batches import RequestBatch, collate, collate_history
from torchrec_kvshare.features.draw import draw_ragged_requests
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingFunctions
from torchrec_kvshare.scoring.engine import Answer, Engine, score_pages

# float32 against the float64 reference; worst of 800 drawn batches: 1.1e-6.
LOGIT_TOLERANCE = 2e-5
PARITY_PAGE_SIZE = 4


def score_through_pages(
    model: RankingFunctions, requests: list[Request], schema: FeatureSchema
) -> Tensor:
    """Return logits [C, tasks] of requests whose K/V went through pages, as in the engine."""
    batch = RequestBatch(requests)
    kv_by_history = model.prefill(collate_history(batch, schema).sparse_features)
    rows = [model.num_kv_rows(user.num_events_by_history) for user in batch.users]
    kv_by_user = split_histories(kv_by_history, rows)
    written = [_write_pages(parts) for parts in zip(*kv_by_user, strict=True)]
    tables, pages_by_history = zip(*written, strict=True)
    return score_pages(model, batch, schema, pages_by_history, tables)


def score_extended(
    model: RankingFunctions, requests: Sequence[Request], schema: FeatureSchema
) -> Tensor:
    """Return logits [C, tasks] of requests scored after the engine cached half of each history."""
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
    num_pages = sum(request.num_events + 1 for request in requests)  # one page per event: plenty
    caches = []
    for kv in model.prefill(collate_history(requests, schema).sparse_features):
        shape = (kv.size(0), kv.size(2), kv.size(3))
        page_bytes = math.prod(shape) * PARITY_PAGE_SIZE * kv.element_size()
        caches.append(KVCache(PagePool(num_pages * page_bytes, PARITY_PAGE_SIZE, *shape)))
    engine = Engine(model, schema, KVStore(caches), version=UNNAMED)
    engine.rank(halves)
    return probabilities_of(engine.rank(requests)).logit()


def probabilities_of(answers: Sequence[Answer]) -> Tensor:
    """Return the scores of answers as [C, tasks] float64."""
    rows = [
        torch.tensor([*answer.scores_by_task.values()], dtype=torch.float64).T for answer in answers
    ]
    return torch.cat(rows)


def _write_pages(parts: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
    """Write histories' K/V into small pages; return the page table and the pages of each user."""
    num_planes, _, num_heads, head_dim = parts[0].shape
    num_pages = sum(-(-part.size(1) // PARITY_PAGE_SIZE) for part in parts)
    page_bytes = num_planes * PARITY_PAGE_SIZE * num_heads * head_dim * 4
    pool = PagePool(
        capacity_bytes=max(num_pages, 1) * page_bytes,
        page_size=PARITY_PAGE_SIZE,
        num_planes=num_planes,
        num_heads=num_heads,
        head_dim=head_dim,
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
    *,
    extends: bool,
    tolerance: float,
    seed: int = 0,
) -> dict[str, float]:
    """Compare an exported model with the eager one, and its own paths with each other.

    Args:
        exported: the model, freshly loaded from the artifact.
        eager: the model that was exported, in eval mode.
        schema: columns of the model.
        extends: whether cached K/V may be extended, so that this path is compared too.
        tolerance: allowed difference of exported and eager logits; for the other comparisons it is
            ``LOGIT_TOLERANCE``.
        seed: seed of the drawn requests.

    Returns:
        The greatest absolute difference of logits, by comparison.

    Raises:
        ParityError: naming the comparison that differs by more than is allowed.
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
