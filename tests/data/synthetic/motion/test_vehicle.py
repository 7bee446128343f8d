import math

import numpy as np
import pytest

from driving_sim.data.synthetic.motion.vehicle import (
    MAX_STEERING_RAD,
    WHEELBASE_M,
    VehicleState,
    step_vehicle,
)


def test_two_half_steps_equal_one_step() -> None:
    start = VehicleState(3.0, -2.0, 0.4, 1.0)
    for steering in (-0.3, 0.0, 1e-12, 0.2):
        half = step_vehicle(start, 9.0, steering, 0.05)
        two_steps = step_vehicle(half, 9.0, steering, 0.05)
        one_step = step_vehicle(start, 9.0, steering, 0.1)
        for name in VehicleState.__slots__:
            assert getattr(two_steps, name) == pytest.approx(getattr(one_step, name), abs=1e-9)


def test_steering_left_drives_an_anticlockwise_circle() -> None:
    steering, steps = 0.2, 40
    radius = WHEELBASE_M / math.tan(steering)
    state, places = VehicleState(0.0, 0.0, 0.0, 0.0), []
    for _ in range(steps):
        state = step_vehicle(state, 2 * math.pi * radius / steps, steering, 1.0)
        places.append(math.hypot(state.x_m, state.y_m - radius))
    np.testing.assert_allclose(places, radius)
    assert state.heading_rad == pytest.approx(2 * math.pi)
    assert (state.x_m, state.y_m) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_the_wheels_turn_no_further_than_their_stop() -> None:
    start = VehicleState(0.0, 0.0, 0.0, 0.0)
    stop = step_vehicle(start, 5.0, MAX_STEERING_RAD, 0.1)
    assert step_vehicle(start, 5.0, 2.0, 0.1) == stop
