"""How many threads to compute with: as many as there are cores that other programs leave.

Threads of OpenMP wait for each other by spinning. Where another program has the core of one of
them, all others spin until it is back, thousands of times a second: two threads are then slower
than one, ten times and more. So commands count, a few times a second, the cores that others take,
and compute on the rest. The number of threads changes no token and no picture; in a training it
changes the last bits of sums.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

COUNT_SECONDS = 0.3
"""At least so long between two counts of the cores that others take."""
MARGIN = 0.6
"""How many cores more or fewer than threads must be free for the number of threads to change."""

LEAST_OWN = 0.1
"""Of a core that this process must have used between two counts for them to be compared."""


def give_way() -> None:
    """From now on, have `adjust_threads` leave other programs the cores that they use.

    It is for the whole process: commands do it, the library does not. OMP_NUM_THREADS stands.
    """
    global _gives_way
    _gives_way = "OMP_NUM_THREADS" not in os.environ


def adjust_threads() -> None:
    """Compute with as many threads as other programs leave cores for, where this `give_way`s.

    To be called between two pieces of work: it takes no time where the last count is recent.
    """
    global _counter
    if not _gives_way:
        return
    if _counter is None:
        _counter = _Counter()
    _counter.adjust()


@contextmanager
def fixed_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads, whatever others do; None changes nothing."""
    global _gives_way
    import torch

    before = _gives_way, torch.get_num_threads()
    if count is not None:
        _gives_way = False
        torch.set_num_threads(count)
    try:
        yield
    finally:
        _gives_way, threads = before
        torch.set_num_threads(threads)


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


_gives_way = False
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
        busy = [
            of_all[core].user + of_all[core].system + getattr(of_all[core], "nice", 0.0)
            for core in cores
        ]
        return cls(time.monotonic(), sum(busy), time.process_time())


class _Counter:
    """Sets the threads by what has happened since the last count."""

    def __init__(self) -> None:
        import torch

        self.cores = _affinity()
        self.most = self.threads = min(torch.get_num_threads(), usable_cores())
        torch.set_num_threads(self.most)
        self.children: dict[int, float] = {}
        self.last = _Count.now(self.cores)
        self.said = False

    def adjust(self) -> None:
        if time.monotonic() - self.last.at < COUNT_SECONDS:
            return
        import torch

        last, self.last = self.last, _Count.now(self.cores)
        at, busy, own = (now - before for now, before in zip(self.last, last, strict=True))
        if own < LEAST_OWN * at:  # it hardly computed: what else ran says nothing of its threads
            return
        others = busy - own
        if others > MARGIN * at:  # or are they this process's own decoders?
            others -= self._children()
        threads = threads_beside(
            others / at, cores=len(self.cores), threads=self.threads, most=self.most
        )
        if threads != self.threads:
            self.threads = threads
            torch.set_num_threads(threads)
            self._say_once()

    def _children(self) -> float:
        """Processor seconds of the processes that this one started, since this was last asked."""
        import psutil

        before, self.children = self.children, {}
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                taken = child.cpu_times()
                self.children[child.pid] = taken.user + taken.system
        return sum(now - before.get(pid, now) for pid, now in self.children.items())

    def _say_once(self) -> None:
        from driving_sim.engine.progress import say

        if not self.said:
            say(f"other programs are busy: computing with {self.threads} of {self.most} threads")
        self.said = True


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
