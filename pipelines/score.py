"""Score a file of requests with an artifact: ``python -m pipelines.score artifact=DIR``."""

import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.config import ScoreConfig, checked, literal_overrides
from torchrec_kvshare.export.torchscript import load_artifact
from torchrec_kvshare.scoring import CacheLimits, new_engine, score_file

REFUSED = 3  # exit status: some lines got an error in place of scores


@hydra.main(version_base="1.3", config_path="../configs", config_name="score")
def main(composed: DictConfig) -> None:
    """Answer every line, in order."""
    config = checked(composed, ScoreConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    artifact = load_artifact(Path(config.artifact))
    cache = config.cache
    limits = CacheLimits(cache.capacity_bytes, cache.page_size, cache.ttl_s, cache.idle_ttl_s)
    engine = new_engine(artifact, cache.name, limits, cache.items, config.deterministic)
    counts = score_file(engine, Path(config.requests), Path(config.output), config.batch_requests)
    print(f"scored {counts.scored}, refused {counts.refused}; cache: {counts.by_status}")
    print(f"wrote {config.output}")
    if counts.refused:
        sys.exit(REFUSED)


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
