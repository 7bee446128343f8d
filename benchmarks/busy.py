"""`python -m benchmarks.busy`: drivesim's speed while other programs keep cores busy.

Times training steps of both models, the encoding of frames, and the sampling and decoding of
rollout frames, while 0, 1 or 2 busy loops run. Compares three numbers of threads, in turns: the
number that drivesim's commands choose, one thread, and one thread per core (`OMP_NUM_THREADS`).
With `--against REVISION`, also times the commit REVISION in the same turns. The first half second
of each turn does not count, because drivesim needs that long to notice the loops.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks import ROOT
from benchmarks.against import checked_out
from benchmarks.measuring.busy_worker import NAMES
from benchmarks.measuring.machine import describe, machine_name
from benchmarks.measuring.paired import Figure, Settings, rounded
from driving_sim.engine.threads import usable_cores

LOADS = (0, 1, 2)
LEAST_SHARE = {1: 0.50, 2: 0.35}
"""Goal for the speed beside 1 or 2 busy loops, as a share of the speed without loops.

On two cores, a fair scheduler gives two threads 67 % of the cores beside one loop, and 50 % beside
two.
"""
LEAST_OF_BETTER = 0.9
"""Goal for the speed beside busy loops, as a share of the better fixed number of threads.

The fixed numbers are one thread and one thread per core.
"""
LEAST_IDLE = 0.97
"""Goal for the speed without loops, as a share of the earlier commit's.

A lower share also reaches the goal if some rounds were slower than the earlier commit and others
were faster.
"""
MOST_STRETCH = 3.0
"""Goal for slow rollout frames beside one busy loop.

The 95th percentile of a frame's time should be at most this many times the median without loops.
"""
NOW, ONE, ALL, BEFORE = "chosen by commands", "one", "one per core", "earlier commit"

Times = dict[tuple[str, int, str], list[list[float]]]
"""Seconds of each repetition, in one list for each round.

A key has three parts: the name of the work, the number of busy loops, and the worker that was timed
(`NOW`, `ONE`, `ALL` or `BEFORE`).
"""


class Worker:
    """A process that runs the module `busy_worker` of a checkout.

    If `threads` is None, drivesim chooses the number of threads as in its commands.
    """

    def __init__(self, preset: str, tree: Path, threads: int | None) -> None:
        ours = ("OMP_", "GOMP_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        environment["PYTHONPATH"] = str(tree)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", worker_module(tree), preset],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def times(self, name: str, seconds: float) -> list[float]:
        """Repeat the work `name` for `seconds`. Return the seconds of each repetition."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name}: the worker ended with exit code {self._process.wait()}")
        times: list[float] = json.loads(answer)
        return times

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # its __exit__ closes the pipes
            self._process.kill()


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run `count` processes that only loop, until the context ends."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def worker_module(tree: Path) -> str:
    """Return the dotted name of the module `busy_worker` in a checkout."""
    for file in tree.glob("benchmarks/**/busy_worker.py"):
        return ".".join(file.relative_to(tree).with_suffix("").parts)
    raise SystemExit(
        "--against: the commit has no benchmarks/**/busy_worker.py; choose a later one"
    )


def measure(workers: Mapping[str, Worker], rounds: int, seconds: float) -> Times:
    """Time each kind of work in each worker, in turns, beside each number of loops in `LOADS`."""
    measured: Times = {}
    for name in NAMES:  # warm-up: the first repetition sets up the kernels
        for worker in workers.values():
            worker.times(name, 0.0)
    for number in range(rounds):
        subjects = list(workers) if number % 2 == 0 else list(workers)[::-1]
        for load in LOADS:
            with busy_loops(load):
                for name in NAMES:
                    for subject in subjects:
                        times = workers[subject].times(name, seconds)
                        measured.setdefault((name, load, subject), []).append(times)
    return measured


def rates(times: Times, name: str, load: int, subject: str) -> np.ndarray:
    """Return how often the work was repeated per second in each round."""
    return np.array([len(turns) / sum(turns) for turns in times[name, load, subject]])


