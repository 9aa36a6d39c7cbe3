"""Run a benchmark scenario: ``python -m pipelines.benchmark scenario=queue_length``."""

import shlex
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from torchrec_kvshare.benchmark.options import Options
from torchrec_kvshare.benchmark.plots import figure_class, write_plots
from torchrec_kvshare.benchmark.results import figures_table, write_results, write_tensorboard
from torchrec_kvshare.benchmark.run import measure, scenario_called
from torchrec_kvshare.commands.layout import typed_command
from torchrec_kvshare.commands.run import pipeline, run

NOT_IN_TABLE = ("requests_per_s",)


def options_of(composed: DictConfig) -> type[Options]:
    """Return the options of the scenario that the config names."""
    return scenario_called(composed.get("scenario")).options


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
@pipeline(options_of)
def main(options: Options) -> None:
    """Compose, measure, write."""
    figure_class()  # Without matplotlib it fails here, not after minutes of measuring.
    records = measure(options.scenario, options)
    table = figures_table([record for record in records if record.metric not in NOT_IN_TABLE])
    folder = Path(options.output)
    command = shlex.join([*typed_command("benchmark"), *sys.argv[1:]])
    write_results(folder, records, command, options.seed)
    write_tensorboard(folder, records, table)
    write_plots(folder, records, scenario_called(options.scenario).picture_by_name)
    print(table)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
