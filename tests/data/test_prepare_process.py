"""Preparing as a process: killed anywhere it goes on, and it stays within its memory."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.prepared import assert_equals, rows_of
from tests.pipelines.commands import run_all
from tests.processes import ROOT, ForkedPython
from torchrec_kvshare.config import Columns, InteractionsData
from torchrec_kvshare.data.load import load_log

DATA = InteractionsData(
    path="", columns=Columns("user", "item", "time", item_attributes=["tag"]), label="stars>=3"
)
OPTIONS = (
    "data=interactions",
    "data.columns.user=user",
    "data.columns.item=item",
    "data.columns.time=time",
    "data.columns.item_attributes=[tag]",
    "data.label='stars>=3'",
    "num_shards=5",
    "threads=1",
)


def write_log(
    path: Path, num_rows: int, seed: int = 0, rows_per_user: int = 20, name: str = ""
) -> Path:
    """A log of many users, its rows in the order of time."""
    rng = np.random.default_rng(seed)
    columns = {
        "user": np.char.add(name, rng.integers(0, num_rows // rows_per_user, num_rows).astype(str)),
        "item": rng.integers(0, num_rows // 50 + 2, num_rows),
        "time": 1_700_000_000 + np.arange(num_rows) // 3,
        "stars": rng.integers(1, 6, num_rows),
        "tag": np.char.add("t", rng.integers(0, 9, num_rows).astype(str)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def files_of(folder: Path) -> dict[str, object]:
    """The content of every file of a prepared folder."""
    return {
        str(path.relative_to(folder)): rows_of(path)
        if path.suffix == ".parquet"
        else path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start(
    log: Path, output: Path, *options: str, popen: "type[subprocess.Popen[bytes]]" = ForkedPython
) -> "subprocess.Popen[bytes]":
    arguments = [*OPTIONS, f"data.path={log}", f"output={output}", *options]
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.prepare", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def kill_after(process: "subprocess.Popen[bytes]", output: Path, stage: str) -> None:
    """Kill the process as soon as a stage, or its unfinished file, is there."""
    while process.poll() is None and not any(output.glob(stage)):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on_and_gives_the_same_files(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log" / "a.parquet", 60_000)
    write_log(tmp_path / "log" / "b.parquet", 20_000, seed=1)
    unbroken = tmp_path / "unbroken"
    assert start(log.parent, unbroken).wait() == 0
    expected = files_of(unbroken)

    output = tmp_path / "killed"
    for stage in (
        "work/staged/00000.parquet.new",
        "work/staged/00001.parquet.new",
        "work/values/*.new",
        "work/rows.parquet.new",
        "work/cut.new",
        "shards/00002.events.parquet",
        "items.parquet",
    ):
        process = start(log.parent, output)
        kill_after(process, output, stage)
        assert process.returncode == -signal.SIGKILL, f"it ended before {stage}"
        assert not (output / "prepared.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (output / "shards").glob("*[0-2].events.*")}
    assert kept
    assert start(log.parent, output).wait() == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # They were not made again.
    assert files_of(output) == expected
    assert sorted(path.name for path in output.iterdir()) == [
        "items.parquet",
        "prepared.json",
        "shards",
        "vocabulary",
    ]
    DATA.path = str(log.parent)
    assert_equals(output, load_log(DATA))


def test_a_run_stays_within_its_memory(tmp_path: Path) -> None:
    """DuckDB alone would take 560 MB for the ids of this log: with a limit of 8 GB the peak is so.

    Python's chunks took another 130 MB beside it while they were twice as long.
    """
    name = "a user with a long name "
    log = write_log(tmp_path / "log.parquet", 2_000_000, rows_per_user=1, name=name)
    process = start(log, tmp_path / "out", "memory_bytes=500000000", popen=subprocess.Popen)
    peak_bytes = 0
    while process.poll() is None:
        # Not ru_maxrss, which counts this process before the other program replaced its copy.
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak_bytes = int(line.split()[1]) * 1024
        time.sleep(0.01)
    assert process.returncode == 0
    assert 100_000_000 < peak_bytes < 520_000_000


def test_a_mistake_ends_in_one_line(tmp_path: Path) -> None:
    message_by_option = {
        "data.columns.user=who": "error: column 'who' is not in",
        "memory_bytes=1000": "error: memory_bytes is 1000; it must be at least 500000000",
        "num_shards=0": "error: num_shards is 0; it must be at least 1",
        "data.path=[]": "error: data.path is []",
    }
    log = write_log(tmp_path / "log.parquet", 100)
    given = shlex.join([*OPTIONS, f"data.path={log}"])
    commands = [
        f"prepare {given} output=out-{number} {option}"
        for number, option in enumerate(message_by_option)
    ]
    for message, ended in zip(message_by_option.values(), run_all(tmp_path, commands), strict=True):
        assert ended.status == 2
        assert ended.stderr.splitlines()[-1].startswith(message)
        assert "Traceback" not in ended.stderr


def test_without_duckdb_the_extra_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.parquet", 100)
    (tmp_path / "duckdb.py").write_text("raise ImportError")
    ended = subprocess.run(
        [*(sys.executable, "-W", "ignore", "-m", "pipelines.prepare"), *OPTIONS]
        + [f"data.path={log}", f"output={tmp_path / 'out'}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "preparing a log needs the extra [prepare]: pip install" in ended.stderr
