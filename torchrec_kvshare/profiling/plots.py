"""The benchmarks' records as pictures: axes with units, one line per path."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchrec_kvshare.errors import MissingExtraError
from torchrec_kvshare.profiling.benchmarks import (
    CROSS_REQUEST_HIT,
    MEMORY,
    QUEUE_LENGTH,
    REPEATED_KV,
    REQUEST_SHARED,
    SEED_MODEL,
    UNCACHED_MERGED,
)
from torchrec_kvshare.profiling.results import Record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_BY_PATH = {
    UNCACHED_MERGED: "uncached, history repeated per candidate",
    REQUEST_SHARED: "one prefill per request",
    CROSS_REQUEST_HIT: "K/V from the cache",
    SEED_MODEL: "seed model, N / (0.85 + 0.15 N)",
    REPEATED_KV: "one K/V copy per candidate",
}
COLOR_BY_PATH = {
    UNCACHED_MERGED: "#b2472f",
    REQUEST_SHARED: "#2f6db2",
    CROSS_REQUEST_HIT: "#2f8f5b",
    SEED_MODEL: "#777777",
    REPEATED_KV: "#777777",
}
DASHED = (SEED_MODEL, REPEATED_KV)
METRICS_BY_PICTURE = {
    "latency": (QUEUE_LENGTH, ("latency_ms",), "latency of a request [ms]"),
    "speedup": (
        QUEUE_LENGTH,
        ("speedup_vs_uncached", "seed_model_speedup"),
        "speed-up over the uncached path [x]",
    ),
    "memory": (MEMORY, ("peak_bytes", "repeated_kv_bytes"), "peak above what was held [bytes]"),
}
PANEL_INCHES = (4.6, 4.2)


def figure_class() -> "Callable[..., Figure]":
    """matplotlib's Figure, which needs no display and no global state.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots", "drawing plots") from error
    return Figure


def write_plots(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Draw what the records hold against the number of candidates.

    Args:
        folder: where the PNG files go; it exists.
        records: of one scenario or of several.

    Returns:
        The files that were written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = figure_class()
    written = []
    for picture, (scenario, metrics, label) in METRICS_BY_PICTURE.items():
        chosen = [r for r in records if r.scenario == scenario and r.metric in metrics]
        if chosen:
            written.append(folder / f"{picture}.png")
            _draw(figure, chosen, label).savefig(written[-1], dpi=120)
    return written


def _draw(figure: "Callable[..., Figure]", records: list[Record], label: str) -> "Figure":
    """One panel per history length, side by side, the legend above them all."""
    histories = sorted({int(record.case["history"]) for record in records})
    width, height = PANEL_INCHES
    drawn = figure(figsize=(width * len(histories), height), layout="constrained")
    panels = drawn.subplots(1, len(histories), sharey=True, squeeze=False)[0]
    lines: dict[str, Artist] = {}
    for panel, history in zip(panels, histories, strict=True):
        lines |= _draw_panel(panel, [r for r in records if r.case["history"] == history])
        panel.set_title(f"history of {history} events")
        panel.set_xlabel("candidates N")
    panels[0].set_ylabel(label)
    names = list(lines)
    drawn.legend(
        list(lines.values()), names, loc="outside upper center", ncols=len(names), frameon=False
    )
    return drawn


def _draw_panel(panel: "Axes", records: list[Record]) -> "dict[str, Artist]":
    """One line per path; returns them by name."""
    lines: dict[str, Artist] = {}
    for path in dict.fromkeys(str(record.case["path"]) for record in records):
        # Zero has no place on a logarithmic axis: a single candidate repeats no K/V.
        points = sorted(
            (int(r.case["candidates"]), r.value)
            for r in records
            if r.case["path"] == path and r.value > 0
        )
        [lines[NAME_BY_PATH[path]]] = panel.loglog(
            [queue for queue, _ in points],
            [value for _, value in points],
            color=COLOR_BY_PATH[path],
            linestyle="--" if path in DASHED else "-",
            marker="" if path in DASHED else "o",
            markersize=4,
        )
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return lines
