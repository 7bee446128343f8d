import io

import pytest
from rich.console import Console

from driving_sim.engine import progress as module
from driving_sim.engine.progress import progress


class Clock:
    """A clock that advances only when a test changes `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_plain_lines_show_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(1000, "tokenize", "frames") as counter:
        for _ in range(25):
            clock.now += 1.0
            counter.advance(10, text="drive_03")
    assert capsys.readouterr().err.splitlines() == [
        "tokenize: 100/1,000 frames, 10 frames/s, 1:30 left, drive_03",
        "tokenize: 200/1,000 frames, 10 frames/s, 1:20 left, drive_03",
        "tokenize: 250 frames in 0:25",
    ]


def test_a_counted_item_is_done_when_the_next_one_is_requested(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(2, "sweep", "starts") as counter:
        for _ in counter.counted("ab"):
            clock.now += 20.0
    assert capsys.readouterr().err.splitlines() == [
        "sweep: 1/2 starts, 0.05 starts/s, 0:20 left",
        "sweep: 2/2 starts, 0.05 starts/s, 0:00 left",
        "sweep: 2 starts in 0:40",
    ]


def test_units_done_earlier_do_not_count_for_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(1000, "train", "steps", start=900) as counter:
        clock.now += 10.0
        counter.advance(20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 920/1,000 steps, 2 steps/s, 0:40 left"
    assert lines[1] == "train: 20 steps in 0:10"


def test_fraction_decides_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "train", "steps") as counter:
        counter.advance(fraction=0.5)
        clock.now += 3600.0
        counter.advance(fraction=0.75)
    assert capsys.readouterr().err.splitlines()[0] == (
        "train: 2 steps, 0.000556 steps/s, 1:00:00 left"
    )


def test_unknown_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "read", "frames") as counter:
        clock.now += 20.0
        counter.advance(5)
    assert capsys.readouterr().err.splitlines()[0] == "read: 5 frames, 0.25 frames/s"


def test_failed_work_is_not_reported_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress(10, "read", "frames"):
        raise KeyError
    assert capsys.readouterr().err == ""


def test_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(stderr: bool) -> Console:
        assert stderr
        return Console(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr("rich.console.Console", terminal)
    with progress(100, "tokenize [/b]", "frames") as counter:
        clock.now += 1.0
        counter.advance(50)
        counter.say("drive_03 [bad] skipped")
    text = screen.getvalue()
    assert "━" in text
    assert "50/100 frames, 50 frames/s, 0:01 left" in text
    assert "drive_03 [bad] skipped" in text
    assert "tokenize [/b]: 50 frames in 0:01" in text
