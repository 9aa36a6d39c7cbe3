"""Settings of a command's process: waiting threads, number of threads, freed memory."""

import pytest

from tests.worlds import new_interpreter
from torchrec_kvshare.commands.process import SPIN_COUNT, WAIT_POLICY

# libgomp prints the settings it has read when torch loads it.
VERBOSE = {"OMP_DISPLAY_ENV": "verbose"}
IN_A_CHECKOUT = "import pipelines.serve"
INSTALLED = """
import sys
from torchrec_kvshare.commands.run import kvshare
assert "torch" not in sys.modules
sys.argv = ["kvshare", "score", "artifact=nowhere", "requests=none", "output=none"]
kvshare()
"""


@pytest.mark.parametrize(
    ("program", "given", "spins"),
    [
        (IN_A_CHECKOUT, {}, "0"),
        (INSTALLED, {}, "0"),
        (IN_A_CHECKOUT, {SPIN_COUNT: "77"}, "77"),
        (INSTALLED, {WAIT_POLICY: "active"}, "30000000000"),
    ],
)
def test_waiting_threads_of_a_command_sleep_unless_the_user_has_set_it(
    program: str, given: dict[str, str], spins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a busy process spinning threads made a training step take 1.61 s instead of 0.07 s."""
    monkeypatch.delenv(WAIT_POLICY, raising=False)
    _, errors = new_interpreter(program, **VERBOSE, **given).communicate()
    assert f"GOMP_SPINCOUNT = '{spins}'" in errors


@pytest.mark.parametrize(("threads", "computing"), [("None", 1), ("3", 3)])
def test_a_command_computes_with_as_many_threads_as_it_is_granted_cores(
    threads: str, computing: int
) -> None:
    program = f"""
import os
import torch
from torchrec_kvshare.commands.process import prepare_torch
torch.set_num_threads(2)
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
prepare_torch({threads})
print(torch.get_num_threads())
"""
    output, errors = new_interpreter(program).communicate()
    assert output == f"{computing}\n", errors


def test_a_number_of_threads_set_for_openmp_is_kept() -> None:
    program = """
from torchrec_kvshare.commands.process import prepare_torch
prepare_torch(None)
import torch
print(torch.get_num_threads())
"""
    output, errors = new_interpreter(program, OMP_NUM_THREADS="1").communicate()
    assert output == "1\n", errors


@pytest.mark.parametrize(
    ("given", "is_kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)]
)
def test_freed_memory_is_kept_unless_the_user_has_set_a_limit(
    given: dict[str, str], is_kept: bool
) -> None:
    """Each call of a model waited for pages that the call before had returned to the system."""
    program = """
from torchrec_kvshare.commands.process import prepare_torch
prepare_torch(1)
import resource
import torch
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(4 * 2**20)
before = page_faults()
for _ in range(10):
    torch.ones(4 * 2**20)
print(page_faults() - before)
"""
    output, errors = new_interpreter(program, **given).communicate()
    num_pages = 10 * 4 * 2**22 // 4096
    # A tensor or two of the ten may lie elsewhere.
    assert (int(output) < num_pages / 2) == is_kept, errors
