"""A small world for each kind of history encoder, anchored and sliding, with one token or three.

Candidates have two attributes here, so that three tokens differ from both one and two. Tables,
towers and the ranking stage have widths of their own, and models predict two tasks.
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
from torchrec_kvshare.attention.operators import Visibility
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
TOKEN_WIDTH, OUTPUT_WIDTH = 6, 8
NUM_TOKENS = 3  # the item, its genres, its brands
TASKS = ("like", "love")
SLIDING = " sliding"
SEEN_BACK = 4  # events, seen by every layer of a sliding window
ANCHORED_WINDOW = Window(MAX_HISTORY, BLOCK)
# Two sliding layers see 7 events together; 5 more let the window start at a block.
SLIDING_WINDOW = Window(12, 6)
LONGER_WINDOW = Window(24, 6)
MERGE, RECENT, GLOBALS = 3, 12, 2  # of longer, whose deeper layers see at most 4 groups

NAMES = (*KINDS, *(name + SLIDING for name, kind in KIND_BY_NAME.items() if kind.slides))
# The kinds whose candidates may see prefixes of one prefill.
PREFIX_NAMES = tuple(name for name in NAMES if name not in (BIDIRECTIONAL, LONGER))
EXTENDED_NAMES = tuple(name for name in NAMES if name != BIDIRECTIONAL)
SLIDING_NAMES = tuple(name for name in NAMES if name.endswith(SLIDING))

# Two float64 paths to the same rows, whose largest number is 6: worst of 2000 draws 5.4e-15.
EXACT_TOLERANCE = 1e-12


HISTORIES = (
    History("seen", LONGER_WINDOW),
    History("bought", SLIDING_WINDOW, ("buy",)),
)
TWO_HISTORIES = replace(SCHEMA, histories=HISTORIES)
PAGE_SIZE = 5


class World(NamedTuple):
    """A schema, the spec of its towers, and a model."""

    schema: FeatureSchema
    spec: TowerSpec
    dlrm: DLRM


@lru_cache
def world_of(name: str, num_tokens: int = NUM_TOKENS) -> World:
    """Return the world of a kind by name; tests never change its model."""
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
        has_state=True,
        token_dim=TOKEN_WIDTH,
        output_dim=OUTPUT_WIDTH,
        merge=MERGE,
        recent=RECENT,
        num_globals=GLOBALS,
    )
    schema = schema_with(window)
    return World(schema, spec, make_dlrm(3, schema, spec))


def schema_with(window: Window) -> FeatureSchema:
    """Return the usual schema with another window and more columns of every kind."""
    more = {
        "items.brands": Vocabulary([f"brand {number}" for number in range(6)]),
        "events.surface": Vocabulary(["home", "search"]),
    }
    return replace(
        SCHEMA,
        vocabulary_by_column=SCHEMA.vocabulary_by_column | more,
        context_floats=("age", "battery"),
        event_attributes=("action", "surface"),
        event_floats=("dwell", "paid"),
        item_attributes=("genres", "brands"),
        histories=(History(HISTORY, window),),
        tasks=TASKS,
    )


@lru_cache
def two_histories_model(kind: str) -> DLRM:
    """Return a model of two histories; tests never change it."""
    num_layers = 3 if kind == LONGER else 2
    spec = TowerSpec(
        kind,
        WIDTH,
        num_layers,
        HEADS,
        dropout=0.1,
        has_state=True,
        merge=MERGE,
        recent=RECENT,
        num_globals=GLOBALS,
    )
    return make_dlrm(4, TWO_HISTORIES, spec)


def draw_buyer(user: str, num_events: int, num_candidates: int, seed: int) -> dict[str, Any]:
    """Draw a raw request in which about half of the events are buys."""
    raw = draw_raw(num_events, num_candidates, seed) | {"user_id": user}
    bought = np.random.default_rng([seed, 2]).random(num_events) < 0.5
    actions = raw["history"]["action"]
    raw["history"]["action"] = [
        "buy" if buys else action for buys, action in zip(bought, actions, strict=True)
    ]
    return raw


def make_caches(model: RankingModel, num_pages: Sequence[int]) -> list[KVCache]:
    """Make a cache with ``num_pages`` pages for each history; unwritten rows are NaN."""
    caches = []
    for pages, tower in zip(num_pages, model.collection.towers(), strict=True):
        num_planes, num_heads, head_dim = tower.kv_shape
        page_bytes = num_planes * PAGE_SIZE * num_heads * head_dim * 4
        pool = PagePool(pages * page_bytes, PAGE_SIZE, num_planes, num_heads, head_dim)
        pool.kv_pages.fill_(torch.nan)
        caches.append(KVCache(pool))
    return caches


def raws_of(world: World, users: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Draw one raw request for each user."""
    return [draw_raw(*sizes, world.schema) for sizes in users]


def cut(raw: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """Return the request with only events ``first`` to ``last``."""
    return raw | {"history": {name: cells[first:last] for name, cells in raw["history"].items()}}


def make_tower(name: str, dtype: torch.dtype, seed: int = 5) -> HistoryTower:
    """Make a tower of a world's kind, without a model, in eval mode."""
    world = world_of(name)
    window = world.schema.histories[0].window
    tower = HistoryTower(world.spec, window.max_history, window.block)
    random_weights(tower, seed)
    return tower.to(dtype).eval()


def draw_rows(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Draw tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def attend_whole(
    tower: HistoryTower, candidates: Tensor, kv: Tensor, num_events: int, newest: int = 0
) -> Tensor:
    """Attend from one user's candidates to all its K/V; the i-th newest event is 9 ** i s old."""
    rows, entered = tower.enter(candidates)
    elapsed = newest + 9 ** torch.arange(num_events - 1, -1, -1).clamp(max=18)
    now = 10**18
    every = torch.full([len(candidates)], now)
    visibility = Visibility(now - elapsed, every, torch.full_like(every, num_events))
    event_offsets = one_user(num_events)
    pages = flat_pages(kv, tower.encoder.row_offsets(event_offsets))
    return tower.attend(rows, entered, one_user(len(candidates)), pages, visibility, event_offsets)


def one_user(num_rows: int) -> Tensor:
    """Return the offsets of one user's rows."""
    return torch.tensor([0, num_rows])
