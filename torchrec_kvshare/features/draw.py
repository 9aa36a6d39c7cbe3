"""Random requests drawn from a schema alone, to try a model without a data set.

Ids are known, unknown or missing; bags are ragged.
"""

from typing import Any

import numpy as np

from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    ITEM,
    TIME,
    USER,
    FeatureSchema,
    context_key,
    event_key,
    item_key,
)

SHORT = 4  # events


def draw_raw_request(
    schema: FeatureSchema, num_events: int, num_candidates: int, seed: int
) -> dict[str, Any]:
    """Draw a raw request with random known, unknown and missing ids.

    Args:
        schema: the columns to fill.
        num_events: length of the history.
        num_candidates: number of candidates.
        seed: the same seed gives the same request.

    Returns:
        A raw request, as a client sends it.
    """
    rng = np.random.default_rng(seed)

    def ids(key: str, count: int) -> list[Any]:
        known = schema.vocabulary_by_column[key].examples
        drawn = rng.integers(-1, len(known), count)
        return [known[index] if index >= 0 else "never seen before" for index in drawn]

    def bags(key: str, count: int) -> list[list[Any]]:
        return [ids(key, int(length)) for length in rng.integers(0, 3, count)]

    now = int(rng.integers(1_000_000_000, 1_700_000_000))
    history = {TIME: np.sort(now - rng.integers(1, 10_000_000, num_events)).tolist()}
    history[ITEM] = ids(ITEM, num_events)
    for column in schema.event_attributes:
        history[column] = ids(event_key(column), num_events)
    candidates: dict[str, Any] = {ITEM: ids(ITEM, num_candidates)}
    for column in schema.item_attributes:
        history[column] = bags(item_key(column), num_events)
        candidates[column] = bags(item_key(column), num_candidates)
    for column in schema.item_floats:
        candidates[column] = rng.normal(0, 10, num_candidates).tolist()
    user = ids(USER, 1)[0]
    context: dict[str, Any] = {column: ids(context_key(column), 1) for column in schema.context}
    context |= {column: float(rng.normal(0, 10)) for column in schema.context_floats}
    for column in schema.event_floats:
        history[column] = rng.normal(0, 10, num_events).tolist()
    return {
        "request_id": f"drawn-{seed}",
        USER: user,
        TIME: now,
        "context": context,
        "history": history,
        "candidates": candidates,
    }


def draw_ragged_raws(schema: FeatureSchema, seed: int) -> list[dict[str, Any]]:
    """Draw raw requests with empty, short and cut histories and different numbers of candidates."""
    longest = max(history.window.max_history for history in schema.histories)
    sizes = [(0, 3), (1, 1), (SHORT, 5), (longest // 2, 2), (longest + 3, 7)]
    return [
        draw_raw_request(schema, num_events, num_candidates, seed + index)
        for index, (num_events, num_candidates) in enumerate(sizes)
    ]


def draw_ragged_requests(schema: FeatureSchema, seed: int) -> list[Request]:
    """Return the requests of ``draw_ragged_raws``, parsed."""
    return [parse_request(raw, schema) for raw in draw_ragged_raws(schema, seed)]
