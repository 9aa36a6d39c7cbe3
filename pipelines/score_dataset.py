"""Score files of requests, resumably: ``python -m pipelines.score_dataset artifact=DIR``."""

import sys
from functools import partial
from pathlib import Path

import hydra

from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import CPU, ScoreDatasetConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.open import open_offline_engine
from torchrec_kvshare.scoring.on_ray import score_on_ray
from torchrec_kvshare.scoring.partitions import (
    ScoringSettings,
    begin,
    partitions_of,
    score_partitions,
    total,
)
from torchrec_kvshare.training.evaluate import progress_bar
from torchrec_kvshare.training.ranks import Ranks, device_of, joined_ranks

REFUSED = 3  # exit status: some requests got an error instead of scores


@hydra.main(version_base="1.3", config_path="../configs", config_name="score_dataset")
@pipeline(ScoreDatasetConfig)
def main(config: ScoreDatasetConfig) -> None:
    """Score all partitions, alone or with others."""
    with joined_ranks(device_of(CPU)) as ranks:
        num_refused = _score(config, ranks)
    if num_refused:
        sys.exit(REFUSED)


def _score(config: ScoreDatasetConfig, ranks: Ranks) -> int:
    if config.actors is not None and ranks.world_size > 1:
        raise ConfigError(f"actors is {config.actors}; under torchrun its processes score")
    # The default output holds the time, which ranks may read differently.
    output = Path(ranks.gather(config.output)[0]).resolve()
    settings = ScoringSettings(
        batch_requests=config.batch_requests,
        history_order=config.history_order,
        capacity_bytes=config.capacity_bytes,
        deterministic=config.deterministic,
    )
    partitions = partitions_of(config.requests, output)
    key_file = config.artifact_key_file
    # Actors may have another working directory.
    open_engine = partial(
        open_offline_engine,
        Path(config.artifact).resolve(),
        None if key_file is None else str(Path(key_file).resolve()),
        config.capacity_bytes,
        deterministic=config.deterministic,
    )
    engine = open_engine()
    if ranks.is_first:
        begin(output, engine.model_version, settings, partitions)
    ranks.wait()
    scored = (
        score_partitions(engine, partitions, settings)
        if config.actors is None
        else score_on_ray(
            open_engine,
            partitions,
            settings,
            num_actors=config.actors,
            address=config.ray_address,
            threads=config.threads,
        )
    )
    bar = progress_bar("scoring", len(partitions), "partition", ranks)
    for _ in scored:
        bar.update()
    bar.close()
    counts = total(partitions)
    if ranks.is_first:
        print(counts.summary(config.history_order))
        print(f"wrote {output}")
    return counts.refused


if __name__ == "__main__":
    run(main)
