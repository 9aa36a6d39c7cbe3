"""Thread and memory settings of a command's process, made before torch loads or computes.

OpenMP threads spin while they wait for each other. Beside another busy process a spinning thread
keeps the core that the awaited thread needs, so each of a step's hundreds of parallel regions costs
time slices: a hit of 8 ms took 830 ms. Sleeping threads cost a wake-up per region instead
(figures in docs/serving.md). libgomp spins less by itself only if this process has more threads
than cores; it does not count other processes.

glibc returns large freed blocks to the system, and a call of the model frees megabytes, a training
step gigabytes: the next one then waits while the system clears each page again.

TorchScript compiles a program again for the first shapes of its inputs, which takes seconds and
makes no call on a CPU faster.
"""

import ctypes
import os
from collections.abc import Mapping

from torchrec_kvshare.commands.machine import granted_cores

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
ASLEEP = "PASSIVE"
# glibc's parameters by number: from what size a block gets a mapping of its own (at most 32 MiB),
# how many blocks may have one, and how much free memory the end of a heap keeps.
MMAP_THRESHOLD, MMAP_MAX, TRIM_THRESHOLD = -3, -4, -1
CALL_MEMORY = {MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
# Logits and their gradients in a step of 4,096 targets have blocks of up to 100 MB.
STEP_MEMORY = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**30}
# TorchScript specialises a program for no shape.
ANY_SHAPE = [("DYNAMIC", 0)]
MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has set their wait policy.

    Must be called before torch is imported, which reads the environment once.
    """
    if not {WAIT_POLICY, SPIN_COUNT} & os.environ.keys():
        os.environ[WAIT_POLICY] = ASLEEP


def keep_freed_memory(settings: Mapping[int, int]) -> None:
    """Let malloc keep freed memory, unless the user has set its limits.

    Args:
        settings: values of glibc's parameters.
    """
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt") and not set(MALLOC_SETTINGS) & os.environ.keys():
        for parameter, value in settings.items():
            process.mallopt(parameter, value)


def prepare_torch(threads: int | None) -> None:
    """Set torch's threads, keep the memory of one call for the next, compile for any shape.

    Args:
        threads: torch's threads; None for the granted cores, or fewer if OpenMP's environment says
            so.
    """
    import torch  # Only after OpenMP's variables are set.

    keep_freed_memory(CALL_MEMORY)
    torch.set_num_threads(threads or min(torch.get_num_threads(), granted_cores()))
    torch.jit.set_fusion_strategy(ANY_SHAPE)
