"""The processes that `torchrun` started, and the little that they tell each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# One rank validates while the others wait for it.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all of them; alone, nothing is communicated."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and validates."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks; `values` is overwritten."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: list[float]) -> list[float]:
        """The largest over ranks of each number."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def from_main(self, values: list[float]) -> list[float]:
        """The main rank's numbers, on every rank."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.tolist()


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that `torchrun` started, if it did; yield them and this rank's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # gloo beside nccl: the ranks also exchange a few numbers that live on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
        # A rank that leaves while another still talks to it can be brought down by its threads.
        dist.barrier()
    finally:
        dist.destroy_process_group()
