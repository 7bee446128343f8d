import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from driving_sim.data.actions.action_log import Channel, SteeringKind
from driving_sim.data.drive import sample
from driving_sim.data.inspect.steering_check import Synchrony, measure_synchrony
from driving_sim.data.inspect.turns import curvature
from driving_sim.data.inspect.view import View
from tests.data.inspect.steered_drives import (
    FOCAL_WIDTHS,
    FPS,
    Series,
    make_drive,
    motion_of,
    steering_like_a_driver,
)


@pytest.fixture
def steering() -> Series:
    return steering_like_a_driver()


@pytest.fixture
def speed(steering: Series) -> Series:
    return 10 + 4 * np.sin(np.arange(len(steering)) / 40)


def shifted(channel: Channel, seconds: float) -> Channel:
    return replace(channel, times=channel.times + seconds)


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
        speed=shifted(late.drive.log.speed, -synchrony.lag_s),
        steering=shifted(late.drive.log.steering, -synchrony.lag_s),
    )
    mended = measure_synchrony(motion, sample(replace(late.drive, log=log)))
    assert mended.problems == ()
    assert mended.lag_frames == 0


def test_one_wrong_pair_of_frames_does_not_decide(steering: Series, speed: Series) -> None:
    """The last picture is the first one again, so the scene seems to leap by a quarter."""
    true = measure_synchrony(motion_of(steering, speed), make_drive(steering, speed))
    for at, leap in ((-1, 0.25), (-1, -0.25), (50, 0.25), (300, -0.25)):
        motion = motion_of(steering, speed)
        motion[at] = leap
        synchrony = measure_synchrony(motion, make_drive(steering, speed))
        assert (synchrony.lag_frames, synchrony.sign, synchrony.problems) == (0, 1, ())
        assert synchrony.focal_widths == pytest.approx(true.focal_widths, rel=0.05)
        # Without any other motion, the leap is not taken for a turn.
        motion[:] = 0
        motion[at] = leap
        synchrony = measure_synchrony(motion, make_drive(steering, speed))
        reason = "lag and sign are unknown: the picture hardly moves sideways"
        assert synchrony == Synchrony(notices=(reason,))


def test_a_skid_does_not_hide_the_lag(steering: Series, speed: Series) -> None:
    """For 1.5 s of 40, the car spins to the right although its wheels point to the left."""
    steering[200:222] = 0.04
    motion = motion_of(steering, speed)
    motion[200:222] = -0.15
    for shift in (0, 5):
        synchrony = measure_synchrony(motion, make_drive(np.roll(steering, shift), speed))
        assert (synchrony.lag_frames, synchrony.sign) == (shift, 1)
        # A spin is much faster than the turns that were steered, so it is no reversing.
        assert not [line for line in synchrony.problems if "reverses" in line]


def test_reversing_for_a_tenth_of_the_time_does_not_hide_the_sign(
    steering: Series, speed: Series
) -> None:
    times = np.arange(len(steering)) / FPS
    backward = (times >= 20) & (times < 24)
    steering = np.where(backward, 0.12 * np.sin(3 * times), steering)
    motion = motion_of(steering, np.where(backward, -speed, speed))
    synchrony = measure_synchrony(motion, make_drive(steering, speed))
    assert (synchrony.lag_frames, synchrony.sign) == (0, 1)
    assert synchrony.correlation is not None
    assert synchrony.correlation > 0.95
    (problem,) = synchrony.problems
    assert "reverses" in problem


def test_one_late_turn_is_no_late_log(steering: Series, speed: Series) -> None:
    """The log missed some samples during the largest turn."""
    frames = np.arange(len(steering))
    turn = 0.1 * np.exp(-(((frames - 300) / 15) ** 2)) * np.sign(300 - frames)
    late = make_drive(0.2 * steering + np.roll(turn, 10), speed)
    synchrony = measure_synchrony(motion_of(0.2 * steering + turn, speed), late)
    assert (synchrony.lag_frames, synchrony.problems) == (0, ())


def test_a_single_turn_is_no_evidence(steering: Series, speed: Series) -> None:
    bump = np.exp(-(((np.arange(len(steering)) - 300) / 6) ** 2)) * 0.1
    flipped = make_drive(-bump, speed)
    (notice,) = measure_synchrony(motion_of(bump, speed), flipped).notices
    assert notice == "lag and sign are unknown: the car turns at too few moments"
    assert measure_synchrony(motion_of(bump, speed), flipped).sign is None


def test_a_car_that_hardly_drives_is_not_judged(steering: Series, speed: Series) -> None:
    creeping = make_drive(-steering, np.full_like(speed, 0.2))
    synchrony = measure_synchrony(motion_of(steering, speed), creeping)
    assert synchrony == Synchrony(notices=("lag and sign are unknown: the car hardly drives",))


def test_a_weak_fit_is_no_verdict(steering: Series, speed: Series) -> None:
    """The picture follows other things too, such as a shaking camera."""
    motion = motion_of(steering, speed)
    noise = np.random.default_rng(5).normal(0, 2.2 * motion.std(), len(motion))
    flipped = make_drive(-steering, 0.05 * speed + 1)
    (notice,) = measure_synchrony(motion + noise.astype(np.float32), flipped).notices
    assert "the picture does not follow the steering clearly (strongest correlation" in notice


def test_a_view_from_above_is_no_verdict(steering: Series, speed: Series) -> None:
    flipped = make_drive(-steering, speed)
    synchrony = measure_synchrony(motion_of(steering, speed), flipped, View(is_from_above=True))
    reason = "lag and sign are unknown: the camera looks at the ground from above"
    assert synchrony == Synchrony(notices=(reason,))


def test_poor_texture_is_the_reason_if_the_picture_does_not_follow(
    steering: Series, speed: Series
) -> None:
    motion, others = motion_of(steering, speed), make_drive(steering[::-1], speed)
    assert measure_synchrony(motion, others).problems != ()
    synchrony = measure_synchrony(motion, others, View(is_faint=True))
    assert synchrony.problems == ()
    assert "unknown: the picture has too little texture" in synchrony.notices[0]


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
    assert measure_synchrony(motion, straight) == Synchrony(
        notices=("lag and sign are unknown: the car hardly turns",)
    )
    short = make_drive(steering[:41], speed[:41])
    assert measure_synchrony(motion[:40], short) == Synchrony(
        notices=("lag and sign are unknown: fewer than 60 frames have known actions",)
    )
    bare = replace(straight.drive, log=None)
    assert measure_synchrony(motion, sample(bare)) == Synchrony()


def test_steering_without_speed_is_enough_for_lag_and_sign(steering: Series, speed: Series) -> None:
    without = make_drive(np.roll(-steering, 5), np.zeros_like(speed), has_speed=False)
    synchrony = measure_synchrony(motion_of(steering, speed), without)
    assert (synchrony.lag_frames, synchrony.sign, synchrony.focal_widths) == (5, -1, None)


def test_positive_steering_of_every_kind_turns_the_car_left() -> None:
    for kind in get_args(SteeringKind):
        assert (np.diff(curvature(np.linspace(-0.5, 0.5, 9), kind, 2.7)) > 0).all()
