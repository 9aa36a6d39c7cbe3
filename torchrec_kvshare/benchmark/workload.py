"""Draw what the benchmarks score: models, requests, users and caches of any size, from a seed.

No data set is needed: the cost of scoring depends on sizes, not on values.
"""

from collections.abc import Sequence
from math import prod
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torchrec.models.dlrm import DLRM

from torchrec_kvshare.benchmark.options import ModelSizes
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.data.dataset import Ints
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    ACTION,
    HISTORY,
    ITEM,
    USER,
    FeatureSchema,
    History,
    Vocabulary,
    Window,
    context_key,
    event_key,
    item_key,
)
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.ranking import dlrm_with_history

Ranker = TypeVar("Ranker", bound=nn.Module)

NUM_ITEMS = 10_000
NUM_CATEGORIES = 200
BYTES = 4  # of a float32
TIME_BIAS_STD = 0.5  # as wide as the scores of freshly drawn layers, so that the bias matters
ZIPF_EXPONENT = 1.1


def make_schema(history: int, num_users: int, block: int | None = None) -> FeatureSchema:
    """Return the columns of a shop: items with categories, actions, a country, a price.

    Args:
        history: events of the window.
        num_users: users with a row of their own.
        block: events from one possible start of the window to the next; None for ``history``.
    """
    ids_by_column = {USER: num_users, ITEM: NUM_ITEMS, event_key(ACTION): 4}
    ids_by_column |= {item_key("category"): NUM_CATEGORIES, context_key("country"): 50}
    return FeatureSchema(
        {c: Vocabulary([str(i) for i in range(count)]) for c, count in ids_by_column.items()},
        context=("country",),
        event_attributes=(ACTION,),
        item_attributes=("category",),
        item_floats=("price",),
        histories=(History(HISTORY, Window(max_history=history, block=block or history)),),
    )


def make_dlrm(schema: FeatureSchema, sizes: ModelSizes, seed: int, encoder: str = CAUSAL) -> DLRM:
    """Draw a DLRM with history; see ``fill_zeros``.

    Args:
        schema: the columns; the model's one history has its window.
        sizes: the sizes.
        seed: same seed, same weights; the global generator is left as it was.
        encoder: kind of history encoder.

    Returns:
        The model in eval mode, without gradients.
    """
    spec = sizes.spec(encoder, schema.histories[0].window.max_history)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fill_zeros(dlrm_with_history(schema, spec, [sizes.dim, 1]))


def fill_zeros(ranker: Ranker) -> Ranker:
    """Draw the parameters that training starts at zero, so that a path that ignores them is found.

    Args:
        ranker: a ranking model; it is changed.

    Returns:
        The same model, in eval mode, without gradients.
    """
    for name, parameter in ranker.named_parameters():
        if name.endswith("candidate_token"):
            nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
        if name.endswith(("time_bias", "position_bias")):
            nn.init.normal_(parameter, std=TIME_BIAS_STD)
    return ranker.eval().requires_grad_(False)


def draw_requests(
    schema: FeatureSchema,
    queue_lengths: Sequence[int],
    user: int,
    seed: int,
    history: int | None = None,
) -> list[Request]:
    """Draw requests of one user that differ in the number of candidates only.

    Args:
        schema: the model's columns.
        queue_lengths: candidates of each request; a shorter queue is the start of a longer one.
        user: id of the user, a number below the schema's number of users.
        seed: same seed, same requests.
        history: events; None for a full window.

    Returns:
        One request for each queue length, all with the same history.
    """
    num_events = schema.histories[0].window.max_history if history is None else history
    raw = draw_raw_request(schema, num_events, max(queue_lengths), seed)
    raw[USER] = user
    cut = [{c: values[:n] for c, values in raw["candidates"].items()} for n in queue_lengths]
    return [parse_request(raw | {"candidates": candidates}, schema) for candidates in cut]


def draw_users(rng: np.random.Generator, num_users: int, num_draws: int) -> Ints:
    """Draw users by Zipf's law, the first user most often: [num_draws], numbers from 0."""
    weights = np.arange(1, num_users + 1) ** -ZIPF_EXPONENT
    return rng.choice(num_users, num_draws, p=weights / weights.sum())


def make_cache(tower: HistoryTower, history: int, num_users: int, page_size: int) -> KVCache:
    """Return an empty cache with exactly enough pages for some users.

    Args:
        tower: the tower that makes the K/V.
        history: events of each user.
        num_users: users whose K/V fits at once.
        page_size: rows per page.
    """
    pages_per_user = -(-tower.encoder.num_kv_rows(history) // page_size)
    capacity_bytes = num_users * pages_per_user * page_size * prod(tower.kv_shape) * BYTES
    return KVCache(PagePool(capacity_bytes, page_size, *tower.kv_shape))
