"""Train a DLRM with a shared history, and its baselines: ``python -m pipelines.train``."""

import json
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.config import TrainConfig, checked, literal_overrides
from torchrec_kvshare.training.run import METRICS, train_run


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    """Train, evaluate, write metrics.json."""
    config = checked(composed, TrainConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    metrics = train_run(config)
    print(json.dumps(metrics, indent=2))
    print(
        f"wrote {Path(config.output) / METRICS}; TensorBoard: {Path(config.output) / 'tensorboard'}"
    )


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
