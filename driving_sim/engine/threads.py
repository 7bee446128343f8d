"""What this process takes of the machine: threads on the cores that others leave, and memory.

Threads of OpenMP wait for each other by spinning. Where another program has the core of one of
them, all others spin until it is back, thousands of times a second, and two threads are slower than
one. So commands count, a few times a second, the cores that others take, and compute on the rest.

Compiled passes give the same tokens with any number of threads. What torch computes differs in its
last bits: the weights of a training, and in float32 a token or a pixel on a rounding boundary.
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

if TYPE_CHECKING:
    import psutil
    import torch

COUNT_SECONDS = 0.3
"""At least so long between two counts of the cores that others take."""
MARGIN = 0.6
"""Hysteresis, in cores: the number of threads changes only if the free cores differ from it by
more."""
LEAST_OWN = 0.3
"""Of a core that this process must have used between two counts for them to be compared."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEW_OBJECTS = 10_000  # more than are freed, between two collections; Python's default is 700


def leave_busy_cores() -> None:
    """From now on, have `adjust_threads` leave other programs the cores that they use.

    It is for the whole process: commands do it, the library does not. OMP_NUM_THREADS stands.
    """
    global _leaves_cores
    _leaves_cores = "OMP_NUM_THREADS" not in os.environ


def adjust_threads(device: "torch.device") -> None:
    """Before work on a CPU: set torch's threads to the cores that others leave.

    It does so only after `leave_busy_cores`, and takes no time where the last count is recent.
    """
    global _counter
    if not _leaves_cores or device.type != "cpu":
        return
    if _counter is None:
        _counter = _Counter()
    _counter.adjust()


@contextmanager
def fixed_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads, whatever others do; None changes nothing."""
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
    """Have glibc keep what is freed for what is allocated next.

    Large tensors would go back to the system, and those of the next step be made of pages that it
    has to find and to clear first (https://man7.org/linux/man-pages/man3/mallopt.3.html). It is for
    the whole process: commands do it, the library does not. Other C libraries stay as they are, and
    so does glibc where the environment tells it what to do.
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
    """Have Python run its cyclic garbage collector less often than it does by default.

    By default it runs hundreds of times while a command's imports load, a tenth of the time that
    these take. What is part of a reference cycle is freed later. It is for the whole process:
    commands do it, the library does not.
    """
    gc.set_threshold(_NEW_OBJECTS)


def usable_cores() -> int:
    """Cores that this process may compute on: those of its affinity, within its cgroup's quota."""
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, int(min(len(_affinity()), quota)))


def cgroup_quota(membership: Path, mounted: Path) -> float:
    """Cores that a cgroup and those above it may use, as `docker run --cpus` limits them.

    `membership` says which group it is, as /proc/self/cgroup does; `mounted` is where cgroups
    (version 2) are. Infinite where nothing limits it.
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
    """How many threads to compute with, at most `most`, where there are `threads` by now.

    `others` is how many of the `cores` other programs have taken.
    """
    free = cores - others
    return threads if abs(free - threads) <= MARGIN else min(most, max(1, round(free)))


_leaves_cores = False
_counter: "_Counter | None" = None


class _Count(NamedTuple):
    """Processor seconds until a moment."""

    at: float
    busy: float
    """Of all programs, on the cores that this process may use."""
    own: float
    """Of this process."""

    @classmethod
    def now(cls, cores: list[int]) -> Self:
        import psutil  # 20 ms, which --help does not wait for

        of_all = psutil.cpu_times(percpu=True)
        # A container may be shown just its own cores, numbered anew.
        chosen = [of_all[core] for core in cores] if cores[-1] < len(of_all) else of_all
        busy = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in chosen)
        return cls(time.monotonic(), busy, time.process_time())


class _Counter:
    """Sets the threads by what has happened since the last count."""

    def __init__(self) -> None:
        import torch

        self.cores = _affinity()
        self.most = min(torch.get_num_threads(), usable_cores())
        torch.set_num_threads(self.most)
        self.children: dict[psutil.Process, float] = {}  # with the processor seconds they have had
        self.last = _Count.now(self.cores)
        self.said = False

    def adjust(self) -> None:
        if time.monotonic() - self.last.at < COUNT_SECONDS:
            return
        import psutil
        import torch

        last, self.last = self.last, _Count.now(self.cores)
        lasted, busy, own = (now - before for now, before in zip(self.last, last, strict=True))
        others = busy - own - self._of_children([*self.children])
        if own < LEAST_OWN * lasted:  # it mostly waited: what else ran says nothing of its threads
            return
        before = torch.get_num_threads()
        threads = self._threads(others / lasted, before)
        if threads < before:  # or was it a decoder that this process has just started?
            others -= self._of_children(psutil.Process().children(recursive=True))
            threads = self._threads(others / lasted, before)
        if threads == before:
            return
        torch.set_num_threads(threads)
        if threads < before and not self.said:
            from driving_sim.engine.progress import say  # rich takes half of the time of --help

            self.said = True
            say(f"other programs are busy: computing with {threads} of {self.most} threads")

    def _threads(self, others: float, now: int) -> int:
        return threads_beside(others, cores=len(self.cores), threads=now, most=self.most)

    def _of_children(self, children: "list[psutil.Process]") -> float:
        """Processor seconds that children have had since they were last asked, or in all."""
        import psutil

        taken = 0.0
        for child in children:
            before = self.children.pop(child, 0.0)
            with suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                self.children[child] = times.user + times.system
                taken += self.children[child] - before
        return taken


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
