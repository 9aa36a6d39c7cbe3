"""Run pipelines as a user does: in a new process, or in this one if that is enough."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
WORLD = (
    "data.num_users=40",
    "data.events_per_user=40",
    "data.num_items=60",
    "data.num_categories=6",
)
TINY = (
    "budget=smoke",
    "threads=1",
    "model.dim=16",
    "model.num_heads=2",
    "model.top_mlp=[16,1]",
    "model.max_history=32",
    "model.block=8",
)


def composed(name: str, *overrides: str, configs: Path = CONFIGS) -> DictConfig:
    """Compose the config of a pipeline, unchecked."""
    with initialize_config_dir(str(configs), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def run_pipeline(name: str, *overrides: str, configs: Path = CONFIGS) -> None:
    """Compose and run a pipeline in this process."""
    config = composed(name, *overrides, configs=configs)
    importlib.import_module(f"pipelines.{name}").main(config)


def spawn_pipeline(
    name: str, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m pipelines.NAME`` with arguments as a shell passes them."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"pipelines.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
