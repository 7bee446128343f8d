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
    threads_beside,
    usable_cores,
)

CPU = torch.device("cpu")
Times = namedtuple("Times", "user system idle")


class Machine:
    """Four cores, and processor seconds of others on each, that a test lets pass."""

    def __init__(self) -> None:
        self.now, self.own, self.others = 100.0, 5.0, 50.0
        self.started: list[Any] = []

    def run(self, seconds: float, *, own: float, others: float) -> None:
        """Time passes in which this process has `own` cores, and others have `others`."""
        self.now += seconds
        self.own += own * seconds
        self.others += others * seconds

    def cpu_times(self, *, percpu: bool) -> list[Times]:
        assert percpu
        busy = (self.own + self.others) / 4
        return [Times(busy * 0.75, busy * 0.25, 1000.0)] * 4

    def children(self, *, recursive: bool) -> list[Any]:
        """None, unless a test has some."""
        assert recursive
        return self.started

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.own


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine on which this process gives way, with four threads to begin with."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    simulated = Machine()
    monkeypatch.setattr(threads, "time", simulated)
    monkeypatch.setattr(psutil, "cpu_times", simulated.cpu_times)
    monkeypatch.setattr(psutil, "Process", lambda: simulated)
    monkeypatch.setattr(threads, "_affinity", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(threads, "_counter", None)
    monkeypatch.setattr(threads, "_leaves_cores", False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield simulated
    torch.set_num_threads(before)


def test_threads_follow_what_others_take(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4
    taken = []
    for others in (0.0, 1.0, 1.0, 3.0, 4.0, 0.1, 0.0):
        machine.run(1.0, own=max(0.5, 4.0 - others), others=others)
        adjust_threads(CPU)
        taken.append(torch.get_num_threads())
    assert taken == [4, 3, 3, 1, 1, 4, 4]
    assert capsys.readouterr().err == (
        "other programs are busy: computing with 3 of 4 threads\n"  # once
    )


def test_what_this_process_started_is_no_other_program(
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
    machine.run(60.0, own=240.0, others=0.0)  # what it took then is no excuse for others later
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


def test_counts_are_no_nearer_than_they_are_exact(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(threads.COUNT_SECONDS / 2, own=0.5, others=3.5)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


def test_what_ran_while_this_process_waited_says_nothing(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(60.0, own=0.0, others=4.0)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("others", "now", "expected"),
    [
        (0.0, 2, 2),  # alone
        (0.4, 2, 2),  # a little beside it
        (0.67, 2, 1),  # a loop that gets its fair share of two cores
        (1.0, 1, 1),  # and now has a core of its own
        (1.33, 1, 1),  # two loops
        (0.5, 1, 1),
        (0.3, 1, 2),  # over
    ],
)
def test_on_two_cores(others: float, now: int, expected: int) -> None:
    assert threads_beside(others, cores=2, threads=now, most=2) == expected


def test_work_on_a_gpu_changes_no_threads(machine: Machine) -> None:
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(1.0, own=0.5, others=3.5)
    adjust_threads(torch.device("cuda"))
    assert torch.get_num_threads() == 4


def test_there_is_at_least_one_thread_and_never_more_than_asked_for() -> None:
    for others in (0.0, 3.3, 16.0, 20.0):
        assert 1 <= threads_beside(others, cores=16, threads=8, most=8) <= 8


def test_the_library_does_not_touch_threads(machine: Machine) -> None:
    adjust_threads(CPU)
    machine.run(1.0, own=0.5, others=3.5)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


def test_what_the_environment_says_stands(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    leave_busy_cores()
    adjust_threads(CPU)
    machine.run(1.0, own=0.5, others=3.5)
    adjust_threads(CPU)
    assert torch.get_num_threads() == 4


def test_threads_asked_for_are_fixed(machine: Machine) -> None:
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


def test_counts_of_this_machine() -> None:
    """All programs together have taken at least what this one has."""
    before = threads._Count.now(threads._affinity())
    while time.process_time() - before.own < 0.3:
        pass
    after = threads._Count.now(threads._affinity())
    assert after.at > before.at
    assert after.busy - before.busy >= 0.2  # which the system rounds to hundredths


def test_a_container_may_number_its_cores_anew(machine: Machine) -> None:
    """It is shown four cores, and may use those that the machine calls 8 to 11."""
    machine.own = 100.0
    assert threads._Count.now([8, 9, 10, 11]).busy == machine.own + machine.others
    assert threads._Count.now([1, 3]).busy == (machine.own + machine.others) / 2


def test_quotas_of_a_cgroup_and_of_those_above_it(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("1:name=systemd:/old\n0::/user/session\n")
    own = tmp_path / "mounted" / "user" / "session"
    own.mkdir(parents=True)
    assert cgroup_quota(membership, tmp_path / "mounted") == float("inf")
    (own / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(membership, tmp_path / "mounted") == float("inf")
    (own.parent / "cpu.max").write_text("250000 100000\n")
    assert cgroup_quota(membership, tmp_path / "mounted") == 2.5
    (tmp_path / "cpu.max").write_text("1 100000\n")  # of no cgroup
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
    """How many pages a process gets from the system for 64 MiB that it has just freed."""
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
def test_commands_use_freed_memory_again(line: str) -> None:
    assert new_pages(line) < 16


@on_glibc
@pytest.mark.parametrize(
    ("line", "environment"),
    [("", {}), ("import driving_sim.cli", {}), (_KEEPING, {"MALLOC_MMAP_MAX_": "65536"})],
)
def test_the_library_and_the_environment_leave_it(line: str, environment: dict[str, str]) -> None:
    assert new_pages(line, **environment) >= 32  # of 2 MiB, where the system makes them so large


def test_commands_look_for_garbage_less_often_and_the_library_does_not() -> None:
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
