"""Scoring a batch takes at most the memory computed at startup, and not much less."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from tests.worlds import new_interpreter
from torchrec_kvshare.benchmark.workload import fill_zeros, make_schema
from torchrec_kvshare.cache.open import MEMORY, OFF
from torchrec_kvshare.config import CacheConfig, ServerConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.artifact import read_artifact
from torchrec_kvshare.export.exporter import PT2, TORCHSCRIPT, export_model
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.serving.footprint import batch_bytes, check_memory
from torchrec_kvshare.serving.scheduler import BatchLimits

EAGER = "eager"
HISTORY, REQUESTS, CANDIDATES, IDS = 512, 16, 4096, 150_000
SCHEMA = make_schema(HISTORY, num_users=4, block=64)
SPEC = TowerSpec(CAUSAL, 48, 2, 4, token_dim=32, output_dim=64)
LIMITS = BatchLimits(REQUESTS, CANDIDATES, events=8192, ids=IDS, max_wait_s=0.0)
# Ratio to the measured bytes: 2.4, and 8.2 for graphs, in which the rows of a bag are never
# together. Beyond twice that the figure has nothing to do with the batch.
MAX_RATIO = {EAGER: 6.0, TORCHSCRIPT: 6.0, PT2: 20.0}

# The worst batches within the limits: many requests of which one is long, or one full of ids.
PROGRAM = """
import ctypes
import sys
from pathlib import Path
import torch
from tests.serving.test_footprint import *
from torchrec_kvshare.commands.process import prepare_torch
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.features.parse import parse_request

folder, ids = sys.argv[1], int(sys.argv[2])
prepare_torch(1)
if folder == EAGER:
    engine = Engine(new_model(), SCHEMA, None)
else:
    artifact = load_artifact(Path(folder))
    engine = Engine(artifact.model, SCHEMA, None, version=artifact.manifest.version)

def drawn(user, events, candidates, ids):
    raw = draw_raw_request(SCHEMA, events, candidates, user) | {"user_id": user}
    raw["history"]["category"] = [["3"] * (ids // events)] * events
    raw["candidates"]["category"] = [["3"] * (ids // candidates)] * candidates
    return raw

def of_status(key):
    [line] = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) * 2**10

long = LIMITS.part_candidates
raws = [drawn(0, HISTORY, long, ids)]
if not ids:
    raws += [drawn(n, HISTORY, (CANDIDATES - long) // 15, 0) for n in range(1, REQUESTS)]
for _ in range(3):
    engine.rank([parse_request(drawn(9, 9, 5, 0), SCHEMA)])
ctypes.CDLL(None).malloc_trim(0)  # Memory freed after loading would hide the batch.
Path("/proc/self/clear_refs").write_text("5")  # The high-water mark begins anew.
before = of_status("VmRSS")
engine.rank([parse_request(raw, SCHEMA) for raw in raws])
print(of_status("VmHWM") - before)
"""


def new_model() -> RankingModel:
    return RankingModel(fill_zeros(dlrm_with_history(SCHEMA, SPEC, [48, 1]))).eval()


@lru_cache
def exported(folder: Path, runtime: str) -> Path:
    export_model(new_model(), SCHEMA, folder / runtime, runtime=runtime)
    return folder / runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("footprint")


@pytest.mark.parametrize("ids", [0, IDS])
@pytest.mark.parametrize("runtime", [EAGER, TORCHSCRIPT, PT2])
def test_the_worst_batch_takes_at_most_the_computed_bytes_and_not_much_less(
    folder: Path, runtime: str, ids: int
) -> None:
    artifact = exported(folder, TORCHSCRIPT if runtime == EAGER else runtime)
    of_process = EAGER if runtime == EAGER else str(artifact)
    output, errors = new_interpreter(
        PROGRAM, of_process, str(ids), OMP_WAIT_POLICY="PASSIVE"
    ).communicate()
    measured = int(output or 0)
    assert measured > 2**23, errors
    computed = batch_bytes(read_artifact(artifact)[0], SCHEMA, replace(LIMITS, ids=ids))
    assert measured <= computed <= MAX_RATIO[runtime] * measured


def test_a_server_without_enough_memory_does_not_start() -> None:
    cache, server = CacheConfig(name=MEMORY, capacity_bytes=1000), ServerConfig(hot_bytes=100)
    check_memory(cache, replace(server, memory_bytes=1111), 10, 1)
    with pytest.raises(ConfigError, match=r"1112 bytes .*11 resident, 1000 .* 100 .* and 1111 are"):
        check_memory(cache, replace(server, memory_bytes=1111), 11, 1)
    check_memory(replace(cache, name=OFF), replace(server, memory_bytes=112), 11, 1)
    with pytest.raises(ConfigError, match="are granted"):
        check_memory(cache, server, 2**60, 1)


def test_the_memory_that_a_server_takes_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    check_memory(CacheConfig(name=OFF), ServerConfig(memory_bytes=2**40), 10, 1)
    assert f"memory: at most {11 + ServerConfig().hot_bytes} of {2**40} bytes" in caplog.text


def test_the_figure_grows_with_the_limits_of_a_batch(folder: Path) -> None:
    manifest, _ = read_artifact(exported(folder, TORCHSCRIPT))
    computed = batch_bytes(manifest, SCHEMA, LIMITS)
    for larger in ({"requests": 32}, {"candidates": 8192}, {"ids": 200_000}):
        assert batch_bytes(manifest, SCHEMA, replace(LIMITS, **larger)) > computed
