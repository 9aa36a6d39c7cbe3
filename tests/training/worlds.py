"""A seeded world and a model small enough to be trained in a second; users with a held-out item."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.data.logs import Event, all_events, log_of
from torchrec_kvshare.config import Budget, ModelConfig, SyntheticData, TrainConfig
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.shards import Shards, in_memory

DATA = SyntheticData(num_users=40, events_per_user=40, num_items=60, num_categories=6)
MODEL = ModelConfig(dim=16, num_layers=2, num_heads=2, top_mlp=[16, 1], max_history=32, block=8)
BUDGET = Budget("tiny", epochs=3, baselines=[])


def tiny_config(output: Path, **changes: Any) -> TrainConfig:
    """A training run of some 70 batches; a checkpoint after every epoch."""
    config = TrainConfig(
        str(output), DATA, MODEL, BUDGET, threads=1, batch_targets=64, checkpoint_seconds=1e9
    )
    return replace(config, **changes)


NUM_ITEMS = 30
NEVER_TRAINED = "200"
# Last item of each user, and whether the user has met it before.
LAST_ITEM = {"new item": "112", "repurchase": "103", "unknown": NEVER_TRAINED, "other": "117"}


def held_out_events() -> list[Event]:
    """Everyone meets items 100 to 106, one for validation and the last; one user meets all."""
    # All at one time: this user is in the training split only.
    events = [Event("all", str(100 + index), 50) for index in range(NUM_ITEMS)]
    for user, last in LAST_ITEM.items():
        seen = [*range(100, 107), 100]
        events += [Event(user, str(item), 100 + index) for index, item in enumerate(seen)]
        events += [Event(user, "101", 200), Event(user, last, 300)]
    return events


def shards_of(events: list[Event]) -> Shards:
    """A log in memory, with one history of eight events."""
    return in_memory(build_dataset(log_of(events), all_events(8, 4)))
