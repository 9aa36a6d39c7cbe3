"""The processes that train one model together: started by ``torchrun``, or one process alone.

One process is a world of size 1: the same engine, without a network.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torchrec.distributed.comm import get_local_size

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        world_size: number of processes.
        local_world_size: number of them on this machine.
        device: where its tensors are.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Collect one object from each rank, in the order of ranks; every rank gets them all."""
        gathered = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


ALONE = Ranks(0, 1, 1, torch.device("cpu"))


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or be the only one, to the end of the block.

    Args:
        device: ``cpu``, or ``cuda`` with one GPU for each process of a machine.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    is_launched = dist.is_torchelastic_launched()
    is_joined = dist.is_initialized()  # The caller has a group of its own.
    if not is_joined and is_launched:
        dist.init_process_group(backend)
    elif not is_joined:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    local_world_size = get_local_size() if is_launched else world_size
    ranks = Ranks(dist.get_rank(), world_size, local_world_size, device)
    try:
        yield ranks
        # A rank that ends while others still talk to it aborts in gloo's threads.
        ranks.wait()
        gc.collect()  # Sharded modules hold groups of their own.
    finally:
        if not is_joined:
            dist.destroy_process_group()
