import os
import platform
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from driving_sim.cli import main
from driving_sim.engine import threads
from driving_sim.engine.threads import (
    adjust_threads,
    cgroup_quota,
    fixed_threads,
    leave_busy_cores,
    spare_cores,
    threads_beside,
    usable_cores,
)

CPU = torch.device("cpu")
Times = namedtuple("Times", "user system idle")


class Machine:
    """A simulated machine with four cores, on which time passes only when a test calls `run`."""

    def __init__(self) -> None:
        self.now, self.own, self.others = 100.0, 5.0, 50.0
        self.started: list[Any] = []

    def run(self, seconds: float, *, own: float, others: float) -> None:
        """Let time pass while this process uses `own` cores and other programs use `others`."""
        self.now += seconds
        self.own += own * seconds
        self.others += others * seconds

    def cpu_times(self, *, percpu: bool) -> list[Times]:
        assert percpu
        busy = (self.own + self.others) / 4
        return [Times(busy * 0.75, busy * 0.25, 1000.0)] * 4

    def children(self, *, recursive: bool) -> list[Any]:
        """Return the child processes that the test has added to `started`."""
        assert recursive
        return self.started

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.own


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Simulate a machine with four cores, and let torch begin with four threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    simulated = Machine()
    monkeypatch.setattr(threads, "time", simulated)
    monkeypatch.setattr(psutil, "cpu_times", simulated.cpu_times)
    monkeypatch.setattr(psutil, "Process", lambda: simulated)
    monkeypatch.setattr(threads, "_affinity", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(threads, "_counter", None)
    monkeypatch.setattr(threads, "_leaves_cores", False)
    monkeypatch.setattr(threads, "_spared", 0)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield simulated
    torch.set_num_threads(before)


def test_threads_follow_the_load_of_other_programs(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4
    counts = []
    for others in (0.0, 1.0, 1.0, 3.0, 4.0, 0.1, 0.0):
        machine.run(1.0, own=max(0.5, 4.0 - others), others=others)
        adjust_threads(CPU)
        counts.append(torch.get_num_threads())
    assert counts == [4, 3, 3, 1, 1, 4, 4]
    assert capsys.readouterr().err == (
        "other programs are busy: computing with 3 of 4 threads\n"  # printed only once
    )


def test_spared_cores_are_left_to_others(machine: Machine) -> None:
    leave_busy_cores()
    spare_cores(1)
    adjust_threads(CPU)
    counts = [torch.get_num_threads()]
    for others in (1.0, 2.0, 0.0):
        machine.run(1.0, own=2.0, others=others)
        adjust_threads(CPU)
        counts.append(torch.get_num_threads())
    assert counts == [3, 3, 2, 3]
    spare_cores(9)
    assert torch.get_num_threads() == 1
    spare_cores(0)
    assert torch.get_num_threads() == 4


def test_child_processes_do_not_count_as_other_programs(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    class Child:
        pid, taken, gone = 7, 0.0, False

        def cpu_times(self) -> Times:
            if self.gone:
                raise psutil.NoSuchProcess(self.pid)
            return Times(self.taken, 0.0, 0.0)

    child = Child()
    machine.started.append(child)
    leave_busy_cores()
    adjust_threads(CPU)
    for _ in range(3):
        machine.run(1.0, own=2.0, others=2.0)
        child.taken += 2.0
        adjust_threads(CPU)
        assert torch.get_num_threads() == 4
    machine.run(60.0, own=240.0, others=0.0)  # the child's time must not be subtracted twice
    child.taken += 60.0
    adjust_threads(CPU)
    machine.run(1.0, own=2.0, others=2.0)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 2
    child.gone = True
    machine.run(1.0, own=2.0, others=1.0)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_measurements_are_not_closer_together_than_their_minimum_time(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(threads.COUNT_SECONDS / 2, own=0.5, others=3.5)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


def test_load_while_this_process_waited_is_ignored(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(60.0, own=0.0, others=4.0)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("others", "now", "expected"),
    [
        (0.0, 2, 2),  # no other program runs
        (0.4, 2, 2),  # other programs use little
        (0.67, 2, 1),  # a busy loop gets its fair share of two cores
        (1.0, 1, 1),  # now the busy loop has a core of its own
        (1.33, 1, 1),  # there are two busy loops
        (0.5, 1, 1),
        (0.3, 1, 2),  # the busy loops have ended
    ],
)
def test_number_of_threads_on_two_cores(others: float, now: int, expected: int) -> None:
    assert threads_beside(others, cores=2, threads=now, most=2) == expected


def test_work_on_a_gpu_changes_no_threads(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(1.0, own=0.5, others=3.5)
    adjust_threads(torch.device("cuda"))
    assert torch.get_num_threads() == 4


def test_there_is_at_least_one_thread_and_never_more_than_the_maximum() -> None:
    for others in (0.0, 3.3, 16.0, 20.0):
        assert 1 <= threads_beside(others, cores=16, threads=8, most=8) <= 8


def test_the_library_does_not_touch_threads(machine: Machine) -> None:
    adjust_threads(CPU)
    machine.run(1.0, own=0.5, others=3.5)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


def test_omp_num_threads_in_the_environment_has_priority(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(1.0, own=0.5, others=3.5)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


def test_requested_threads_are_fixed(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    with fixed_threads(3):
        machine.run(1.0, own=0.5, others=3.5)
        adjust_threads(CPU)
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 4
    with fixed_threads(None):
        adjust_threads(CPU)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


def test_commands_leave_busy_cores(machine: Machine) -> None:
    main(debug=False)
    adjust_threads(CPU)
    machine.run(1.0, own=3.0, others=1.0)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 3


def test_measurement_on_this_machine() -> None:
    """All programs together use at least as much processor time as this process alone."""
    before = threads._Count.now(threads._affinity())
    while time.process_time() - before.own < 0.3:
        pass
    after = threads._Count.now(threads._affinity())
    assert after.at > before.at
    assert after.busy - before.busy >= 0.2  # less than 0.3, because the system rounds the times


def test_a_container_may_renumber_its_cores(machine: Machine) -> None:
    """The container sees four cores, and its affinity names cores 8 to 11 of the machine."""
    machine.own = 100.0
    assert threads._Count.now([8, 9, 10, 11]).busy == machine.own + machine.others
    assert threads._Count.now([1, 3]).busy == (machine.own + machine.others) / 2


def test_quotas_of_a_cgroup_and_its_parents(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("1:name=systemd:/old\n0::/user/session\n")
    own = tmp_path / "mounted" / "user" / "session"
    own.mkdir(parents=True)
    assert cgroup_quota(membership, tmp_path / "mounted") == float("inf")
    (own / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(membership, tmp_path / "mounted") == float("inf")
    (own.parent / "cpu.max").write_text("250000 100000\n")
    assert cgroup_quota(membership, tmp_path / "mounted") == 2.5
    (tmp_path / "cpu.max").write_text("1 100000\n")  # outside the mounted cgroups
    assert cgroup_quota(membership, tmp_path / "mounted") == 2.5
    assert cgroup_quota(tmp_path / "none", tmp_path / "nowhere") == float("inf")


def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_affinity", lambda: list(range(64)))
    monkeypatch.setattr(threads, "cgroup_quota", lambda *_: 2.5)
    assert usable_cores() == 2
    monkeypatch.setattr(threads, "cgroup_quota", lambda *_: 0.5)
    assert usable_cores() == 1


on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
_NEW_PAGES = """
import ctypes, resource
{}
memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p
memory.malloc.argtypes = [ctypes.c_size_t]
memory.free.argtypes = [ctypes.c_void_p]
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = memory.malloc(2 ** 26)
    ctypes.memset(block, 1, 2 ** 26)
    memory.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""
_KEEPING = "from driving_sim.engine.threads import keep_freed_memory as act; act()"


def new_pages(line: str, **environment: str) -> int:
    """Return how many new pages a process needs to allocate 64 MiB that it has just freed."""
    done = subprocess.run(
        [sys.executable, "-c", _NEW_PAGES.format(line)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@on_glibc
@pytest.mark.parametrize("line", [_KEEPING, "from driving_sim.cli import main as act; act()"])
def test_commands_reuse_freed_memory(line: str) -> None:
    assert new_pages(line) < 16


@on_glibc
@pytest.mark.parametrize(
    ("line", "environment"),
    [("", {}), ("import driving_sim.cli", {}), (_KEEPING, {"MALLOC_MMAP_MAX_": "65536"})],
)
def test_the_library_and_a_configured_allocator_do_not_keep_freed_memory(
    line: str, environment: dict[str, str]
) -> None:
    assert new_pages(line, **environment) >= 32  # pages may be as large as 2 MiB


def test_commands_collect_garbage_less_often_and_the_library_does_not() -> None:
    thresholds = [
        subprocess.run(
            [sys.executable, "-c", f"import gc; {line}; print(gc.get_threshold()[0])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in ("pass", "import driving_sim.cli", "from driving_sim.cli import main; main()")
    ]
    library, imported, command = map(int, thresholds)
    assert library == imported < command
