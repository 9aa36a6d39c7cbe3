"""How a command's process computes: set before torch is loaded, or before anything is computed.

OpenMP's threads wait for each other in a loop. Beside a busy neighbour that loop keeps the core
which the awaited thread needs, so each of a step's hundreds of regions costs time slices: a hit of
8 ms took 830. Asleep they cost a wake-up for each region, which docs/serving.md has in figures.
libgomp spins less by itself only where this process has more threads than cores; it counts no
neighbours.

glibc gives large blocks back to the system when they are freed, and a call of the model frees
megabytes: the next one then waits for the system to clear each page of them again.
"""

import ctypes
import os

from torchrec_kvshare.commands.machine import granted_cores

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
ASLEEP = "PASSIVE"
# glibc's parameters by number: of what size on a block is mapped by itself, at most 32 MiB, and
# how much free memory at a heap's end is kept.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
MALLOC_BYTES = {MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def share_cores() -> None:
    """Let OpenMP's threads wait asleep; only before torch is imported, which reads it once.

    What the user has set stays.
    """
    if not {WAIT_POLICY, SPIN_COUNT} & os.environ.keys():
        os.environ[WAIT_POLICY] = ASLEEP


def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB of freed memory; what the user has set stays."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt") and not set(MALLOC_SETTINGS) & os.environ.keys():
        for parameter, num_bytes in MALLOC_BYTES.items():
            process.mallopt(parameter, num_bytes)


def prepare_torch(threads: int | None) -> None:
    """Compute with so many threads, and keep the memory of one call for the next.

    Args:
        threads: of torch; None for as many as the process is granted cores, or fewer if the user
            told OpenMP so.
    """
    import torch  # Not before OpenMP's variables are set.

    keep_freed_memory()
    torch.set_num_threads(threads or min(torch.get_num_threads(), granted_cores()))
