"""The usual world with one item whose embedding is NaN, as after diverged training."""

from typing import Any

import torch
from torchrec.models.dlrm import DLRM

from tests.worlds import SCHEMA, draw_raw, make_dlrm
from torchrec_kvshare.features.schema import ITEM

BAD_ITEM, GOOD_ITEMS = "105", ("100", "101", "102", "103", "104")


def poison(dlrm: DLRM) -> None:
    """Set the item's embedding rows to NaN in a model of the usual world."""
    state = dlrm.state_dict()
    row = SCHEMA.vocabulary_by_column[ITEM].row(BAD_ITEM)
    for name, weight in state.items():
        if name.endswith("_item_id.weight"):
            weight[row] = torch.nan
    dlrm.load_state_dict(state)


def poisoned_dlrm(seed: int) -> DLRM:
    """Make a DLRM with history in eval mode that gives NaN wherever the item is."""
    dlrm = make_dlrm(seed)
    poison(dlrm)
    return dlrm


def good_raw(user: str, num_candidates: int, num_events: int = 6) -> dict[str, Any]:
    """Draw a request without the item."""
    raw = draw_raw(num_events, num_candidates, ord(user))
    raw["candidates"][ITEM] = [GOOD_ITEMS[number % 5] for number in range(num_candidates)]
    raw["history"][ITEM] = [GOOD_ITEMS[number % 5] for number in range(num_events)]
    return raw | {"user_id": user, "request_id": user}


def bad_candidates(user: str, num_candidates: int, *indices: int) -> dict[str, Any]:
    """Draw a request with the item among its candidates, at ``indices``."""
    raw = good_raw(user, num_candidates)
    for index in indices:
        raw["candidates"][ITEM][index] = BAD_ITEM
    return raw


def bad_history(user: str, num_candidates: int) -> dict[str, Any]:
    """Draw a request with the item in the user's history, so that the K/V is NaN."""
    raw = good_raw(user, num_candidates)
    raw["history"][ITEM][2] = BAD_ITEM
    return raw
