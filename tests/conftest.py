"""What every test process needs once: a quiet torchrec, one thread, and hypothesis' profiles."""

import os
import warnings

import torch
from hypothesis import HealthCheck, settings

# fbgemm warns of its own modules while torchrec imports them, and torchmetrics of setuptools'. The
# suite makes warnings errors, so the imports happen here, before any test file or doctest asks.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import torchmetrics  # noqa: F401
    import torchrec  # noqa: F401

# Two xdist workers share the machine's two cores.
torch.set_num_threads(1)

# The options are spelled out because hypothesis changes its defaults where CI is set.
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
