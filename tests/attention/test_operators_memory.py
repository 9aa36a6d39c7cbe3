"""The C++ operators read and write their arguments and nothing else.

Their arguments are in cases.py. They are run twice: against the reference in test_operators.py, and
here in a process under AddressSanitizer and UndefinedBehaviorSanitizer on a library compiled for
these.
"""

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

from tests.attention.cases import OPERATORS, call, huge_arguments
from tests.worlds import ROOT, new_interpreter
from torchrec_kvshare.attention.library import register_operators


@pytest.mark.parametrize("operator", OPERATORS)
def test_sizes_that_overflow_are_an_error(operator: str) -> None:
    """64 times a width was 0 bytes."""
    assert register_operators()
    for arguments, message in huge_arguments(operator):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call(operator, arguments)


# All of it again under sanitizers.

# Draws for each operator, and the CPU capabilities it is compiled for.
IS_SOAK = os.environ.get("KVSHARE_SOAK") == "1"
NUM_DRAWS = 300 if IS_SOAK else 20
CAPABILITIES = (
    ["DEFAULT", "AVX2", "AVX512"] if IS_SOAK else [torch.backends.cpu.get_cpu_capability()]
)
COMPILER = "g++"
FLAGS_BY_CAPABILITY = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
}
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PROGRAM = """
import sys, torch
from tests.attention import cases as attention_cases
torch.set_num_threads(2)
torch.ops.load_library(sys.argv[1])
exec(sys.argv[2])
"""


@pytest.fixture(scope="module", params=CAPABILITIES)
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("sanitized") / "operators.so"
    torch_folder, compiled = Path(torch.__file__).parent, library.with_suffix(".o")
    source = ROOT / "torchrec_kvshare" / "attention" / "operators.cpp"
    flags = ("-std=c++20", "-fPIC", "-fopenmp", *FLAGS_BY_CAPABILITY.get(request.param, ()))
    compiling = (*flags, *SANITIZERS, "-c", source, f"-I{torch_folder}/include", "-o", compiled)
    # Linked without OpenMP: a second runtime would compete with torch's own for the cores.
    libraries = (f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10")
    linking = ("-shared", *SANITIZERS, compiled, *libraries, "-o", library)
    for arguments in (compiling, linking):
        subprocess.run([COMPILER, *map(str, arguments)], check=True)
    return library


def run_sanitized(library: Path, statement: str) -> tuple[int, str]:
    """Run a statement in a process under the sanitizers; return exit status and standard error."""
    runtimes = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    process = new_interpreter(
        PROGRAM,
        *(str(library), statement),
        LD_PRELOAD=" ".join(runtimes),
        # Python itself leaks at exit; allocations that are too large fail as without a sanitizer.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )
    _, errors = process.communicate()
    return process.returncode, errors


def test_the_sanitizers_find_nothing(sanitized: Path) -> None:
    seed = random.randrange(2**31)
    status, errors = run_sanitized(sanitized, f"attention_cases.run_all({seed}, {NUM_DRAWS})")
    assert status == 0, f"seed {seed}: {errors}"


ROWS = """
for num_rows, depth, num_columns in (
    (1, 1, 1), (9, 7, 33), (130, 64, 70), (64, 3, 32), (0, 5, 3), (4, 0, 3), (5, 3, 0)
):
    for groups in (0, 1, 3):
        rows, weight = torch.randn(groups, num_rows, depth), torch.randn(groups, num_columns, depth)
        got = torch.ops.torchrec_kvshare.rows_linear(rows, weight, torch.zeros(num_columns))
        torch.testing.assert_close(got, rows.bmm(weight.transpose(1, 2)))
"""


def test_the_sanitizers_find_nothing_in_rows_of_a_linear_layer(sanitized: Path) -> None:
    status, errors = run_sanitized(sanitized, ROWS)
    assert status == 0, errors


def test_the_sanitizers_would_find_a_read_outside(sanitized: Path) -> None:
    """Otherwise the tests above prove nothing."""
    keys_freed = (
        "arguments = attention_cases.example('candidate_attention')\n"
        "arguments['keys'].untyped_storage().resize_(64)\n"
        "attention_cases.call('candidate_attention', arguments)"
    )
    status, errors = run_sanitized(sanitized, keys_freed)
    assert status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in errors
