"""Join the processes (ranks) that `torchrun` started, and exchange values between them."""

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
"""Maximum time that ranks wait for each other, for example while the main rank validates."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The `rank` of this process, and `size`, the number of ranks.

    If there is only one rank, the methods return at once, without communication.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main rank. Only the main rank writes, prints and validates."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks in place, and return them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: list[float]) -> list[float]:
        """Return the maximum over all ranks of each element of the list."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def from_main(self, find: Callable[[], T]) -> T:
        """Call `find` on the main rank only, and return its result on every rank."""
        results = [find() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(results, src=0)
        return cast(T, results[0])

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def require_same(self, text: str, what: str) -> None:
        """Raise `DriveSimError` on all ranks unless all ranks pass the same `text`.

        `what` describes the text in the message, for example "the settings".
        """
        if len(set(self.gather(text))) > 1:
            raise DriveSimError(
                f"rank {self.rank}: {what} differ between the ranks: start all ranks with the "
                "same command and access to the same files"
            )

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self.size > 1:
            dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a tensor over all ranks in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@contextmanager
def process_group(
    device: torch.device, patience: timedelta = PATIENCE
) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that `torchrun` started, if any. Yield the ranks and this rank's device.

    Ranks wait for each other for up to `patience`. A nested call uses the existing group. Raises
    `DriveSimError` if another rank has stopped, or if this rank has no device.
    """
    if rank_count() == 1:
        yield Ranks(), device
        return
    device = _own_device(device)
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
        return
    # With GPUs, gloo is also needed, because the ranks exchange a few numbers on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _lost_ranks():
        store, rank, size = next(rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # When `torchrun` restarts the ranks, this store still contains the addresses of the
            # dead ranks. The prefix keeps the new ranks from connecting to them.
            store = PrefixStore(f"attempt-{restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        all_leave = False
        try:
            yield Ranks(rank, size), device
            all_leave = True
        except Interrupted:
            all_leave = True
            raise
        finally:
            if all_leave:
                # Leave together: if this rank left while another still communicates with it, the
                # other rank could crash.
                dist.barrier()
                _release_tensors()
            # After an error on this rank, do not destroy an NCCL group: the other ranks may be in a
            # collective operation, and NCCL would wait for them.
            if all_leave or device.type != "cuda":
                dist.destroy_process_group()


def _release_tensors() -> None:
    """Wait until gloo has freed the tensor of a last collective, at most one second.

    By then, gloo's threads have usually freed the tensors of the collectives before it, too.

    Otherwise the process could abort at exit. A gloo thread needs the GIL to free a tensor. If the
    interpreter is already shutting down, Python ends the thread inside a C++ destructor, which
    aborts the process (https://github.com/pytorch/pytorch/pull/179291). `destroy_process_group`
    does not prevent this: the model still refers to the group, so the threads go on.
    """
    last = torch.zeros(1, device="cpu")
    dist.all_reduce(last)
    # The tensor stays alive until gloo's thread frees it. Sleeping gives the GIL to that thread.
    alive = weakref.ref(last)
    del last
    for _ in range(1000):
        time.sleep(0.001)
        if alive() is None:
            break


def _own_device(device: torch.device) -> torch.device:
    if device.type == "mps":
        raise DriveSimError("several ranks can use cuda or cpu, but not mps: pass `device=cpu`")
    if device.type != "cuda":
        return device
    if local_rank() >= torch.cuda.device_count():
        raise DriveSimError(
            f"rank {local_rank()} of this machine has no GPU of its own (number of GPUs: "
            f"{torch.cuda.device_count()}): lower --nproc-per-node, or pass `device=cpu`"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Gloo has no error class of its own and raises RuntimeError.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise DriveSimError(
            f"rank {os.environ['RANK']}: another rank has stopped or cannot be reached "
            f"({one_line(error)}); see the messages of the other ranks"
        ) from error
