"""Thread and memory settings of a command's process, made before torch loads or computes.

OpenMP threads spin while they wait for each other. Beside another busy process a spinning thread
keeps the core that the awaited thread needs, so each of a step's hundreds of parallel regions costs
time slices: a hit of 8 ms took 830 ms. Sleeping threads cost a wake-up per region instead
(figures in docs/serving.md). libgomp spins less by itself only if this process has more threads
than cores; it does not count other processes.

glibc returns large freed blocks to the system, and a call of the model frees megabytes: the next
call then waits while the system clears each page again.

TorchScript compiles a program again for the first shapes of its inputs, which takes seconds and
makes no call on a CPU faster.
"""

import ctypes
import os

from torchrec_kvshare.commands.machine import granted_cores

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
ASLEEP = "PASSIVE"
# glibc's parameters by number: from what size a block gets a mapping of its own (at most 32 MiB),
# and how much free memory the end of a heap keeps.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
MALLOC_BYTES = {MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
# TorchScript specialises a program for no shape.
ANY_SHAPE = [("DYNAMIC", 0)]
MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has set their wait policy.

    Must be called before torch is imported, which reads the environment once.
    """
    if not {WAIT_POLICY, SPIN_COUNT} & os.environ.keys():
        os.environ[WAIT_POLICY] = ASLEEP


def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB of freed memory, unless the user has set its limits."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt") and not set(MALLOC_SETTINGS) & os.environ.keys():
        for parameter, num_bytes in MALLOC_BYTES.items():
            process.mallopt(parameter, num_bytes)


def prepare_torch(threads: int | None) -> None:
    """Set torch's threads, keep the memory of one call for the next, compile for any shape.

    Args:
        threads: torch's threads; None for the granted cores, or fewer if OpenMP's environment says
            so.
    """
    import torch  # Only after OpenMP's variables are set.

    keep_freed_memory()
    torch.set_num_threads(threads or min(torch.get_num_threads(), granted_cores()))
    torch.jit.set_fusion_strategy(ANY_SHAPE)
