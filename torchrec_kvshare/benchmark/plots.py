"""Records as pictures: axes with units, one line per path."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.training.plots import figure_class

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, BLUE, GREEN, GREY = "#b2472f", "#2f6db2", "#2f8f5b", "#777777"
PANEL_INCHES = (4.6, 4.2)


class Axis(NamedTuple):
    """A key of every record's case, and its label in a picture."""

    key: str
    label: str


class Line(NamedTuple):
    """How a path is drawn."""

    label: str
    color: str
    is_dashed: bool = False


class Picture(NamedTuple):
    """A picture of a scenario's records.

    Attributes:
        metrics: which records it shows.
        label: label of the values.
        panels: one panel for each value of this key; in the label ``{}`` is the value.
        across: what the lines go over.
        line_by_path: how each path is drawn.
        case: what the case of a record must have, for it to be shown.
        is_logarithmic: whether both axes of a panel are logarithmic.
    """

    metrics: tuple[str, ...]
    label: str
    panels: Axis
    across: Axis
    line_by_path: Mapping[str, Line]
    case: Case
    is_logarithmic: bool


def write_plots(
    folder: Path, records: Sequence[Record], picture_by_name: Mapping[str, Picture]
) -> list[Path]:
    """Draw a scenario's pictures.

    Args:
        folder: where the PNG files go; it exists.
        records: of the scenario.
        picture_by_name: its pictures, by the name of the file.

    Returns:
        The files that were written; a picture without records is left out.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = figure_class()
    written = []
    for name, picture in picture_by_name.items():
        shown = [record for record in records if _is_in(record, picture)]
        if shown:
            written.append(folder / f"{name}.png")
            _draw(figure, shown, picture).savefig(written[-1], dpi=120)
    return written


def _is_in(record: Record, picture: Picture) -> bool:
    return record.metric in picture.metrics and picture.case.items() <= record.case.items()


def _draw(figure: "Callable[..., Figure]", records: Sequence[Record], picture: Picture) -> "Figure":
    """Draw the panels side by side, the legend above all of them."""
    panel_of_record = [record.case[picture.panels.key] for record in records]
    names = list(dict.fromkeys(panel_of_record))
    width, height = PANEL_INCHES
    drawn = figure(figsize=(width * len(names), height), layout="constrained")
    panels = drawn.subplots(1, len(names), sharey=True, squeeze=False)[0]
    lines: dict[str, Artist] = {}
    for panel, name in zip(panels, names, strict=True):
        shown = [r for r, own in zip(records, panel_of_record, strict=True) if own == name]
        lines |= _draw_panel(panel, shown, picture)
        panel.set_title(picture.panels.label.format(name))
        panel.set_xlabel(picture.across.label)
    panels[0].set_ylabel(picture.label)
    drawn.legend(
        list(lines.values()),
        list(lines),
        loc="outside upper center",
        ncols=len(lines),
        frameon=False,
    )
    return drawn


def _draw_panel(panel: "Axes", records: Sequence[Record], picture: Picture) -> "dict[str, Artist]":
    """Draw one line per path and return the lines by label."""
    lines: dict[str, Artist] = {}
    plot = panel.loglog if picture.is_logarithmic else panel.plot
    for path in dict.fromkeys(str(record.case["path"]) for record in records):
        line = picture.line_by_path[path]
        # A logarithmic axis has no zero: a single candidate repeats no K/V.
        points = sorted(
            (int(r.case[picture.across.key]), r.value)
            for r in records
            if r.case["path"] == path and (r.value > 0 or not picture.is_logarithmic)
        )
        [lines[line.label]] = plot(
            [x for x, _ in points],
            [value for _, value in points],
            color=line.color,
            linestyle="--" if line.is_dashed else "-",
            marker="" if line.is_dashed else "o",
            markersize=4,
        )
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return lines
