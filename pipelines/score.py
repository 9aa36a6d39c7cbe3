"""Score a file of requests with an artifact: ``python -m pipelines.score artifact=DIR``."""

import sys
from contextlib import closing
from pathlib import Path

import hydra
from torch.utils.tensorboard import SummaryWriter

from torchrec_kvshare.cache.exporters import write_scalars
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import ScoreConfig
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.scoring.files import score_file

REFUSED = 3  # exit status: some lines got an error instead of scores


@hydra.main(version_base="1.3", config_path="../configs", config_name="score")
@pipeline(ScoreConfig)
def main(config: ScoreConfig) -> None:
    """Score every line, in order."""
    key = read_key(config.artifact_key_file, "artifact_key_file")
    artifact = load_artifact(Path(config.artifact), key)
    engine = new_engine(artifact, config.cache, deterministic=config.deterministic)
    with closing(engine):
        counts = score_file(
            engine,
            Path(config.requests),
            Path(config.output),
            batch_requests=config.batch_requests,
            history_order=config.history_order,
        )
    if engine.store is not None and config.tensorboard is not None:
        with SummaryWriter(config.tensorboard) as writer:
            write_scalars(engine.store.metrics.snapshot(), writer, step=0)
    print(counts.summary(config.history_order))
    print(f"wrote {config.output}")
    if counts.refused:
        sys.exit(REFUSED)


if __name__ == "__main__":
    run(main)
