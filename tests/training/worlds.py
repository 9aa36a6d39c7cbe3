"""A seeded world and a model small enough to be trained in a second."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrec_kvshare.config import Budget, ModelConfig, SyntheticData, TrainConfig

DATA = SyntheticData(num_users=40, events_per_user=40, num_items=60, num_categories=6)
MODEL = ModelConfig(dim=16, num_layers=2, num_heads=2, top_mlp=[16, 1], max_history=32, block=8)
BUDGET = Budget("tiny", epochs=3, baselines=False)


def tiny_config(output: Path, **changes: Any) -> TrainConfig:
    """A training run of some 70 batches; a checkpoint after every epoch."""
    config = TrainConfig(
        str(output), DATA, MODEL, BUDGET, threads=1, batch_targets=64, checkpoint_seconds=1e9
    )
    return replace(config, **changes)
