"""Measure what N candidates cost: ``python -m pipelines.benchmark scenario=queue_length``."""

import shlex
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.attention.bodies import choose_body
from torchrec_kvshare.config import BenchmarkConfig, checked, literal_overrides
from torchrec_kvshare.profiling.plan import Plan, Sizes
from torchrec_kvshare.profiling.plots import figure_class, write_plots
from torchrec_kvshare.profiling.results import figures_table, write_results, write_tensorboard
from torchrec_kvshare.profiling.scenarios import measure

NOT_IN_TABLE = ("requests_per_s",)


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(composed: DictConfig) -> None:
    """Compose, measure, write."""
    config = checked(composed, BenchmarkConfig)
    figure_class()  # Without matplotlib it fails here, not after minutes of measuring.
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    plan = Plan(
        config.histories,
        config.long_histories,
        config.candidates,
        config.merged_max_candidates,
        config.merged_chunk_rows,
        config.encoders,
        config.repeats,
        config.seed,
        None if config.artifact is None else Path(config.artifact),
        None if config.run is None else Path(config.run),
        config.data,
        config.requests,
    )
    sizes = Sizes(
        config.dim,
        config.num_layers,
        config.num_heads,
        config.page_size,
        config.num_tokens,
        choose_body(config.body, "cpu"),
    )
    records = measure(config.scenario, plan, sizes)
    table = figures_table([record for record in records if record.metric not in NOT_IN_TABLE])
    folder = Path(config.output)
    command = shlex.join(["python", "-m", "pipelines.benchmark", *sys.argv[1:]])
    write_results(folder, records, command, config.seed)
    write_tensorboard(folder, records, table)
    write_plots(folder, records)
    print(table)
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
