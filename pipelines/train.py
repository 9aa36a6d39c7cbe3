"""Train a DLRM with a shared history, and its baselines: ``python -m pipelines.train``."""

import json
from pathlib import Path

import hydra

from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import TrainConfig
from torchrec_kvshare.training.run import METRICS, train_run


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@pipeline(TrainConfig)
def main(config: TrainConfig) -> None:
    """Train, evaluate, write metrics.json."""
    output = Path(config.output)
    verb = "finished before, see" if (output / METRICS).is_file() else "wrote"
    metrics = train_run(config)
    if metrics is not None:  # Under torchrun only the first rank has them.
        print(json.dumps(metrics, indent=2))
        print(f"{verb} {output / METRICS}; TensorBoard: {output / 'tensorboard'}")


if __name__ == "__main__":
    run(main)
