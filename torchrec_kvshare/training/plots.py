"""The plot of a run: metrics of all its models by length of history."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torchrec_kvshare.errors import MissingExtraError
from torchrec_kvshare.training.by_length import (
    HELD_OUT,
    LEAST_BY_BUCKET,
    RANK_NAMES,
    TARGETS,
)
from torchrec_kvshare.training.metrics import Measures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_INCHES = (3.4, 3.2)


def figure_class() -> "Callable[..., Figure]":
    """Return matplotlib's Figure, which needs no display and no global state.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots", "drawing plots") from error
    return Figure


def plot_by_length(path: Path, measures_by_model: Mapping[str, Mapping[str, Measures]]) -> None:
    """Draw a panel for each metric, with a line for each model; a missing value is a gap.

    Args:
        path: the PNG file to write.
        measures_by_model: by model and bucket, as ``by_history_length`` returns them.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    counts = next(iter(measures_by_model.values()))
    found = next(iter(counts.values())).values
    names = [name for name in found if name not in (TARGETS, HELD_OUT)]
    width, height = PANEL_INCHES
    figure = figure_class()(figsize=(width * len(names), height))
    for panel, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for model, by_bucket in measures_by_model.items():
            values = [by_bucket[bucket].values[name] for bucket in LEAST_BY_BUCKET]
            drawn = [float("nan") if value is None else value for value in values]
            panel.plot(range(len(drawn)), drawn, marker="o", markersize=4, label=model)
        counted, of_what = (HELD_OUT, "users") if name in RANK_NAMES else (TARGETS, "targets")
        ticks = [f"{bucket}\n{counts[bucket].values[counted]:,}" for bucket in LEAST_BY_BUCKET]
        panel.set_xticks(range(len(ticks)), ticks, fontsize=7)
        panel.set_title(name)
        panel.set_xlabel(f"earlier events / {of_what}")
        panel.grid(True, color="#dddddd", linewidth=0.6)
    panel.legend(frameon=False, fontsize=8)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.2)
    figure.savefig(path, dpi=100)
