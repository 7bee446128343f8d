import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest

from driving_sim.data.actions.action_file import ActionLog, SteeringKind
from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.drive import Drive, SampledDrive, sample
from driving_sim.data.inspect.steering_check import Synchrony, curvature, measure_synchrony
from driving_sim.data.video.frame_size import FrameSize

FPS = 15
FOCAL_WIDTHS = 0.8
Series = npt.NDArray[np.float64]


class NoFrames:
    """Synchrony looks at measured motion, never at frames."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        raise AssertionError

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        raise AssertionError

    def files(self, indices: Ints) -> list[Path]:
        raise AssertionError


def steering_like_a_driver(seconds: float = 40) -> Series:
    """Road-wheel angles in rad: short turns to both sides, with straights between them."""
    random = np.random.default_rng(0)
    times = np.arange(round(seconds * FPS)) / FPS
    turns = [
        size * np.exp(-(((times - at) / 0.4) ** 2))
        for at, size in zip(random.uniform(0, seconds, 25), random.normal(0, 0.1, 25), strict=True)
    ]
    angles: Series = np.sum(turns, axis=0)
    return angles


def make_drive(
    steering: Series, speed: Series, kind: SteeringKind = "road_wheel", *, has_speed: bool = True
) -> SampledDrive:
    times = np.arange(len(steering)) / FPS
    log = ActionLog(
        times=times,
        values=np.stack([speed, steering], axis=1).astype(np.float32),
        has=np.array([has_speed, True]),
        steering_kind=kind,
    )
    return sample(Drive(id="a", source="video", timestamps=times, reader=NoFrames(), log=log))


def motion_of(steering: Series, speed: Series, late: int = 0) -> npt.NDArray[np.float32]:
    """What a camera sees of these actions, `late` frames after them, and a little noise."""
    actions = make_drive(steering, speed).actions.astype(np.float64)
    turns = actions[:, 0] * curvature(actions[:, 1], "road_wheel") / FPS
    noise = np.random.default_rng(1).normal(0, 0.0005, len(turns))
    return (FOCAL_WIDTHS * np.roll(turns, late) + noise)[:-1].astype(np.float32)


@pytest.fixture
def steering() -> Series:
    return steering_like_a_driver()


@pytest.fixture
def speed(steering: Series) -> Series:
    return 10 + 4 * np.sin(np.arange(len(steering)) / 40)


def test_actions_that_fit_the_picture_are_no_problem(steering: Series, speed: Series) -> None:
    for late in (0, 1, 3):
        found = measure_synchrony(motion_of(steering, speed, late), make_drive(steering, speed))
        assert found.lag_frames == -late
        assert found.lag_s == pytest.approx(-late / FPS, rel=1e-3)
        assert found.sign == 1
        assert found.correlation is not None
        assert found.correlation > 0.95
        assert found.focal_widths == pytest.approx(FOCAL_WIDTHS, rel=0.1)
        assert found.problems == ()


@pytest.mark.parametrize(("shift", "word"), [(1, "1 frame .* late"), (5, "5 frames .* late")])
def test_late_actions_are_said(steering: Series, speed: Series, shift: int, word: str) -> None:
    late = make_drive(np.roll(steering, shift), speed)
    found = measure_synchrony(motion_of(steering, speed), late)
    assert found.lag_frames == shift
    assert found.sign == 1
    (problem,) = found.problems
    assert re.search(f"{word}.*`time_offset=-{shift / FPS:.2f}`", problem)


def test_what_late_actions_said_before_the_video_contradicts_nothing(
    steering: Series, speed: Series
) -> None:
    shift = 22
    steering[-shift:] = -0.1
    said = np.roll(steering, shift)
    said[:shift] = 0.1
    found = measure_synchrony(motion_of(steering, speed), make_drive(said, speed))
    assert (found.lag_frames, found.sign) == (shift, 1)
    (problem,) = found.problems
    assert "22 frames" in problem


def test_early_and_flipped_actions_are_said(steering: Series, speed: Series) -> None:
    early = make_drive(-np.roll(steering, -6), speed)
    found = measure_synchrony(motion_of(steering, speed), early)
    assert (found.lag_frames, found.sign) == (-6, -1)
    lag, sign = found.problems
    assert "6 frames (0.40 s) early: try `time_offset=0.40`" in lag
    assert "flipped" in sign


def test_following_the_advice_removes_the_problem(steering: Series, speed: Series) -> None:
    late = make_drive(np.roll(steering, 5), np.roll(speed, 5))
    motion = motion_of(steering, speed)
    found = measure_synchrony(motion, late)
    assert found.lag_s is not None
    assert late.drive.log is not None
    log = replace(late.drive.log, times=late.drive.log.times - found.lag_s)
    mended = measure_synchrony(motion, sample(replace(late.drive, log=log)))
    assert mended.problems == ()
    assert mended.lag_frames == 0


@pytest.mark.parametrize(("scale", "word"), [(3.6, "far less"), (1 / 57.3, "far more")])
def test_a_wrong_unit_is_said(steering: Series, speed: Series, scale: float, word: str) -> None:
    # Seen through a wide lens, as most car cameras are: km/h as m/s is then out of bounds.
    motion = 0.6 * motion_of(steering, speed)
    (problem,) = measure_synchrony(motion, make_drive(steering, speed * scale)).problems
    assert word in problem
    assert "units" in problem


def test_reversing_with_a_positive_speed_is_said(steering: Series, speed: Series) -> None:
    backward = np.arange(len(steering)) // FPS == 20
    backward |= np.arange(len(steering)) // FPS == 21
    steering = np.where(backward, 0.06, steering)
    motion = motion_of(steering, np.where(backward, -speed, speed))
    (problem,) = measure_synchrony(motion, make_drive(steering, speed)).problems
    assert "from 20.0 to 21.9 s" in problem
    assert measure_synchrony(motion_of(steering, speed), make_drive(steering, speed)).problems == ()


def test_actions_of_another_video_are_said(steering: Series, speed: Series) -> None:
    found = measure_synchrony(motion_of(steering, speed), make_drive(steering[::-1], speed))
    assert found.lag_frames is None
    assert found.sign is None
    (problem,) = found.problems
    assert "does not follow the steering" in problem


def test_gaps_and_unknown_actions_take_no_part(steering: Series, speed: Series) -> None:
    sampled = make_drive(steering, speed)
    motion = motion_of(steering, speed)
    motion[99] = -0.25
    motion[200:250] = 0.25
    valid = sampled.action_valid.copy()
    valid[200:250] = False
    cut = replace(sampled, segments=[(0, 100), (100, len(steering))], action_valid=valid)
    found = measure_synchrony(motion, cut)
    assert found.correlation is not None
    assert found.correlation > 0.95


def test_what_cannot_be_told_is_not_told(steering: Series, speed: Series) -> None:
    motion = motion_of(steering, speed)
    straight = make_drive(np.zeros_like(steering), speed)
    assert measure_synchrony(motion, straight) == Synchrony()
    assert measure_synchrony(motion[:40], make_drive(steering[:41], speed[:41])) == Synchrony()
    bare = replace(straight.drive, log=None)
    assert measure_synchrony(motion, sample(bare)) == Synchrony()


def test_steering_alone_still_tells_lag_and_sign(steering: Series, speed: Series) -> None:
    without = make_drive(np.roll(-steering, 5), np.zeros_like(speed), has_speed=False)
    found = measure_synchrony(motion_of(steering, speed), without)
    assert (found.lag_frames, found.sign, found.focal_widths) == (5, -1, None)


def test_each_kind_of_steering_turns_the_car_left_when_positive() -> None:
    for kind in get_args(SteeringKind):
        assert (np.diff(curvature(np.linspace(-0.5, 0.5, 9), kind)) > 0).all()
