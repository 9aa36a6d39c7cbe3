"""What a longer history is worth: one training run for each length, tested on the same events.

The runs differ in the number of events that the model reads, and in nothing else. A DLRM without a
history is trained once, on the same budget; it has the same value at every length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from torchrec_kvshare.benchmark.options import EncoderOptions, Layers
from torchrec_kvshare.benchmark.plots import BLUE, GREEN, GREY, RED, Axis, Line, Picture
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.config import LEAVE_ONE_OUT, NO_HISTORY, Budget, ModelConfig, TrainConfig
from torchrec_kvshare.history.kinds import BIDIRECTIONAL, CAUSAL, HSTU, LONGER, TARGET_ONLY
from torchrec_kvshare.training.run import train_run

HISTORY_LENGTH = "history_length"
METRICS = ("AUC", "GAUC", "HR@10", "NDCG@10")
BLOCKS_PER_WINDOW = 4  # as in configs/train.yaml: 256 events in blocks of 64

LINE_BY_PATH = {
    CAUSAL: Line("causal", BLUE),
    BIDIRECTIONAL: Line("bidirectional", "#b28a2f"),
    HSTU: Line("hstu", GREEN),
    LONGER: Line("longer", RED),
    TARGET_ONLY: Line("target_only", "#8a5fb2"),
    NO_HISTORY: Line("no history", GREY, is_dashed=True),
}


def _over_length(metric: str) -> Picture:
    return Picture(
        metrics=(metric,),
        label=metric,
        panels=Axis("data", "data {}"),
        across=Axis("history", "events that the model reads, at most"),
        line_by_path=LINE_BY_PATH,
        case={},
        is_logarithmic=False,
    )


PICTURE_BY_NAME = {
    "auc_by_max_history": _over_length("AUC"),
    "hr10_by_max_history": _over_length("HR@10"),
}


@dataclass
class HistoryLengthOptions(EncoderOptions, Layers):
    """Options of ``scenario=history_length``."""

    data: Any = MISSING
    budget: Budget = field(default_factory=Budget)  # of each run; its baselines are not trained
    split: str = LEAVE_ONE_OUT
    histories: list[int] = field(default_factory=lambda: [16, 64, 256, 1024])  # events
    dim: int = 64  # width of tables and towers
    batch_targets: int = 256  # targets per batch, each with its negatives


def measure_history_length(options: HistoryLengthOptions) -> list[Record]:
    """Train and test a model for each kind of encoder and each length.

    Returns:
        Records of ``AUC``, ``GAUC``, ``HR@10`` and ``NDCG@10`` on the test split; NaN for one that
        means nothing. The runs are in the output folder, and are resumed there.

    Raises:
        ConfigError: if a value cannot work.
        DataError: if the data cannot be read, or has nothing to train or test on.
        TrainingError: if a run diverges.
    """
    return [
        record for kind in (*options.encoders, NO_HISTORY) for record in _records(options, kind)
    ]


def _records(options: HistoryLengthOptions, kind: str) -> Iterator[Record]:
    for history in options.histories:
        values = _tested(options, kind, history)
        case: Case = {
            "path": kind,
            "encoder": kind,
            "history": history,
            "data": options.data.name,
            "dim": options.dim,
            "heads": options.num_heads,
            "layers": options.num_layers,
        }
        for metric in METRICS:
            value = values[metric]
            yield Record(
                HISTORY_LENGTH, case, metric, math.nan if value is None else value, unit="x"
            )


def _tested(options: HistoryLengthOptions, kind: str, history: int) -> dict[str, Any]:
    """Train a model, or take the metrics of its run if that is finished.

    All lengths of a model without a history are one run.
    """
    block = max(1, history // BLOCKS_PER_WINDOW)
    model = ModelConfig(
        history=kind,
        dim=options.dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
    )
    name = kind
    if kind != NO_HISTORY:
        model = replace(model, max_history=history, block=block)
        name = f"{kind}_{history}"
    metrics = train_run(
        TrainConfig(
            output=str(Path(options.output) / name),
            data=options.data,
            model=model,
            budget=replace(options.budget, baselines=[]),
            split=options.split,
            seed=options.seed,
            batch_targets=options.batch_targets,
        )
    )
    assert metrics is not None  # It runs in one process.
    return metrics[kind]
