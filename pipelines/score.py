"""Score a file of requests with an artifact: ``python -m pipelines.score artifact=DIR``."""

import sys
from contextlib import closing
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch.utils.tensorboard import SummaryWriter

from torchrec_kvshare.assembly import new_engine
from torchrec_kvshare.cache.exporters import write_scalars
from torchrec_kvshare.config import ScoreConfig, checked, literal_overrides
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.scoring import score_file

REFUSED = 3  # exit status: some lines got an error in place of scores


@hydra.main(version_base="1.3", config_path="../configs", config_name="score")
def main(composed: DictConfig) -> None:
    """Answer every line, in order."""
    config = checked(composed, ScoreConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    artifact = load_artifact(Path(config.artifact))
    engine = new_engine(artifact, config.cache, config.deterministic)
    with closing(engine):
        counts = score_file(
            engine, Path(config.requests), Path(config.output), config.batch_requests
        )
    if engine.store is not None and config.tensorboard is not None:
        with SummaryWriter(config.tensorboard) as writer:
            write_scalars(engine.store.metrics.snapshot(), writer, step=0)
    print(f"scored {counts.scored}, refused {counts.refused}; cache: {counts.by_status}")
    print(f"wrote {config.output}")
    if counts.refused:
        sys.exit(REFUSED)


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
