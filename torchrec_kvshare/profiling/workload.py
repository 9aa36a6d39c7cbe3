"""What the benchmarks score: a model, requests and a warm cache, drawn from a seed at any size.

No data set is needed: what scoring costs depends on sizes, not on values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.models.dlrm import DLRM

from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.data.schema import ITEM, USER, FeatureSchema, Vocabulary, Window
from torchrec_kvshare.export.parity import draw_raw_request
from torchrec_kvshare.features import Request, parse_request
from torchrec_kvshare.ranking import dlrm_with_history

NUM_ITEMS = 10_000
NUM_CATEGORIES = 200
TIME_BIAS_STD = 0.5  # as wide as the scores of freshly drawn layers, so that the bias is felt


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that is measured.

    Attributes:
        dim: width E of tables and tower.
        num_layers: layers of the tower.
        num_heads: heads of each layer.
        page_size: events per page of K/V.
    """

    dim: int
    num_layers: int
    num_heads: int
    page_size: int


def make_schema(history: int, num_users: int) -> FeatureSchema:
    """Columns of a shop: items with categories, actions, a country, a price.

    Args:
        history: events that the model reads.
        num_users: users with a row of their own.

    Returns:
        A schema whose window holds exactly ``history`` events.
    """
    ids_by_column = {USER: num_users, ITEM: NUM_ITEMS, "category": NUM_CATEGORIES, "action": 4}
    ids_by_column["country"] = 50
    return FeatureSchema(
        {c: Vocabulary([str(i) for i in range(count)]) for c, count in ids_by_column.items()},
        context=("country",),
        has_action=True,
        item_attributes=("category",),
        item_floats=("price",),
        window=Window(max_history=history, block=history),
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
        dlrm = dlrm_with_history(
            schema, sizes.dim, sizes.num_layers, sizes.num_heads, 0.0, [sizes.dim, 1]
        )
        # Zero at the start of training, where a path that forgot them would not be caught.
        for name, parameter in dlrm.named_parameters():
            if name.endswith("candidate_token"):
                nn.init.normal_(parameter, std=sizes.dim**-0.5)
            if name.endswith("time_bias"):
                nn.init.normal_(parameter, std=TIME_BIAS_STD)
    return dlrm.eval().requires_grad_(False)


def draw_requests(
    schema: FeatureSchema, queue_lengths: Sequence[int], user: int, seed: int
) -> list[Request]:
    """Parsed requests of one user that differ in the number of candidates alone.

    Args:
        schema: the model's columns.
        queue_lengths: candidates of each request; a shorter queue is the start of a longer one.
        user: which of the schema's users asks.
        seed: same seed, same requests.

    Returns:
        One request for each queue length, all with one history, as long as the window.
    """
    raw = draw_raw_request(schema, schema.window.max_history, max(queue_lengths), seed)
    raw[USER] = user
    cut = [{c: values[:n] for c, values in raw["candidates"].items()} for n in queue_lengths]
    return [parse_request(raw | {"candidates": candidates}, schema) for candidates in cut]


def make_cache(history: int, num_users: int, sizes: Sizes) -> KVCache:
    """An empty cache with room for some users' histories.

    Args:
        history: events of each user.
        num_users: users whose K/V it holds at once.
        sizes: the model's sizes.

    Returns:
        A cache over a pool of just so many pages.
    """
    pages_per_user = -(-history // sizes.page_size)
    head_dim = sizes.dim // sizes.num_heads
    page_bytes = sizes.num_layers * 2 * sizes.page_size * sizes.num_heads * head_dim * 4
    capacity_bytes = num_users * pages_per_user * page_bytes
    pool = PagePool(capacity_bytes, sizes.page_size, sizes.num_layers, sizes.num_heads, head_dim)
    return KVCache(pool)
