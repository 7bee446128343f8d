"""Units are judged by the focal length that would explain the motion in the picture."""

import numpy as np
import pytest

from driving_sim.data.inspect.steering_check import measure_synchrony
from driving_sim.data.inspect.units import Units, judge_units
from driving_sim.data.inspect.view import CLEAR, View
from tests.data.inspect.steered_drives import (
    FOCAL_WIDTHS,
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


@pytest.mark.parametrize(
    ("speed_scale", "steering_scale", "word"), [(3.6, 1, "far less"), (1, 1 / 57.3, "far more")]
)
def test_a_wrong_unit_is_reported(
    steering: Series, speed: Series, speed_scale: float, steering_scale: float, word: str
) -> None:
    # Most car cameras have a wide lens. With one, km/h taken for m/s is out of bounds.
    motion = 0.6 * motion_of(steering, speed)
    spoilt = make_drive(steering * steering_scale, speed * speed_scale)
    (problem,) = measure_synchrony(motion, spoilt).problems
    assert word in problem
    assert "check their units, the kind of steering, and `wheelbase`" in problem


def test_the_unit_is_judged_only_where_the_fit_is_good() -> None:
    assert judge_units(30, 0.95, "road_wheel", 2.7, CLEAR).problem
    for correlation, view, reason in (
        (0.55, CLEAR, "the correlation is only 0.55"),
        (0.95, View(is_faint=True), "the picture has too little texture"),
    ):
        units = judge_units(30, correlation, "road_wheel", 2.7, view)
        line = f"the units of speed and steering cannot be checked: {reason}"
        assert units == Units(notices=(line,))


def test_noise_alone_makes_no_unit_wrong() -> None:
    # A factor of 3.5 at a correlation of 0.8 can come from a focal length of 2.8 picture widths.
    assert judge_units(3.5, 0.8, "road_wheel", 2.7, CLEAR) == Units()
    assert judge_units(3.5, 0.95, "road_wheel", 2.7, CLEAR).problem
    assert judge_units(0.17, 0.8, "road_wheel", 2.7, CLEAR) == Units()
    assert judge_units(0.17, 0.95, "road_wheel", 2.7, CLEAR).problem


def test_the_wheels_of_a_normalised_steering_may_turn_half_as_far() -> None:
    assert judge_units(0.15, 0.95, "normalised", 2.7, CLEAR) == Units()
    assert judge_units(0.08, 0.95, "normalised", 2.7, CLEAR).problem


def test_the_wheelbase_of_a_model_car_explains_its_turns(steering: Series, speed: Series) -> None:
    small, slow = 0.26, speed / 10
    motion = motion_of(steering, slow, wheelbase_m=small)
    (problem,) = measure_synchrony(motion, make_drive(steering, slow)).problems
    assert "`wheelbase`" in problem
    synchrony = measure_synchrony(motion, make_drive(steering, slow, wheelbase_m=small))
    assert synchrony.problems == ()
    assert synchrony.focal_widths == pytest.approx(FOCAL_WIDTHS, rel=0.1)


def test_normalised_actions_of_a_small_car_are_a_notice(steering: Series, speed: Series) -> None:
    # Wheels of full lock turn by 0.5 rad, so the normalised steering is twice the angle.
    slow = speed / 10
    motion = motion_of(steering, slow, wheelbase_m=0.26)
    synchrony = measure_synchrony(motion, make_drive(2 * steering, slow, "normalised"))
    assert synchrony.problems == ()
    (notice,) = synchrony.notices
    assert "a car with a wheelbase of about 0.3 m; if it is one, set `wheelbase`" in notice
    # No car is that small.
    tiny = make_drive(steering / 10, slow, "normalised")
    assert "far more" in measure_synchrony(motion, tiny).problems[0]


def test_a_model_car_may_have_a_curvature_above_1(steering: Series, speed: Series) -> None:
    tight, slow = 25 * steering, np.ones_like(speed)
    assert np.abs(tight).max() > 2
    drive = make_drive(tight, slow, "curvature")
    turns = drive.actions[:-1, 0] * drive.actions[:-1, 1] * np.diff(drive.timestamps)
    for sign, problems in ((1, 0), (-1, 1)):
        motion = (sign * FOCAL_WIDTHS * turns).astype(np.float32)
        synchrony = measure_synchrony(motion, drive)
        assert (synchrony.lag_frames, synchrony.sign) == (0, sign)
        assert synchrony.focal_widths == pytest.approx(FOCAL_WIDTHS, rel=0.1)
        assert len(synchrony.problems) == problems
