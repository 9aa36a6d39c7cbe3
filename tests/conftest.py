"""Setup of every test process: quiet imports, one thread, hypothesis profiles, order, models."""

import gc
import os
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest

# For the processes that tests start: their waiting threads would spin on the cores that the other
# worker needs, and a test of 10 s took 67 s. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The code around a compiled graph's loops, which only calls them, takes longest to compile.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import torch
from hypothesis import HealthCheck, settings

# Importing torchrec (fbgemm) and torchmetrics (setuptools) raises DeprecationWarnings. The
# suite turns warnings into errors, so both are imported here, before any test file or doctest.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import torchmetrics  # noqa: F401
    import torchrec  # noqa: F401
    from torchrec.models.dlrm import DLRM

from tests.worlds import make_dlrm
from torchrec_kvshare.commands.process import ANY_SHAPE
from torchrec_kvshare.model.ranking import RankingModel

# Two xdist workers share the machine's two cores.
torch.set_num_threads(1)
# As commands and the C++ host do.
torch.jit.set_fusion_strategy(ANY_SHAPE)

# All options are given, because hypothesis changes its defaults if the variable CI is set.
settings.register_profile(
    "suite",
    parent=settings.get_profile("default"),
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # A busy machine is not a slow strategy.
)
settings.register_profile("soak", parent=settings.get_profile("suite"), max_examples=2000)
settings.load_profile("soak" if os.environ.get("KVSHARE_SOAK") == "1" else "suite")

# Workers take whole files. These take longest and start first: one that started last would run
# alone while the other worker waits.
LONGEST_FILES = (
    "pipelines/test_cpp.py",
    "export/test_pt2.py",
    "training/test_ranks.py",
    "training/test_loop.py",
    "pipelines/test_wheel.py",
    "serving/test_footprint.py",
    "data/test_prepare.py",
    "deploy/test_nginx.py",
    "export/test_program.py",
    "serving/test_forget.py",
    "serving/test_page.py",
    "model/test_quantised.py",
    "attention/test_operators_memory.py",
    "deploy/test_cluster.py",
    "pipelines/test_commands.py",
    "pipelines/test_score_dataset.py",
    "pipelines/test_score.py",
    "pipelines/test_advise.py",
    "benchmark/test_load.py",
    "pipelines/test_plan.py",
    "cache/test_remote.py",
    "attention/test_operators.py",
    "cache/test_faults.py",
    "data/test_prepare_process.py",
    "pipelines/test_train_export.py",
    "pipelines/test_process.py",
    "benchmark/test_scenarios.py",
    "training/test_checkpoints.py",
    "benchmark/test_serving.py",
    "export/test_predict.py",
    "export/test_exporter.py",
    "history/test_encoders.py",
    "serving/test_limits.py",
    "verify/test_deterministic.py",
    "training/test_managed.py",
    "training/test_prepared.py",
    "data/test_presets.py",
    "pipelines/test_configs.py",
    "serving/test_soak.py",
    "training/test_memory.py",
    "training/test_sharding.py",
    "serving/test_service.py",
    "serving/test_hostile.py",
)
RANK_BY_FILE = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FILES)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others keep their order."""
    items.sort(key=lambda item: RANK_BY_FILE.get(item.path, len(RANK_BY_FILE)))


def pytest_collection_finish() -> None:
    """Exempt what is never freed, 640,000 objects, from each garbage collection of the tests."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Optimise TorchScript programs only in tests marked ``optimised``, and in other processes.

    Optimising takes four fifths of an export. The marked tests compare what programs compute.
    """
    with torch.jit.optimized_execution(item.get_closest_marker("optimised") is not None):
        return (yield)


@pytest.fixture(scope="session")
def dlrm() -> DLRM:
    """A model that tests read and never change."""
    return make_dlrm(seed=3)


@pytest.fixture(scope="session")
def ranking_model(dlrm: DLRM) -> RankingModel:
    """The same model as functions of tensors."""
    return RankingModel(dlrm).eval()
