"""A miss against a hit in a process without Python: the C++ host and its program's own cache.

The host is ``examples/cpp`` of a checkout, compiled first. Each user asks twice with the same
history; the host reports how long each call of the program took, and the status of its cache.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import fbgemm_gpu
import torch

import torchrec_kvshare
from torchrec_kvshare.benchmark.options import ModelSizes, TimedOptions
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.workload import make_dlrm, make_schema
from torchrec_kvshare.cache.reasons import HIT, MISS
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.schema import USER
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel

HOST = "host"
SOURCES = Path(torchrec_kvshare.__file__).parents[1] / "examples" / "cpp"

Raw = dict[str, Any]


@dataclass
class HostOptions(TimedOptions, ModelSizes):
    """Options of ``scenario=host``."""

    long_histories: list[int] = field(default_factory=lambda: [1000, 4096])  # events
    candidates: list[int] = field(default_factory=lambda: [100, 500])
    repeats: int = 15  # users of each case


def measure_host(options: HostOptions) -> list[Record]:
    """Measure the latency of a miss and of a hit in the C++ host, one request per call.

    Returns:
        Records of ``latency_ms``, and of ``hit`` its ``speedup_vs_miss``.

    Raises:
        ConfigError: if the sources are missing or cannot be compiled.
    """
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        host = build_host(Path(name) / "host")
        for history in options.long_histories:
            folder = Path(name) / str(history)
            schema = make_schema(history, num_users=options.repeats)
            model = RankingModel(make_dlrm(schema, options, options.seed)).eval()
            export_model(model, schema, folder)
            for num_candidates in options.candidates:
                raws = [
                    draw_raw_request(schema, history, num_candidates, options.seed + user)
                    | {USER: user}
                    for user in range(options.repeats)
                ]
                latency_ms = _latencies(host, folder, raws)
                case: Case = options.case(CAUSAL) | {"tier": "pages"}
                case |= {"history": history, "candidates": num_candidates}
                records += [
                    Record(HOST, case | {"path": path}, "latency_ms", value, unit="ms")
                    for path, value in latency_ms.items()
                ]
                speedup = latency_ms[MISS] / latency_ms[HIT]
                records.append(
                    Record(HOST, case | {"path": HIT}, "speedup_vs_miss", speedup, unit="x")
                )
    return records


def build_host(folder: Path) -> Path:
    """Compile the host against the torch and fbgemm of this process.

    Args:
        folder: the build folder.

    Returns:
        The program.

    Raises:
        ConfigError: if the sources are missing or cannot be compiled.
    """
    if not SOURCES.is_dir():
        raise ConfigError(f"{SOURCES} is missing; the C++ host is built in a checkout only")
    configure = [
        *("cmake", "-S", str(SOURCES), "-B", str(folder)),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
        f"-DFBGEMM_FOLDER={Path(fbgemm_gpu.__file__).parent}",
        "-DCMAKE_CXX_FLAGS=-Werror",
    ]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"the C++ host cannot be built: {done.stdout}{done.stderr}")
    return folder / "kvshare_host"


def _latencies(host: Path, artifact: Path, raws: Sequence[Raw]) -> dict[str, float]:
    """Return the median milliseconds of users' first and second requests."""
    paths = [artifact.parent / name for name in ("requests.jsonl", "answers.jsonl", "times.json")]
    requests, answers, times = paths
    requests.write_text("".join(json.dumps(raw) + "\n" for raw in raws for _ in (MISS, HIT)))
    threads = str(torch.get_num_threads())
    subprocess.run(
        [host, artifact, requests, answers, "--threads", threads, "--times", times], check=True
    )
    statuses = [json.loads(line)["cache"]["status"] for line in answers.read_text().splitlines()]
    assert statuses == [MISS, HIT] * len(raws)
    latencies_ms = json.loads(times.read_text())
    return {MISS: median(latencies_ms[::2]), HIT: median(latencies_ms[1::2])}
