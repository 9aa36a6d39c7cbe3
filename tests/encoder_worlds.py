"""A small world for each kind of history encoder, anchored and sliding, of one token and of three.

Candidates have two attributes here, so that three tokens differ from both one and two.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.models.dlrm import DLRM

from tests.worlds import BLOCK, MAX_HISTORY, SCHEMA, draw_raw, make_dlrm, random_weights
from torchrec_kvshare.attention.operators import Sights
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema, History, Vocabulary, Window
from torchrec_kvshare.history.kinds import (
    BIDIRECTIONAL,
    KIND_BY_NAME,
    KINDS,
    LONGER,
    TowerSpec,
)
from torchrec_kvshare.history.pages import flat_pages
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.ranking import RankingModel

WIDTH, HEADS = 10, 2
NUM_TOKENS = 3  # the item, its genres, its brands
SLIDING = " sliding"
SEEN_BACK = 4  # events, by every layer of a sliding window
ANCHORED_WINDOW = Window(MAX_HISTORY, BLOCK)
# What two sliding layers see together is 7 events; 5 more let the window start at a block.
SLIDING_WINDOW = Window(12, 6)
LONGER_WINDOW = Window(24, 6)
MERGE, RECENT, GLOBALS = 3, 12, 2  # of longer, whose deepest layers see 4 groups at most

NAMES = (*KINDS, *(name + SLIDING for name, kind in KIND_BY_NAME.items() if kind.slides))
# Those whose candidates may see prefixes of one prefill.
PREFIX_NAMES = tuple(name for name in NAMES if name not in (BIDIRECTIONAL, LONGER))
EXTENDED_NAMES = tuple(name for name in NAMES if name != BIDIRECTIONAL)
SLIDING_NAMES = tuple(name for name in NAMES if name.endswith(SLIDING))

# Two float64 paths to the same rows, of which the greatest is 6: worst of 2000 draws 5.4e-15.
EXACT_TOLERANCE = 1e-12


HISTORIES = (
    History("seen", LONGER_WINDOW),
    History("bought", SLIDING_WINDOW, ("buy",)),
)
TWO_HISTORIES = replace(SCHEMA, histories=HISTORIES)
PAGE_SIZE = 5


class World(NamedTuple):
    """What a model reads, what its towers are, and a model of it."""

    schema: FeatureSchema
    spec: TowerSpec
    dlrm: DLRM


@lru_cache
def world_of(name: str, num_tokens: int = NUM_TOKENS) -> World:
    """The world of a kind by name; tests read its model and never change it."""
    kind = name.removesuffix(SLIDING)
    window = {LONGER: LONGER_WINDOW}.get(kind, ANCHORED_WINDOW)
    if name.endswith(SLIDING):
        window = SLIDING_WINDOW
    spec = TowerSpec(
        kind,
        WIDTH,
        # A third layer of longer attends from rows that were queries before.
        3 if kind == LONGER else 2,
        HEADS,
        dropout=0.1,
        num_tokens=num_tokens,
        window=SEEN_BACK if name.endswith(SLIDING) else 0,
        merge=MERGE,
        recent=RECENT,
        num_globals=GLOBALS,
    )
    schema = schema_with(window)
    return World(schema, spec, make_dlrm(3, schema, spec))


def schema_with(window: Window) -> FeatureSchema:
    """The usual schema with one attribute more and another window."""
    brands = Vocabulary([f"brand {place}" for place in range(6)])
    return replace(
        SCHEMA,
        vocabulary_by_column=SCHEMA.vocabulary_by_column | {"items.brands": brands},
        item_attributes=("genres", "brands"),
        histories=(History(HISTORY, window),),
    )


@lru_cache
def two_histories_model(kind: str) -> DLRM:
    """A model of two histories; tests read it and never change it."""
    num_layers = 3 if kind == LONGER else 2
    spec = TowerSpec(kind, WIDTH, num_layers, HEADS, 0.1, 1, 0, MERGE, RECENT, GLOBALS)
    return make_dlrm(4, TWO_HISTORIES, spec)


def draw_buyer(user: str, num_events: int, num_candidates: int, seed: int) -> dict[str, Any]:
    """A raw request about half of whose events are buys."""
    raw = draw_raw(num_events, num_candidates, seed) | {"user_id": user}
    bought = np.random.default_rng([seed, 2]).random(num_events) < 0.5
    actions = raw["history"]["action"]
    raw["history"]["action"] = [
        "buy" if buys else action for buys, action in zip(bought, actions, strict=True)
    ]
    return raw


def make_caches(model: RankingModel, num_pages: Sequence[int]) -> list[KVCache]:
    """A cache of so many pages for each history; what was never written is NaN."""
    caches = []
    for pages, tower in zip(num_pages, model.collection.towers(), strict=True):
        num_planes, num_heads, head_dim = tower.kv_shape
        page_bytes = num_planes * PAGE_SIZE * num_heads * head_dim * 4
        pool = PagePool(pages * page_bytes, PAGE_SIZE, num_planes, num_heads, head_dim)
        pool.kv_pages.fill_(torch.nan)
        caches.append(KVCache(pool))
    return caches


def raws_of(world: World, users: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """One raw request for each drawn user."""
    return [draw_raw(*sizes, world.schema) for sizes in users]


def cut(raw: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The request with some of its events only."""
    return raw | {"history": {name: cells[first:last] for name, cells in raw["history"].items()}}


def make_tower(name: str, dtype: torch.dtype, seed: int = 5) -> HistoryTower:
    """A tower of a world's kind on its own, in eval mode."""
    world = world_of(name)
    window = world.schema.histories[0].window
    tower = HistoryTower(world.spec, window.max_history, window.block)
    random_weights(tower, seed)
    return tower.to(dtype).eval()


def draw_rows(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Tokens as a model might have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def attend_whole(
    tower: HistoryTower, candidates: Tensor, kv: Tensor, num_events: int, newest: int = 0
) -> Tensor:
    """Candidates of one user over all of its K/V; event i from the newest is 9 ** i seconds old."""
    rows, entered = tower.enter(candidates)
    elapsed = newest + 9 ** torch.arange(num_events - 1, -1, -1).clamp(max=18)
    now = 10**18
    every = torch.full([len(candidates)], now)
    sights = Sights(now - elapsed, every, torch.full_like(every, num_events))
    event_offsets = one_user(num_events)
    pages = flat_pages(kv, tower.encoder.row_offsets(event_offsets))
    return tower.attend(rows, entered, one_user(len(candidates)), pages, sights, event_offsets)


def one_user(num_rows: int) -> Tensor:
    """Offsets of the rows of one user."""
    return torch.tensor([0, num_rows])
