"""Exact peak of the memory that torch allocates during a call, from the allocator's own records.

The resident size of the process does not say when memory was allocated nor what for, and the C
library keeps pages that torch has freed.
"""

from collections.abc import Callable
from itertools import accumulate

from torch.autograd.profiler import profile

MEMORY_EVENT = "[memory]"


def peak_allocated_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes allocated at any moment of a call, above what was allocated before it.

    Tensors that existed before and are freed by the call do not lower the count.

    Args:
        call: the call to measure; CPU tensors only.

    Example:
        >>> import torch
        >>> peak_allocated_bytes(lambda: torch.zeros(100).sum())  # 400 bytes and the sum's 4
        404
    """
    with profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.kineto_results.events() if e.name() == MEMORY_EVENT]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
