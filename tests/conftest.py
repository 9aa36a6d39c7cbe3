"""Setup of every test process: quiet imports, one thread, hypothesis profiles, shared models."""

import os
import warnings

import pytest

# For the processes that tests start: their waiting threads would spin on the cores that the other
# worker needs, and a test of 10 s took 67 s. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
from torchrec_kvshare.model.ranking import RankingModel

# Two xdist workers share the machine's two cores.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def dlrm() -> DLRM:
    """A model that tests read and never change."""
    return make_dlrm(seed=3)


@pytest.fixture(scope="session")
def ranking_model(dlrm: DLRM) -> RankingModel:
    """The same model as functions of tensors."""
    return RankingModel(dlrm).eval()
