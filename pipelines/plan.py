"""Plan the capacity of a cache for a population: ``python -m pipelines.plan traffic.users=N``."""

import shlex
import sys
from pathlib import Path

import hydra

from torchrec_kvshare.benchmark.plots import figure_class, write_plots
from torchrec_kvshare.benchmark.results import write_results, write_tensorboard
from torchrec_kvshare.commands.layout import typed_command
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import PlanConfig
from torchrec_kvshare.planning.plan import PICTURE_BY_NAME, make_plan, plan_records, plan_text


@hydra.main(version_base="1.3", config_path="../configs", config_name="plan")
@pipeline(PlanConfig)
def main(config: PlanConfig) -> None:
    """Plan, print the tables, write the records."""
    figure_class()  # Without matplotlib it fails here, not after the plan.
    plan = make_plan(config)
    records = plan_records(plan, config.traffic.users)
    text = plan_text(plan, config)
    folder = Path(config.output)
    command = shlex.join([*typed_command("plan"), *sys.argv[1:]])
    write_results(folder, records, command, config.seed)
    write_tensorboard(folder, records, text)
    write_plots(folder, records, PICTURE_BY_NAME)
    print(text)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
