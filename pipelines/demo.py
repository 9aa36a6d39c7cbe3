"""Train, export and score end to end: ``python -m pipelines.demo``, or ``make demo``."""

import shlex
import sys
from pathlib import Path

import hydra

from torchrec_kvshare.benchmark.comparison import (
    compare_paths,
    comparison_table,
    plot_comparison,
)
from torchrec_kvshare.cache.open import MEMORY, OFF
from torchrec_kvshare.commands.layout import process_command
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import CacheConfig, DemoConfig, ModelConfig, ServerConfig, TrainConfig
from torchrec_kvshare.data.requests import make_requests
from torchrec_kvshare.errors import MissingExtraError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.training.run import TENSORBOARD, Metrics, load_data, load_trained, train_run

NUM_MERGED = 10  # requests scored the merged way, which is slow
PLOT = "latency.png"
# Of the test metrics. Not the ranks of held-out items, one for each of the few users: all noise.
SHOWN = ("AUC", "GAUC", "NE")


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo")
@pipeline(DemoConfig)
def main(config: DemoConfig) -> None:
    """Train, export, score cached and uncached, compare."""
    output = Path(config.output)
    training = TrainConfig(
        output=str(output / "train"),
        data=config.data,
        model=ModelConfig(max_history=config.max_history),
        budget=config.budget,
        seed=config.seed,
    )
    # Before training, so that a mistake in the request sizes shows at once.
    raws = list(make_requests(load_data(training), config.requests, config.candidates, config.seed))
    metrics = train_run(training)
    model, schema = load_trained(output / "train")
    export_model(RankingModel(model).eval(), schema, output / "artifact")
    artifact = load_artifact(output / "artifact")
    requests = [parse_request(raw, artifact.schema) for raw in raws]
    uncached, cached = (new_engine(artifact, CacheConfig(name)) for name in (OFF, MEMORY))
    figures = compare_paths(model, uncached, cached, requests, num_merged=NUM_MERGED)
    print(f"\nTest split of {config.data.name}, every model on the same budget:\n")
    print(metrics_table(metrics))
    print(f"\n{config.requests} requests, {config.candidates} candidates each:\n")
    print(comparison_table(figures))
    python, artifact_folder = sys.executable, output / "artifact"
    print(f"\nwrote {output}")
    try:
        plot_comparison(output / PLOT, figures)
        print(f"plot of the latencies: {output / PLOT}")
    except MissingExtraError as error:
        print(f"no {PLOT}: {error}")
    curves = output / "train" / TENSORBOARD
    print(f"curves of the training: {python} -m tensorboard.main --logdir {curves}")
    print(
        f"serve the model: {shlex.join(process_command('serve'))} artifact={artifact_folder}"
        f"\n    and open http://127.0.0.1:{ServerConfig().http_port}/"
    )


def metrics_table(metrics: Metrics) -> str:
    """Return test metrics as a fixed-width text table, one line per model."""
    # Those of a named task have its name behind them.
    shown = [name for name in next(iter(metrics.values())) if name.partition("/")[0] in SHOWN]
    widths = [max(9, len(name) + 2) for name in shown]
    lines = [f"{'model':<12}" + "".join(map(str.rjust, shown, widths))]
    for kind, values in metrics.items():
        cells = ("-" if values[name] is None else f"{values[name]:.4f}" for name in shown)
        lines.append(f"{kind:<12}" + "".join(map(str.rjust, cells, widths)))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
