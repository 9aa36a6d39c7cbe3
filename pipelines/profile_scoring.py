"""See where a request's time goes, cached and uncached: ``python -m pipelines.profile_scoring``."""

from pathlib import Path

import hydra

from torchrec_kvshare.benchmark.plan import Sizes
from torchrec_kvshare.benchmark.traces import profile_scoring, stage_table
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import ProfileConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="profile_scoring")
@pipeline(ProfileConfig)
def main(config: ProfileConfig) -> None:
    """Compose, profile, write."""
    sizes = Sizes(config.dim, config.num_layers, config.num_heads, config.page_size, num_tokens=1)
    folder = Path(config.output)
    profile_by_name = profile_scoring(
        folder,
        config.history_length,
        config.candidates,
        config.users,
        config.rounds,
        sizes,
        config.seed,
    )
    print(stage_table(profile_by_name))
    for name, profiled in profile_by_name.items():
        print(f"{name}: open {profiled.trace} in https://ui.perfetto.dev")
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
