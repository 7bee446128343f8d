"""`benchmarks.busy`: its arithmetic, and that its workers answer."""

from collections.abc import Iterator

import psutil
import pytest

from benchmarks import ROOT, busy
from benchmarks.busy import ALL, BEFORE, NOW, ONE, Times, Worker, busy_loops
from benchmarks.measuring.busy_worker import NAMES


def made_times(*, beside_one: float, of_one_thread: float, before: float = 1.0) -> Times:
    """Return two rounds of times, with ten repetitions per second on an idle machine."""
    rates = {
        NOW: {0: 10.0, 1: 10 * beside_one, 2: 5.0},
        ONE: {0: 8.0, 1: 10 * beside_one / of_one_thread, 2: 4.0},
        ALL: {0: 10.0, 1: 1.0, 2: 1.0},
        BEFORE: {0: 10 / before, 1: 1.0, 2: 1.0},
    }
    return {
        (name, load, subject): [[1 / rate] * 4] * 2
        for name in NAMES
        for subject, of_loads in rates.items()
        for load, rate in of_loads.items()
    }


def missed(times: Times) -> list[str]:
    """Return the bars that are missed, without the names of the work."""
    lines = busy.verdicts(times, [NOW, ONE, ALL, BEFORE])
    assert len(lines) == 5 * len(NAMES) + 1
    return sorted({line.split(": ")[1] for line in lines if "**missed**" in line})


def test_bars_apply_to_shares_of_the_idle_speed_and_of_the_better_number_of_threads() -> None:
    assert missed(made_times(beside_one=0.6, of_one_thread=1.0)) == []
    assert missed(made_times(beside_one=0.4, of_one_thread=1.0)) == ["share of the idle speed"]
    assert missed(made_times(beside_one=0.6, of_one_thread=0.8)) == [
        "share of the better fixed number"
    ]
    assert missed(made_times(beside_one=0.6, of_one_thread=1.0, before=0.9)) == [
        "share of the earlier commit"
    ]
    assert missed(made_times(beside_one=0.3, of_one_thread=1.0)) == [
        "95th percentile over idle median",
        "share of the idle speed",
    ]


def test_a_range_that_contains_1_reaches_the_bar_of_the_earlier_commit() -> None:
    times = made_times(beside_one=0.6, of_one_thread=1.0, before=0.9)
    for name in NAMES:
        times[name, 0, BEFORE][0] = [0.2] * 4
    assert missed(times) == []


def test_the_table_has_shares_of_the_idle_speed() -> None:
    table = busy.rows(made_times(beside_one=0.6, of_one_thread=1.0))
    assert f"| {NAMES[0]} | {NOW} | 10.0 | 60 % | 50 % |" in table
    assert f"| {NAMES[0]} | {ALL} | 10.0 | 10 % | 10 % |" in table


def test_loops_run_only_inside_the_context() -> None:
    def running() -> int:
        return sum("while True" in " ".join(c.cmdline()) for c in psutil.Process().children())

    with busy_loops(2):
        assert running() == 2
    assert running() == 0


@pytest.mark.parametrize("name", NAMES)
def test_workers_answer_with_the_seconds_of_each_repetition(name: str, worker: Worker) -> None:
    times = worker.times(name, 0.0)
    assert times
    assert all(seconds > 0 for seconds in times)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker("demo", ROOT, 1) as started:
        yield started
