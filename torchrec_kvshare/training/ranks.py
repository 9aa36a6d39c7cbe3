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

from torchrec_kvshare.config import AUTO, CPU, CUDA
from torchrec_kvshare.errors import ConfigError

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
            on_device = values.to(self.device)  # NCCL adds up nothing that is elsewhere.
            dist.all_reduce(on_device)
            values.copy_(on_device)
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


def device_of(name: str) -> torch.device:
    """Return the device that this process trains on.

    Args:
        name: ``auto``, ``cpu`` or ``cuda``; ``auto`` is ``cuda`` where there is a GPU.

    Raises:
        ConfigError: if it is ``cuda`` and there is no GPU for this process.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == CPU or (name == AUTO and not num_gpus):
        return torch.device(CPU)
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    if local_rank >= num_gpus:
        raise ConfigError(
            f"device is {name}, one GPU for each process; process {local_rank} of this machine "
            f"finds {num_gpus} that torch can use: device={CPU} is allowed"
        )
    return torch.device(CUDA, local_rank)


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or be the only one, to the end of the block.

    Args:
        device: as ``device_of`` returns it.
    """
    if device.type == CUDA:
        torch.cuda.set_device(device)  # NCCL's objects and barriers go through the current one.
    backend = "nccl" if device.type == CUDA else "gloo"
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
