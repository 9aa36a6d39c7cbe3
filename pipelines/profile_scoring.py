"""Profile the stages of a request, cached and uncached: ``python -m pipelines.profile_scoring``."""

from pathlib import Path

import hydra

from torchrec_kvshare.benchmark.options import ModelSizes
from torchrec_kvshare.benchmark.traces import profile_scoring, stage_table
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import ProfileConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="profile_scoring")
@pipeline(ProfileConfig)
def main(config: ProfileConfig) -> None:
    """Profile both engines, print the stage table, write the traces."""
    sizes = ModelSizes(dim=config.dim, num_layers=config.num_layers, num_heads=config.num_heads)
    folder = Path(config.output)
    profile_by_name = profile_scoring(
        folder,
        history=config.history_length,
        num_candidates=config.candidates,
        num_users=config.users,
        num_rounds=config.rounds,
        sizes=sizes,
        page_size=config.page_size,
        seed=config.seed,
    )
    print(stage_table(profile_by_name))
    for name, profiled in profile_by_name.items():
        print(f"{name}: open {profiled.trace} in https://ui.perfetto.dev")
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
