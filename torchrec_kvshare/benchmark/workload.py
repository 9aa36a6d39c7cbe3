"""What the benchmarks score: a model, requests and a warm cache, drawn from a seed at any size.

No data set is needed: what scoring costs depends on sizes, not on values.
"""

from collections.abc import Sequence
from math import prod
from typing import TypeVar

import torch
from torch import nn
from torchrec.models.dlrm import DLRM

from torchrec_kvshare.benchmark.plan import Sizes
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
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
    item_key,
)
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.ranking import dlrm_with_history

Ranker = TypeVar("Ranker", bound=nn.Module)

NUM_ITEMS = 10_000
NUM_CATEGORIES = 200
BYTES = 4  # of a float32
TIME_BIAS_STD = 0.5  # as wide as the scores of freshly drawn layers, so that the bias is felt


def make_schema(history: int, num_users: int, block: int | None = None) -> FeatureSchema:
    """Columns of a shop: items with categories, actions, a country, a price.

    Args:
        history: events that the model reads.
        num_users: users with a row of their own.
        block: events between two places where the window may start; None for the whole window.

    Returns:
        A schema whose window holds exactly ``history`` events.
    """
    ids_by_column = {USER: num_users, ITEM: NUM_ITEMS, ACTION: 4}
    ids_by_column |= {item_key("category"): NUM_CATEGORIES, context_key("country"): 50}
    return FeatureSchema(
        {c: Vocabulary([str(i) for i in range(count)]) for c, count in ids_by_column.items()},
        context=("country",),
        has_action=True,
        item_attributes=("category",),
        item_floats=("price",),
        histories=(History(HISTORY, Window(max_history=history, block=block or history)),),
    )


def make_dlrm(schema: FeatureSchema, sizes: Sizes, seed: int) -> DLRM:
    """A DLRM with history whose weights are drawn, none of them left at zero.

    Args:
        schema: its columns.
        sizes: its sizes.
        seed: same seed, same weights; the global generator is left as it was.

    Returns:
        The model in eval mode, without gradients.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fill_zeros(dlrm_with_history(schema, sizes.spec(), [sizes.dim, 1]))


def fill_zeros(ranker: Ranker) -> Ranker:
    """The model for measuring: what training starts at zero is drawn.

    A path that forgot such a parameter would not be caught otherwise.

    Args:
        ranker: a ranking model.

    Returns:
        It, in eval mode, without gradients.
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
    """Parsed requests of one user that differ in the number of candidates alone.

    Args:
        schema: the model's columns.
        queue_lengths: candidates of each request; a shorter queue is the start of a longer one.
        user: which of the schema's users asks.
        seed: same seed, same requests.
        history: events; None for as many as the window holds.

    Returns:
        One request for each queue length, all with one history.
    """
    num_events = schema.histories[0].window.max_history if history is None else history
    raw = draw_raw_request(schema, num_events, max(queue_lengths), seed)
    raw[USER] = user
    cut = [{c: values[:n] for c, values in raw["candidates"].items()} for n in queue_lengths]
    return [parse_request(raw | {"candidates": candidates}, schema) for candidates in cut]


def make_cache(tower: HistoryTower, history: int, num_users: int, page_size: int) -> KVCache:
    """An empty cache with room for some users' histories.

    Args:
        tower: whose K/V it holds.
        history: events of each user.
        num_users: users whose K/V it holds at once.
        page_size: rows per page.

    Returns:
        A cache over a pool of just so many pages.
    """
    pages_per_user = -(-tower.encoder.num_rows(history) // page_size)
    capacity_bytes = num_users * pages_per_user * page_size * prod(tower.kv_shape) * BYTES
    return KVCache(PagePool(capacity_bytes, page_size, *tower.kv_shape))
