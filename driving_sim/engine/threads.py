"""Use only the cores that other programs leave free, and tune memory use.

OpenMP threads wait for each other by spinning. If another program occupies the core of one thread,
all other threads spin until that thread runs again, which happens thousands of times a second. Two
threads can then be slower than one. So commands measure a few times a second how many cores other
programs use, and compute on the remaining cores.

The number of threads changes the last bits of what torch computes. This affects the weights of a
training run. In float32, it can also change tokens and pixels whose values are on a rounding
boundary. It does not affect the C++ kernels of `driving_sim.world_model.kernels`, which compute the
same tokens with any number of threads.
"""

import ctypes
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from driving_sim.engine.progress import say

if TYPE_CHECKING:
    import psutil
    import torch

COUNT_SECONDS = 0.3
"""Minimum time in seconds between two measurements of the cores that other programs use."""
MARGIN = 0.6
"""Tolerated difference between the number of free cores and the number of threads. Only a larger
difference changes the number of threads, so small fluctuations of the load do not."""
LEAST_OWN = 0.3
"""Minimum load of this process, in cores. Measurements with a lower load are ignored."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # constants from glibc's malloc.h
_NEW_OBJECTS = 10_000  # net allocations that trigger a garbage collection; the default is 700


def leave_busy_cores() -> None:
    """Enable `adjust_threads`, which leaves busy cores to other programs.

    This affects the whole process, so only commands call it, not the library. It has no effect if
    OMP_NUM_THREADS is set.
    """
    global _leaves_cores
    _leaves_cores = "OMP_NUM_THREADS" not in os.environ


def adjust_threads(device: "torch.device") -> None:
    """Set the number of torch threads to the cores that other programs leave free.

    Call this before work on a CPU. It does nothing on other devices, without an earlier call of
    `leave_busy_cores`, or if the last measurement was less than `COUNT_SECONDS` ago.
    """
    global _counter
    if not _leaves_cores or device.type != "cpu":
        return
    if _counter is None:
        _counter = _Counter()
    _counter.adjust()


def spare_cores(count: int) -> None:
    """Compute with `count` threads fewer than usual from now on, but with at least one.

    Call this in the thread that computes, because torch counts its threads for each. Without an
    earlier call of `leave_busy_cores`, it does nothing.
    """
    global _spared
    _spared = count
    if _counter is not None:
        _counter.spare()


@contextmanager
def fixed_threads(count: int | None) -> Iterator[None]:
    """Make torch compute with exactly `count` threads in this context. None changes nothing."""
    global _leaves_cores
    if count is None:
        yield
        return
    import torch

    leaves, before = _leaves_cores, torch.get_num_threads()
    _leaves_cores = False
    torch.set_num_threads(count)
    try:
        yield
    finally:
        _leaves_cores = leaves
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations instead of returning it to the system.

    By default, glibc returns the memory of large tensors. The system then has to find and clear
    new pages in every step (https://man7.org/linux/man-pages/man3/mallopt.3.html). This affects the
    whole process, so only commands call it, not the library. It does nothing with other C
    libraries, or if environment variables already configure the allocator.
    """
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def collect_rarely() -> None:
    """Make Python run its cyclic garbage collector less often than by default.

    By default, the collector runs hundreds of times while a command imports its modules, and takes
    a tenth of that time. With this setting, reference cycles are freed later. This affects the
    whole process, so only commands call it, not the library.
    """
    gc.set_threshold(_NEW_OBJECTS)


def usable_cores() -> int:
    """Return the number of cores that this process may use by its CPU affinity and cgroup quota."""
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, int(min(len(_affinity()), quota)))


def cgroup_quota(membership: Path, mounted: Path) -> float:
    """Return the number of cores that a cgroup may use. `docker run --cpus` sets such a limit.

    `membership` is a file that names the cgroup of a process, as /proc/self/cgroup does. `mounted`
    is the folder where the cgroup v2 file system is mounted. The limits of parent cgroups count
    too. Without any limit the result is infinity.
    """
    lines = membership.read_text("utf-8").splitlines() if membership.exists() else []
    own = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    quota = float("inf")
    for group in (mounted / own, *(mounted / own).parents):
        limit = group / "cpu.max"
        if group.is_relative_to(mounted) and limit.exists():
            allowed, period = limit.read_text("utf-8").split()
            quota = min(quota, float("inf") if allowed == "max" else int(allowed) / int(period))
    return quota


def threads_beside(others: float, *, cores: int, threads: int, most: int) -> int:
    """Return the number of threads to use, between 1 and `most`.

    `cores` is the number of cores that this process may use. Other programs currently occupy
    `others` of them. `threads` is the current number of threads.
    """
    free = cores - others
    return min(most, threads if abs(free - threads) <= MARGIN else max(1, round(free)))


_leaves_cores = False
_spared = 0
_counter: "_Counter | None" = None


class _Count(NamedTuple):
    """Processor time used up to a point in time, in seconds."""

    at: float
    """The point in time, in seconds of the monotonic clock."""
    busy: float
    """Time used by all programs on the cores that this process may use."""
    own: float
    """Time used by this process."""

    @classmethod
    def now(cls, cores: list[int]) -> Self:
        # Import psutil here: importing it takes 20 ms, and `--help` must not wait for it.
        import psutil

        all_cores = psutil.cpu_times(percpu=True)
        # In a container, `all_cores` may contain only the container's own cores, numbered from 0.
        # Then count all of them.
        chosen = [all_cores[core] for core in cores] if cores[-1] < len(all_cores) else all_cores
        busy = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in chosen)
        return cls(time.monotonic(), busy, time.process_time())


class _Counter:
    """Measures the load of other programs, and sets the number of threads accordingly."""

    def __init__(self) -> None:
        import torch

        self.cores = _affinity()
        self.limit = min(torch.get_num_threads(), usable_cores())
        self.spare()
        self.children: dict[psutil.Process, float] = {}  # processor seconds of each child process
        self.last = _Count.now(self.cores)
        self.said = False

    def spare(self) -> None:
        """Compute with as many threads as `spare_cores` leaves."""
        import torch

        self.most = max(1, self.limit - _spared)
        torch.set_num_threads(self.most)

    def adjust(self) -> None:
        if time.monotonic() - self.last.at < COUNT_SECONDS:
            return
        import psutil
        import torch

        last, self.last = self.last, _Count.now(self.cores)
        lasted, busy, own = (now - before for now, before in zip(self.last, last, strict=True))
        others = busy - own - self._of_children([*self.children])
        if own < LEAST_OWN * lasted:  # this process mostly waited: ignore the measurement
            return
        before = torch.get_num_threads()
        threads = self._threads(others / lasted, before)
        if threads < before:
            # Part of the load may come from new child processes, which are not other programs.
            others -= self._of_children(psutil.Process().children(recursive=True))
            threads = self._threads(others / lasted, before)
        if threads == before:
            return
        torch.set_num_threads(threads)
        if threads < before and not self.said:
            self.said = True
            say(f"other programs are busy: computing with {threads} of {self.most} threads")

    def _threads(self, others: float, now: int) -> int:
        return threads_beside(others, cores=len(self.cores), threads=now, most=self.most)

    def _of_children(self, children: "list[psutil.Process]") -> float:
        """Return the processor seconds that `children` used since this method last saw them."""
        import psutil

        seconds = 0.0
        for child in children:
            before = self.children.pop(child, 0.0)
            with suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                self.children[child] = times.user + times.system
                seconds += self.children[child] - before
        return seconds


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
