"""A run's settings and test metrics as TensorBoard's HPARAMS tab compares them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from torchrec_kvshare.config import TrainConfig
from torchrec_kvshare.training.metrics import Values

Setting = str | int | float | bool


def settings_by_name(
    config: TrainConfig, model: str, left_out: tuple[str, ...]
) -> dict[str, Setting]:
    """Return the settings of one of a run's models, by their keys in the config.

    Args:
        config: of the run; of its data only the name is a setting.
        model: ``model.history`` of the model: a kind of encoder, or the name of a baseline.
        left_out: keys of the config.

    Returns:
        The values that are not None; lists and mappings as text.
    """
    values = dataclasses.asdict(config) | {"data": config.data.name}
    chosen = {key: value for key, value in values.items() if key not in left_out}
    return dict(_flat(chosen, "")) | {"model.history": model}


def write_results(
    writer: SummaryWriter, metrics: Values, settings: Mapping[str, Setting], step: int
) -> None:
    """Write a model's test metrics and settings into the folder of its curves.

    ``SummaryWriter.add_hparams`` would write them into a folder of their own inside it.

    Args:
        writer: of the model's folder.
        metrics: of the test split.
        settings: as ``settings_by_name`` returns them.
        step: at which the metrics are shown.
    """
    value_by_tag = {f"test/{name.replace('@', '_at_')}": value for name, value in metrics.items()}
    file_writer = writer._get_file_writer()
    for summary in hparams(dict(settings), value_by_tag):
        file_writer.add_summary(summary)
    for tag, value in value_by_tag.items():
        if value is not None:
            writer.add_scalar(tag, value, step)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for key, value in values.items():
        if isinstance(value, Setting):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and key in ("model", "budget"):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)
