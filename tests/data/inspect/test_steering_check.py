import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest

from driving_sim.data.actions.action_log import ActionLog, SteeringKind
from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.drive import Drive, SampledDrive, sample
from driving_sim.data.inspect.steering_check import Synchrony, curvature, measure_synchrony
from driving_sim.data.video.frame_size import FrameSize

FPS = 15
FOCAL_WIDTHS = 0.8
Series = npt.NDArray[np.float64]


class NoFrames:
    """Frames that nobody reads, because the check only needs their measured motion."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        raise AssertionError

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        raise AssertionError

    def files(self, indices: Ints) -> list[Path]:
        raise AssertionError


def steering_like_a_driver(seconds: float = 40) -> Series:
    """Road-wheel angles in rad: short turns to both sides, with straight stretches between them."""
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
    log = ActionLog.on_one_clock(times, np.stack([speed, steering], axis=1), kind)
    log = log.only((has_speed, True))
    return sample(Drive(id="a", source="video", timestamps=times, reader=NoFrames(), log=log))


def motion_of(steering: Series, speed: Series, late: int = 0) -> npt.NDArray[np.float32]:
    """The image motion `late` frames after these actions, with a little noise."""
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
        synchrony = measure_synchrony(motion_of(steering, speed, late), make_drive(steering, speed))
        assert synchrony.lag_frames == -late
        assert synchrony.lag_s == pytest.approx(-late / FPS, rel=1e-3)
        assert synchrony.sign == 1
        assert synchrony.correlation is not None
        assert synchrony.correlation > 0.95
        assert synchrony.focal_widths == pytest.approx(FOCAL_WIDTHS, rel=0.1)
        assert synchrony.problems == ()


@pytest.mark.parametrize(("shift", "word"), [(1, "1 frame .* late"), (5, "5 frames .* late")])
def test_late_actions_are_reported(steering: Series, speed: Series, shift: int, word: str) -> None:
    late = make_drive(np.roll(steering, shift), speed)
    synchrony = measure_synchrony(motion_of(steering, speed), late)
    assert synchrony.lag_frames == shift
    assert synchrony.sign == 1
    (problem,) = synchrony.problems
    assert re.search(f"{word}.*`time_offset=-{shift / FPS:.2f}`", problem)


def test_late_actions_from_before_the_video_cause_no_second_problem(
    steering: Series, speed: Series
) -> None:
    shift = 22
    steering[-shift:] = -0.1
    late = np.roll(steering, shift)
    late[:shift] = 0.1
    synchrony = measure_synchrony(motion_of(steering, speed), make_drive(late, speed))
    assert (synchrony.lag_frames, synchrony.sign) == (shift, 1)
    (problem,) = synchrony.problems
    assert "22 frames" in problem


def test_early_and_flipped_actions_are_reported(steering: Series, speed: Series) -> None:
    early = make_drive(-np.roll(steering, -6), speed)
    synchrony = measure_synchrony(motion_of(steering, speed), early)
    assert (synchrony.lag_frames, synchrony.sign) == (-6, -1)
    lag, sign = synchrony.problems
    assert "6 frames (0.40 s) early" in lag
    assert "shift them by `time_offset=0.40`" in lag
    assert "flipped" in sign


def test_following_the_advice_removes_the_problem(steering: Series, speed: Series) -> None:
    late = make_drive(np.roll(steering, 5), np.roll(speed, 5))
    motion = motion_of(steering, speed)
    synchrony = measure_synchrony(motion, late)
    assert synchrony.lag_s is not None
    assert late.drive.log is not None
    assert late.drive.log.speed is not None
    assert late.drive.log.steering is not None
    log = replace(
        late.drive.log,
        speed=late.drive.log.speed.shifted(-synchrony.lag_s),
        steering=late.drive.log.steering.shifted(-synchrony.lag_s),
    )
    mended = measure_synchrony(motion, sample(replace(late.drive, log=log)))
    assert mended.problems == ()
    assert mended.lag_frames == 0


@pytest.mark.parametrize(("scale", "word"), [(3.6, "far less"), (1 / 57.3, "far more")])
def test_a_wrong_unit_is_reported(steering: Series, speed: Series, scale: float, word: str) -> None:
    # Most car cameras have a wide lens. With one, km/h taken for m/s is out of bounds.
    motion = 0.6 * motion_of(steering, speed)
    (problem,) = measure_synchrony(motion, make_drive(steering, speed * scale)).problems
    assert word in problem
    assert "units" in problem


def test_reversing_with_a_positive_speed_is_reported(steering: Series, speed: Series) -> None:
    backward = np.arange(len(steering)) // FPS == 20
    backward |= np.arange(len(steering)) // FPS == 21
    steering = np.where(backward, 0.06, steering)
    motion = motion_of(steering, np.where(backward, -speed, speed))
    (problem,) = measure_synchrony(motion, make_drive(steering, speed)).problems
    assert "from 20.0 to 21.9 s" in problem
    assert measure_synchrony(motion_of(steering, speed), make_drive(steering, speed)).problems == ()


def test_actions_of_another_video_are_reported(steering: Series, speed: Series) -> None:
    synchrony = measure_synchrony(motion_of(steering, speed), make_drive(steering[::-1], speed))
    assert synchrony.lag_frames is None
    assert synchrony.sign is None
    (problem,) = synchrony.problems
    assert "does not follow the steering" in problem


def test_gaps_and_unknown_actions_are_ignored(steering: Series, speed: Series) -> None:
    sampled = make_drive(steering, speed)
    motion = motion_of(steering, speed)
    motion[99] = -0.25
    motion[200:250] = 0.25
    valid = sampled.action_valid.copy()
    valid[200:250] = False
    cut = replace(sampled, segments=[(0, 100), (100, len(steering))], action_valid=valid)
    synchrony = measure_synchrony(motion, cut)
    assert synchrony.correlation is not None
    assert synchrony.correlation > 0.95


def test_nothing_is_reported_if_lag_and_sign_are_unknown(steering: Series, speed: Series) -> None:
    motion = motion_of(steering, speed)
    straight = make_drive(np.zeros_like(steering), speed)
    assert measure_synchrony(motion, straight) == Synchrony()
    assert measure_synchrony(motion[:40], make_drive(steering[:41], speed[:41])) == Synchrony()
    bare = replace(straight.drive, log=None)
    assert measure_synchrony(motion, sample(bare)) == Synchrony()


def test_steering_without_speed_is_enough_for_lag_and_sign(steering: Series, speed: Series) -> None:
    without = make_drive(np.roll(-steering, 5), np.zeros_like(speed), has_speed=False)
    synchrony = measure_synchrony(motion_of(steering, speed), without)
    assert (synchrony.lag_frames, synchrony.sign, synchrony.focal_widths) == (5, -1, None)


def test_positive_steering_of_every_kind_turns_the_car_left() -> None:
    for kind in get_args(SteeringKind):
        assert (np.diff(curvature(np.linspace(-0.5, 0.5, 9), kind)) > 0).all()
