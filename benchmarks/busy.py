"""`python -m benchmarks.busy`: how fast drivesim is beside programs that keep cores busy.

Steps of both trainings, encoding, and frames of a rollout with their decoding, each beside 0, 1 and
2 loops that do nothing but run. They are timed as commands run them, and with one thread and all
threads by OMP_NUM_THREADS, in turns; with `--against REVISION` as that commit runs them, too. What
a turn takes counts half a second after it has begun: as long as it takes to notice the others.
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
from benchmarks.measuring.machine import describe
from benchmarks.measuring.paired import Figure, Settings
from driving_sim.engine.threads import usable_cores

LOADS = (0, 1, 2)
LEAST_SHARE = {1: 0.50, 2: 0.35}
"""Of the idle speed, beside so many loops. Fair shares of two threads on two cores: 67 and 50 %."""
LEAST_OF_BETTER = 0.9
"""Of what the better of one thread and all threads reaches beside a loop."""
LEAST_IDLE = 0.97
"""Of the earlier commit's idle speed, in the median; or the interval contains 1."""
MOST_STRETCH = 3.0
"""95th percentile of a frame beside one loop, in idle medians."""
NOW, ONE, ALL, BEFORE = "now", "one thread", "all threads", "before"

Times = dict[tuple[str, int, str], list[list[float]]]
"""Seconds of each turn in each round, by work, loops beside it and subject."""


class Worker:
    """A process that does the work as commands would; see the checkout's `busy_worker`."""

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
        """What each turn of a work took, in so many seconds of them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name}: the worker ended with {self._process.wait()}")
        found: list[float] = json.loads(answer)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Inside, so many processes do nothing but run."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def worker_module(tree: Path) -> str:
    """The name of a checkout's own worker."""
    for file in tree.glob("benchmarks/**/busy_worker.py"):
        return ".".join(file.relative_to(tree).with_suffix("").parts)
    raise SystemExit("that commit is from before this benchmark: it has no busy_worker.py")


def measure(workers: Mapping[str, Worker], rounds: int, seconds: float) -> Times:
    """Time all work of all workers beside all loads, in turns."""
    found: Times = {}
    for name in NAMES:  # the first turn sets kernels up, and is not counted
        for worker in workers.values():
            worker.times(name, 0.0)
    for number in range(rounds):
        subjects = list(workers) if number % 2 == 0 else list(workers)[::-1]
        for load in LOADS:
            with busy_loops(load):
                for name in NAMES:
                    for subject in subjects:
                        times = workers[subject].times(name, seconds)
                        found.setdefault((name, load, subject), []).append(times)
    return found


def rates(times: Times, name: str, load: int, subject: str) -> np.ndarray:
    """Turns a second in each round."""
    return np.array([len(turns) / sum(turns) for turns in times[name, load, subject]])


def stretch(times: Times, name: str, subject: str) -> float:
    """The 95th percentile of a turn beside one loop, in medians of idle ones; all rounds'."""
    beside, idle = (np.concatenate([*map(np.array, times[name, n, subject])]) for n in (1, 0))
    return float(np.percentile(beside, 95) / np.median(idle))


def rows(times: Times, subjects: list[str]) -> list[str]:
    """The table, a row for each work and subject."""
    lines = [
        "| work | | idle, a second | beside one loop | beside two | 95th percentile beside one |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        for subject in subjects:
            idle = rates(times, name, 0, subject)
            shares = [Figure.of([*(rates(times, name, n, subject) / idle)]) for n in LOADS[1:]]
            cells = [f"{np.median(idle):.3g}", *(f"{share.median:.0%}" for share in shares)]
            cells.append(f"{stretch(times, name, subject):.1f} idle medians")
            lines.append(f"| {name} | {subject} | {' | '.join(cells)} |")
    return lines


def verdicts(times: Times, subjects: list[str]) -> list[str]:
    """A line for each bar: what was reached."""
    lines = []

    def judge(what: str, figure: Figure, bar: float, reached: bool) -> None:
        interval = f"{figure.median:.2f} ({figure.least:.2f} to {figure.most:.2f})"
        lines.append(f"- {what}: {interval}, bar {bar:g}: {'reached' if reached else '**missed**'}")

    for name in NAMES:
        idle = rates(times, name, 0, NOW)
        for load, least in LEAST_SHARE.items():
            beside = rates(times, name, load, NOW)
            share = Figure.of([*(beside / idle)])
            judge(f"{name}, {load} beside it, of idle", share, least, share.median >= least)
            both = [rates(times, name, load, subject) for subject in (ONE, ALL)]
            better = max(both, key=lambda each: float(np.median(each)))
            of_better = Figure.of([*(beside / better)])
            reached = of_better.median >= LEAST_OF_BETTER
            judge(f"{name}, {load} beside it, of the better", of_better, LEAST_OF_BETTER, reached)
        if BEFORE in subjects:
            of_before = Figure.of([*(idle / rates(times, name, 0, BEFORE))])
            reached = of_before.median >= LEAST_IDLE or of_before.least <= 1 <= of_before.most
            judge(f"{name}, idle, of before", of_before, LEAST_IDLE, reached)
    stretched = stretch(times, NAMES[-1], NOW)
    figure = Figure(stretched, stretched, stretched)
    judge(f"{NAMES[-1]}, 95th percentile", figure, MOST_STRETCH, stretched <= MOST_STRETCH)
    return lines


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.busy")
    parser.add_argument("--preset", default="demo", help="demo, tiny or base")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.8, help="that a turn is timed for")
    parser.add_argument("--against", metavar="REVISION", help="also time this commit")
    given = parser.parse_args()
    with ExitStack() as stack:

        def worker(tree: Path, threads: int | None) -> Worker:
            return stack.enter_context(Worker(given.preset, tree, threads))

        workers = {NOW: worker(ROOT, None), ONE: worker(ROOT, 1), ALL: worker(ROOT, usable_cores())}
        if given.against:
            workers[BEFORE] = worker(stack.enter_context(checked_out(given.against)), None)
        began = time.monotonic()
        times = measure(workers, given.rounds, given.seconds)
        minutes = (time.monotonic() - began) / 60
    print(f"Preset {given.preset}, {given.rounds} rounds in {minutes:.0f} minutes, on:")
    print(f"{describe(Settings())}.", end="\n\n")
    for line in [*rows(times, list(workers)), "", *verdicts(times, list(workers))]:
        print(line)


if __name__ == "__main__":
    main()
