"""Write the records of a scenario: ``results.json``, TensorBoard, and a table as text."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

RESULTS_FILE = "results.json"
TENSORBOARD_FOLDER = "tensorboard"
CPU_INFO = Path("/proc/cpuinfo")

PREFILL_PATH = "prefill"  # a path that several scenarios measure

Case = dict[str, str | int]
# More keys that distinguish two cases of one path, where a scenario has them.
MORE_KEYS = (
    *("runtime", "data", "capacity_percent", "share", "ttl_s", "minutes", "warm_users"),
    *("population", "mib", "hit_percent"),
)


@dataclass(frozen=True)
class Record:
    """One figure.

    Attributes:
        scenario: name of the scenario.
        case: ``path`` and the sizes that apply.
        metric: name of the figure.
        value: the figure.
        unit: ``ms``, ``bytes``, ``1/s``, ``x`` for ratios, and so on.
    """

    scenario: str
    case: Case
    metric: str
    value: float
    unit: str


def cpu_name() -> str:
    """Return the model name of the processor."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(folder: Path, records: Sequence[Record], command: str, seed: int) -> Path:
    """Write ``results.json``: the records, and the machine and command they come from.

    Args:
        folder: where it is written; it is made.
        records: the records.
        command: the command line that measures them again.
        seed: of weights and requests.

    Returns:
        Path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "command": command,
        "seed": seed,
        "records": [asdict(record) | {"value": _finite(record.value)} for record in records],
    }
    path = folder / RESULTS_FILE
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def write_tensorboard(folder: Path, records: Sequence[Record], table: str) -> None:
    """Write the records as scalars over the number of candidates, and a table as text.

    Args:
        folder: of the results; the event files go into its folder ``tensorboard``.
        records: the records; one without ``candidates`` in its case is at step 0.
        table: text, shown in a fixed width.
    """
    with SummaryWriter(str(folder / TENSORBOARD_FOLDER)) as writer:
        for record in records:
            encoder, history = record.case.get("encoder", "-"), record.case.get("history", 0)
            path = record.case["path"]
            more = [f"/{key}_{record.case[key]}" for key in MORE_KEYS if key in record.case]
            tag = f"{record.scenario}/{encoder}/history_{history}/{record.metric}/{path}"
            tag += "".join(more)
            writer.add_scalar(tag, record.value, int(record.case.get("candidates", 0)))
        if records:
            writer.add_text(records[0].scenario, fixed_width(table))


def fixed_width(table: str) -> str:
    """Return text that TensorBoard shows verbatim."""
    return "\n".join(f"    {line}" for line in table.splitlines())


def figures_table(records: Sequence[Record]) -> str:
    """Return a table with one line per path and sizes, and one column per metric.

    Args:
        records: records of one scenario.

    Returns:
        Text without a newline at its end.
    """
    metrics = list(dict.fromkeys(record.metric for record in records))
    keys = [key for key in MORE_KEYS if any(key in record.case for record in records)]
    value_by_cell = {(_sizes(record, keys), record.metric): record.value for record in records}
    rows = [("encoder", "history", "candidates", "path", *keys, *metrics)]
    for sizes in dict.fromkeys(_sizes(record, keys) for record in records):
        rows.append((*sizes, *(_figure(value_by_cell.get((sizes, metric))) for metric in metrics)))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _sizes(record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    case = record.case
    return (
        str(case.get("encoder", "-")),
        str(case.get("history", "-")),
        str(case.get("candidates", "all")),
        str(case["path"]),
        *(str(case.get(key, "-")) for key in keys),
    )
