"""Proof, before an artifact is kept, that its scores are the model's: cached and uncached alike.

Requests are drawn from the schema alone, ragged and with unknown ids, so that no data set is
needed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.data.schema import ACTION, ITEM, TIME, USER, FeatureSchema
from torchrec_kvshare.engine import RankingFunctions, expand
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features import (
    Request,
    collate,
    collate_candidates,
    collate_history,
    parse_request,
    user_of_candidates,
)

# float32 against the float64 reference: the worst of 800 drawn batches was 1.1e-6.
LOGIT_TOLERANCE = 2e-5
PARITY_PAGE_SIZE = 4


def draw_raw_request(
    schema: FeatureSchema, num_events: int, num_candidates: int, seed: int
) -> dict[str, Any]:
    """A request of the project's format with random known, unknown and missing ids.

    Args:
        schema: the columns to fill.
        num_events: length of the history.
        num_candidates: candidates to score.
        seed: same seed, same request.

    Returns:
        A raw request, as a client would send it.
    """
    rng = np.random.default_rng(seed)

    def ids(column: str, count: int) -> list[Any]:
        known = schema.vocabulary_by_column[column].ids
        drawn = rng.integers(-1, len(known), count)
        return [known[place] if place >= 0 else "never seen before" for place in drawn]

    def bags(column: str, count: int) -> list[list[Any]]:
        return [ids(column, int(length)) for length in rng.integers(0, 3, count)]

    now = int(rng.integers(1_000_000_000, 1_700_000_000))
    history = {TIME: np.sort(now - rng.integers(0, 10_000_000, num_events)).tolist()}
    history[ITEM] = ids(ITEM, num_events)
    if schema.has_action:
        history[ACTION] = ids(ACTION, num_events)
    candidates: dict[str, Any] = {ITEM: ids(ITEM, num_candidates)}
    for column in schema.item_attributes:
        history[column] = bags(column, num_events)
        candidates[column] = bags(column, num_candidates)
    for column in schema.item_floats:
        candidates[column] = rng.normal(0, 10, num_candidates).tolist()
    return {
        "request_id": f"drawn-{seed}",
        USER: ids(USER, 1)[0],
        TIME: now,
        "context": {column: ids(column, 1) for column in schema.context},
        "history": history,
        "candidates": candidates,
    }


def draw_ragged_requests(schema: FeatureSchema, seed: int) -> list[Request]:
    """Requests with empty, short, page-long and cut histories and unequal candidates."""
    longest = schema.window.max_history
    sizes = [(0, 3), (1, 1), (PARITY_PAGE_SIZE, 5), (longest // 2, 2), (longest + 3, 7)]
    return [
        parse_request(draw_raw_request(schema, num_events, num_candidates, seed + place), schema)
        for place, (num_events, num_candidates) in enumerate(sizes)
    ]


def score_through_pages(
    model: RankingFunctions, requests: list[Request], schema: FeatureSchema
) -> Tensor:
    """Logits [C] of requests whose K/V went into pages, as the engine does it."""
    kv = model.prefill(collate_history(requests, schema).sparse_features)
    num_layers, _, _, num_heads, head_dim = kv.shape
    num_pages = sum(-(-request.num_events // PARITY_PAGE_SIZE) for request in requests)
    page_bytes = num_layers * 2 * PARITY_PAGE_SIZE * num_heads * head_dim * 4
    pool = PagePool(
        max(num_pages, 1) * page_bytes, PARITY_PAGE_SIZE, num_layers, num_heads, head_dim
    )
    pages_by_user = []
    for request, part in zip(
        requests, kv.split([request.num_events for request in requests], dim=2), strict=True
    ):
        pages = pool.allocate(pool.pages_for(request.num_events))
        assert pages is not None
        pool.write(pages, part)
        pages_by_user.append(pages)
    batch = collate_candidates(requests, schema)
    features = expand(batch.sparse_features, pages_by_user, user_of_candidates(requests))
    return model.score(batch.dense_features, features, pool.kv_pages)


@torch.no_grad()
def check_parity(
    exported: RankingFunctions, eager: RankingFunctions, schema: FeatureSchema, seed: int = 0
) -> dict[str, float]:
    """Compare an exported model with the eager one, and its own paths with each other.

    Args:
        exported: the model as a fresh load of the artifact gives it.
        eager: the model that was exported, in eval mode.
        schema: its columns.
        seed: of the requests drawn.

    Returns:
        The greatest absolute differences of logits, by what was compared.

    Raises:
        ParityError: if the exported model is not bit-equal to the eager one, or if its cached or
            one-by-one logits differ from its uncached ones by more than ``LOGIT_TOLERANCE``.
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
    greatest = {name: float(diff.abs().max()) for name, diff in differences.items()}
    for name, value in greatest.items():
        allowed = 0.0 if name == "exported_eager" else LOGIT_TOLERANCE
        if not value <= allowed:
            raise ParityError(f"{name} logits differ by {value}; at most {allowed} is allowed")
    return greatest


def _alone(model: RankingFunctions, request: Request, schema: FeatureSchema) -> Tensor:
    batch = collate([request], schema)
    return model(batch.dense_features, batch.sparse_features)
