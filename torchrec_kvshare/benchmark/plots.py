"""The benchmarks' records as pictures: axes with units, one line per path."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.scenarios.cache_trace import (
    CACHE_TRACE,
    LIBRARY_LRU,
    LIBRARY_TINY_LFU,
    NO_TTL,
)
from torchrec_kvshare.benchmark.scenarios.queue_length import (
    CROSS_REQUEST_HIT,
    MEMORY,
    QUEUE_LENGTH,
    REPEATED_KV,
    REQUEST_SHARED,
    SEED_MODEL,
    UNCACHED_MERGED,
)
from torchrec_kvshare.cache.kv_cache import USER
from torchrec_kvshare.cache.policies import LRU, TINY_LFU
from torchrec_kvshare.errors import MissingExtraError

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
    LRU: "least recently used",
    TINY_LFU: "TinyLFU",
    LIBRARY_LRU: "moka alone, least recently used",
    LIBRARY_TINY_LFU: "moka alone, TinyLFU",
}
COLOR_BY_PATH = {
    UNCACHED_MERGED: "#b2472f",
    REQUEST_SHARED: "#2f6db2",
    CROSS_REQUEST_HIT: "#2f8f5b",
    SEED_MODEL: "#777777",
    REPEATED_KV: "#777777",
    LRU: "#2f6db2",
    TINY_LFU: "#2f8f5b",
    LIBRARY_LRU: "#777777",
    LIBRARY_TINY_LFU: "#b2472f",
}
DASHED = (SEED_MODEL, REPEATED_KV, LIBRARY_LRU, LIBRARY_TINY_LFU)


class Axis(NamedTuple):
    """A number or a name in every record's case, and how a picture calls it."""

    key: str
    label: str


class Picture(NamedTuple):
    """What a picture shows.

    Attributes:
        scenario: whose records.
        metrics: which of them.
        case: what the cases of those have.
        label: of the figures.
        panels: one for each of these; in its label ``{}`` is which.
        across: what the lines go over.
        is_logarithmic: whether both axes of a panel are.
    """

    scenario: str
    metrics: tuple[str, ...]
    case: Case
    label: str
    panels: Axis
    across: Axis
    is_logarithmic: bool


def _over_candidates(scenario: str, metrics: tuple[str, ...], label: str) -> Picture:
    panels, across = Axis("history", "history of {} events"), Axis("candidates", "candidates N")
    return Picture(scenario, metrics, {}, label, panels, across, is_logarithmic=True)


def _over_capacity(metric: str, label: str) -> Picture:
    case: Case = {"share": USER, "ttl_s": NO_TTL}
    panels = Axis("data", "data {}")
    across = Axis("capacity_percent", "capacity [% of the K/V of all users]")
    return Picture(CACHE_TRACE, (metric,), case, label, panels, across, is_logarithmic=False)


PICTURE_BY_NAME = {
    "latency": _over_candidates(QUEUE_LENGTH, ("latency_ms",), "latency of a request [ms]"),
    "speedup": _over_candidates(
        QUEUE_LENGTH,
        ("speedup_vs_uncached", "seed_model_speedup"),
        "speed-up over the uncached path [x]",
    ),
    "memory": _over_candidates(
        MEMORY, ("peak_bytes", "repeated_kv_bytes"), "peak above what was held [bytes]"
    ),
    "hit_rate": _over_capacity("hit_rate", "requests of which all K/V was cached [share]"),
    "event_hit_rate": _over_capacity("event_hit_rate", "events whose K/V was cached [share]"),
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
    """Draw what the records hold against the number of candidates, or against the capacity.

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
    for name, picture in PICTURE_BY_NAME.items():
        chosen = [record for record in records if _is_in(record, picture)]
        if chosen:
            written.append(folder / f"{name}.png")
            _draw(figure, chosen, picture).savefig(written[-1], dpi=120)
    return written


def _is_in(record: Record, picture: Picture) -> bool:
    return (
        record.scenario == picture.scenario
        and record.metric in picture.metrics
        and picture.case.items() <= record.case.items()
    )


def _draw(figure: "Callable[..., Figure]", records: Sequence[Record], picture: Picture) -> "Figure":
    """One panel per history length or data set, side by side, the legend above them all."""
    chosen = [record.case[picture.panels.key] for record in records]
    names = list(dict.fromkeys(chosen))
    width, height = PANEL_INCHES
    drawn = figure(figsize=(width * len(names), height), layout="constrained")
    panels = drawn.subplots(1, len(names), sharey=True, squeeze=False)[0]
    lines: dict[str, Artist] = {}
    for panel, name in zip(panels, names, strict=True):
        of_panel = [r for r, where in zip(records, chosen, strict=True) if where == name]
        lines |= _draw_panel(panel, of_panel, picture)
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
    """One line per path; returns them by name."""
    lines: dict[str, Artist] = {}
    plot = panel.loglog if picture.is_logarithmic else panel.plot
    for path in dict.fromkeys(str(record.case["path"]) for record in records):
        # Zero has no place on a logarithmic axis: a single candidate repeats no K/V.
        points = sorted(
            (int(r.case[picture.across.key]), r.value)
            for r in records
            if r.case["path"] == path and (r.value > 0 or not picture.is_logarithmic)
        )
        [lines[NAME_BY_PATH[path]]] = plot(
            [place for place, _ in points],
            [value for _, value in points],
            color=COLOR_BY_PATH[path],
            linestyle="--" if path in DASHED else "-",
            marker="" if path in DASHED else "o",
            markersize=4,
        )
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return lines