def stretch(times: Times, name: str, subject: str) -> float:
    """Divide the 95th percentile of the time beside one loop by the median time without loops."""
    beside, idle = (np.concatenate([*map(np.array, times[name, n, subject])]) for n in (1, 0))
    return float(np.percentile(beside, 95) / np.median(idle))


def rows(times: Times) -> list[str]:
    """Return the lines of the table in docs/speed.md.

    It compares the number of threads that commands choose with one thread per core.
    """
    lines = [
        "| work | threads | idle, per second | beside one loop | beside two loops |",
        "|---|---|---|---|---|",
    ]
    for name in NAMES:
        for subject in (NOW, ALL):
            idle = rates(times, name, 0, subject)
            shares = [Figure.of([*(rates(times, name, n, subject) / idle)]) for n in LOADS[1:]]
            cells = [rounded(float(np.median(idle)))]
            cells += [f"{100 * share.median:.0f} %" for share in shares]
            lines.append(f"| {name} | {subject} | {' | '.join(cells)} |")
    return lines


def verdicts(times: Times, subjects: list[str]) -> list[str]:
    """Return a line for each bar (goal): the measured value, and whether it reaches the bar."""
    lines = []

    def judge(what: str, figure: Figure, bar: float, reached: bool) -> None:
        interval = f"{figure.median:.2f} ({figure.least:.2f} to {figure.most:.2f})"
        lines.append(f"- {what}: {interval}, bar {bar:g}: {'reached' if reached else '**missed**'}")

    for name in NAMES:
        idle = rates(times, name, 0, NOW)
        for load, least in LEAST_SHARE.items():
            beside = rates(times, name, load, NOW)
            share = Figure.of([*(beside / idle)])
            judge(
                f"{name} beside {load}: share of the idle speed",
                share,
                least,
                share.median >= least,
            )
            fixed = [rates(times, name, load, subject) for subject in (ONE, ALL)]
            better = max(fixed, key=lambda rate: float(np.median(rate)))
            of_better = Figure.of([*(beside / better)])
            reached = of_better.median >= LEAST_OF_BETTER
            judge(
                f"{name} beside {load}: share of the better fixed number",
                of_better,
                LEAST_OF_BETTER,
                reached,
            )
        if BEFORE in subjects:
            of_before = Figure.of([*(idle / rates(times, name, 0, BEFORE))])
            reached = of_before.median >= LEAST_IDLE or of_before.least <= 1 <= of_before.most
            judge(f"{name} idle: share of the earlier commit", of_before, LEAST_IDLE, reached)
    stretched = stretch(times, NAMES[-1], NOW)
    figure = Figure(stretched, stretched, stretched)
    reached = stretched <= MOST_STRETCH
    judge(f"{NAMES[-1]} beside 1: 95th percentile over idle median", figure, MOST_STRETCH, reached)
    return lines


def main() -> None:
    """Parse the options, measure, and print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.busy")
    parser.add_argument("--preset", default="demo", help="demo, tiny or base; default: demo")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing; default: 7")
    parser.add_argument(
        "--seconds", type=float, default=0.8, help="seconds of each turn that count; default: 0.8"
    )
    parser.add_argument("--against", metavar="REVISION", help="commit to time as well")
    options = parser.parse_args()
    with ExitStack() as stack:

        def worker(tree: Path, threads: int | None) -> Worker:
            return stack.enter_context(Worker(options.preset, tree, threads))

        workers = {NOW: worker(ROOT, None), ONE: worker(ROOT, 1), ALL: worker(ROOT, usable_cores())}
        if options.against:
            workers[BEFORE] = worker(stack.enter_context(checked_out(options.against)), None)
        began = time.monotonic()
        times = measure(workers, options.rounds, options.seconds)
        minutes = (time.monotonic() - began) / 60
    print(f"Preset {options.preset}, {options.rounds} rounds in {minutes:.0f} minutes.")
    print(f"{machine_name(Settings())}. {describe(Settings())}", end="\n\n")
    for line in [*rows(times), "", *verdicts(times, list(workers))]:
        print(line)


if __name__ == "__main__":
    main()
