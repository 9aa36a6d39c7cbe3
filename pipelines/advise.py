"""Advise on a cache for a model and its traffic: ``python -m pipelines.advise artifact=DIR``."""

import shlex
import sys
from pathlib import Path

import hydra
import torch

from torchrec_kvshare.benchmark.plots import figure_class, write_plots
from torchrec_kvshare.benchmark.results import write_results, write_tensorboard
from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.commands.layout import typed_command
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import AdviseConfig
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.planning.advice import PICTURE_BY_NAME, advise
from torchrec_kvshare.planning.report import (
    ADVICE_FILE,
    ADVISED,
    advice_records,
    advice_text,
    write_cache,
)
from torchrec_kvshare.planning.trace import read_trace
from torchrec_kvshare.planning.validation import validate


@hydra.main(version_base="1.3", config_path="../configs", config_name="advise")
@pipeline(AdviseConfig)
def main(config: AdviseConfig) -> None:
    """Measure, replay, choose; print the advice and write it as a config."""
    figure_class()  # Without matplotlib it fails here, not after the measurements.
    key = read_key(config.artifact_key_file, "artifact_key_file")
    artifact = load_artifact(Path(config.artifact), key)
    trace = read_trace(config, artifact.schema)
    advice, times = advise(artifact, trace, config)
    measured = validate(advice, artifact, trace) if config.validate else None
    threads = torch.get_num_threads()
    text = advice_text(
        advice, trace, times, threads=threads, budget_ms=config.budget_ms, measured=measured
    )
    records = advice_records(advice, trace, times, threads=threads, measured=measured)
    folder = Path(config.output)
    command = shlex.join([*typed_command("advise"), *sys.argv[1:]])
    write_results(folder, records, command, config.seed)
    write_tensorboard(folder, records, text)
    write_plots(folder, records, PICTURE_BY_NAME)
    (folder / ADVICE_FILE).write_text(f"{text}\n")
    write_cache(folder, advice, trace)
    given = (f"--config-dir={folder}", f"cache={ADVISED}", f"artifact={config.artifact}")
    print(text)
    print(f"use it: {shlex.join([*typed_command('serve'), *given])}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
