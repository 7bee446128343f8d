"""A clock of the actions that runs too fast or too slow is named as a drift, not as a lag."""

from dataclasses import replace

import numpy as np
import pytest

from driving_sim.data.actions.action_log import Channel
from driving_sim.data.drive import SampledDrive, sample
from driving_sim.data.inspect.drift import Drift
from driving_sim.data.inspect.steering_check import measure_synchrony
from tests.data.inspect.steered_drives import (
    FPS,
    Series,
    make_drive,
    motion_of,
    steering_like_a_driver,
)

SECONDS = 60


@pytest.fixture
def steering() -> Series:
    return np.concatenate([steering_like_a_driver(SECONDS / 2)] * 2)


def drifting(steering: Series, speed: Series, at_start: float, at_end: float) -> SampledDrive:
    """A drive whose actions are late by so many seconds at its start and at its end."""
    sampled = make_drive(steering, speed)
    assert sampled.drive.log is not None

    def late(channel: Channel | None) -> Channel | None:
        if channel is None:
            return None
        delay = at_start + (at_end - at_start) * channel.times / channel.times[-1]
        return replace(channel, times=channel.times + delay)

    log = sampled.drive.log
    log = replace(log, speed=late(log.speed), steering=late(log.steering))
    return sample(replace(sampled.drive, log=log))


@pytest.mark.parametrize(
    ("at_start", "at_end", "words"),
    [
        (0.1, 0.6, "0.8 % fast"),
        (0.0, -0.8, "1.3 % slow"),
        (-0.4, 0.4, "1.3 % fast"),
    ],
)
def test_a_drift_is_named_with_its_size(
    steering: Series, at_start: float, at_end: float, words: str
) -> None:
    speed = np.full_like(steering, 10.0)
    drive = drifting(steering, speed, at_start, at_end)
    synchrony = measure_synchrony(motion_of(steering, speed), drive)
    assert synchrony.drift is not None
    assert synchrony.drift.lags_s == pytest.approx((at_start, at_end), abs=2 / FPS)
    assert synchrony.drift.rate == pytest.approx((at_end - at_start) / SECONDS, abs=0.003)
    assert synchrony.lag_s == pytest.approx((at_start + at_end) / 2, abs=2 / FPS)
    assert synchrony.sign == 1
    (problem,) = synchrony.problems
    assert problem == synchrony.drift.problem


def test_the_message_says_how_late_both_ends_are() -> None:
    drift = Drift(lags=(1, 6), lags_s=(0.1, 0.6), measured_s=120)
    assert drift.problem.startswith(
        "the actions drift: 0.10 s late at the start, 0.60 s late at the end of the 120 s "
        "measured; their clock runs 0.42 % fast: "
    )
    early = Drift(lags=(0, -6), lags_s=(0.0, -0.6), measured_s=120)
    assert "0.00 s late at the start, 0.60 s early at the end" in early.problem
    assert "0.5 % slow" in early.problem


def test_a_steady_lag_is_no_drift(steering: Series) -> None:
    speed = np.full_like(steering, 10.0)
    late = measure_synchrony(motion_of(steering, speed), drifting(steering, speed, 0.4, 0.4))
    assert (late.drift, late.lag_frames) == (None, 6)
    assert "6 frames" in late.problems[0]


def test_one_late_turn_at_the_end_is_no_drift(steering: Series) -> None:
    speed = np.full_like(steering, 10.0)
    frames = np.arange(len(steering))
    at = len(steering) - 90
    turn = 0.1 * np.exp(-(((frames - at) / 10) ** 2)) * np.sign(at - frames)
    late = make_drive(0.3 * steering + np.roll(turn, 6), speed)
    synchrony = measure_synchrony(motion_of(0.3 * steering + turn, speed), late)
    assert (synchrony.drift, synchrony.lag_frames) == (None, 0)


def test_a_drift_that_hardly_fits_better_is_not_named(steering: Series) -> None:
    speed = np.full_like(steering, 10.0)
    motion = motion_of(steering, speed)
    drive = drifting(steering, speed, 0.0, 0.3)
    assert measure_synchrony(motion, drive).drift is not None
    shaking = np.random.default_rng(2).normal(0, 1.2 * motion.std(), len(motion))
    synchrony = measure_synchrony((motion + shaking).astype(np.float32), drive)
    assert synchrony.drift is None
    assert synchrony.sign == 1


def test_a_drift_with_a_flipped_sign_is_both(steering: Series) -> None:
    speed = np.full_like(steering, 10.0)
    drive = drifting(-steering, speed, 0.0, 1.0)
    synchrony = measure_synchrony(motion_of(steering, speed), drive)
    assert synchrony.sign == -1
    drift, sign = synchrony.problems
    assert "drift" in drift
    assert "flipped" in sign
