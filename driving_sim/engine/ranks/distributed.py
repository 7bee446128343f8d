"""The processes that `torchrun` started, and the little that they tell each other."""

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from driving_sim.engine.errors import DriveSimError, Interrupted
from driving_sim.engine.parsing import one_line
from driving_sim.engine.torchrun import local_rank, rank_count, restarts

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: one validates while the others do nothing."""


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

    def from_main(self, find: Callable[[], T]) -> T:
        """What the main rank finds, on every rank; the others do not look for themselves."""
        found = [find() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0)
        return cast(T, found[0])

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def require_same(self, text: str, what: str) -> None:
        """Raise `DriveSimError` on all ranks unless all give the same text."""
        if len(set(self.gather(text))) > 1:
            raise DriveSimError(
                f"rank {self.rank}: {what} differ between the ranks: start all of them with the "
                "same command, with the same files in reach"
            )

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, for losses that need it; `values` is overwritten."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@contextmanager
def process_group(
    device: torch.device, patience: timedelta = PATIENCE
) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that `torchrun` started, if it did; yield them and this rank's own device.

    They wait for each other up to `patience`. Within another one it is that one. Raises
    `DriveSimError` where another rank is gone, or this one has no device.
    """
    if rank_count() == 1:
        yield Ranks(), device
        return
    device = _own_device(device)
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
        return
    # gloo beside nccl: the ranks also exchange a few numbers that live on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _lost_ranks():
        store, rank, size = next(rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # `torchrun` keeps this store when it restarts the ranks, and with it the addresses of
            # the dead ones, which the new ones would call.
            store = PrefixStore(f"attempt-{restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        alike = False
        try:
            yield Ranks(rank, size), device
            alike = True
        except Interrupted:
            alike = True
            raise
        finally:
            if alike:
                # One that leaves while another talks to it can be brought down by its threads.
                dist.barrier()
                _release_tensors()
            # Else the others may be in a collective: NCCL would wait for them before it lets go.
            if alike or device.type != "cuda":
                dist.destroy_process_group()


def _release_tensors() -> None:
    """Wait, for a second at most, until gloo's threads have let go of the tensors that they sent.

    `destroy_process_group` does not end these threads while the model holds the group. They free
    the tensors of a collective after it is over, and need the GIL for that. If the interpreter is
    on its way out by then, Python ends the thread inside a C++ destructor, and that aborts the
    process (https://github.com/pytorch/pytorch/issues/190489).
    """
    last = torch.zeros(1, device="cpu")
    dist.all_reduce(last)
    # Python's object lives as long as gloo holds the tensor. Each sleep leaves the GIL to the
    # threads: to the one that had this tensor, and to others with tensors from before.
    alive = weakref.ref(last)
    del last
    for _ in range(1000):
        time.sleep(0.001)
        if alive() is None:
            break


def _own_device(device: torch.device) -> torch.device:
    if device.type == "mps":
        raise DriveSimError("several ranks work on cuda or cpu, not on mps: pass `device=cpu`")
    if device.type != "cuda":
        return device
    if local_rank() >= torch.cuda.device_count():
        raise DriveSimError(
            f"rank {local_rank()} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}: lower --nproc-per-node, or pass `device=cpu`"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise DriveSimError(
            f"rank {os.environ['RANK']}: another rank is gone (it says why itself), or cannot "
            f"be reached ({one_line(error)})"
        ) from error
