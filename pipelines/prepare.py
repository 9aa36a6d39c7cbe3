"""Cut a log of any length into shards for training: ``python -m pipelines.prepare data=NAME``."""

from pathlib import Path

import hydra

from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import PrepareConfig
from torchrec_kvshare.data.prepare import MANIFEST, prepare


@hydra.main(version_base="1.3", config_path="../configs", config_name="prepare")
@pipeline(PrepareConfig)
def main(config: PrepareConfig) -> None:
    """Prepare the log, print its report."""
    verb = "finished before, see" if (Path(config.output) / MANIFEST).is_file() else "wrote"
    manifest = prepare(config)
    print(manifest["report"])
    print(f"{manifest['num_events']} events of {manifest['num_users']} users")
    print(f"{verb} {config.output}")


if __name__ == "__main__":
    run(main)
