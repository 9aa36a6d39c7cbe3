"""Measure what N candidates cost: ``python -m pipelines.benchmark scenario=queue_length``."""

import shlex
import sys
from pathlib import Path

import hydra

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.plots import figure_class, write_plots
from torchrec_kvshare.benchmark.results import figures_table, write_results, write_tensorboard
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.commands.layout import typed_command
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import BenchmarkConfig

NOT_IN_TABLE = ("requests_per_s",)


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
@pipeline(BenchmarkConfig)
def main(config: BenchmarkConfig) -> None:
    """Compose, measure, write."""
    figure_class()  # Without matplotlib it fails here, not after minutes of measuring.
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
        read_key(config.artifact_key_file, "artifact_key_file"),
    )
    sizes = Sizes(
        config.dim,
        config.num_layers,
        config.num_heads,
        config.page_size,
        config.num_tokens,
    )
    records = measure(config.scenario, plan, sizes)
    table = figures_table([record for record in records if record.metric not in NOT_IN_TABLE])
    folder = Path(config.output)
    command = shlex.join([*typed_command("benchmark"), *sys.argv[1:]])
    write_results(folder, records, command, config.seed)
    write_tensorboard(folder, records, table)
    write_plots(folder, records)
    print(table)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
