import numpy as np
import pytest

from driving_sim.play.car import Car, Held

KNOWN = (True, True)


def car(speed_mps: float = 5.0, steering: float = 0.0) -> Car:
    return Car(speed_mps, steering, (0.0, 12.0), 0.2, KNOWN)


def driven(start: Car, held: Held, seconds: float, dt: float = 0.1) -> Car:
    for _ in range(round(seconds / dt)):
        start = start.after(held, dt)
    return start


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_wheel_turns_at_a_rate_and_returns(side: float) -> None:
    first = car().after(Held(wheel=side), 0.1)
    assert 0 < side * first.steering < 0.2
    locked = driven(car(), Held(wheel=side), 2.0)
    assert locked.steering == pytest.approx(0.2 * side)
    released = locked.after(Held(), 0.1)
    assert 0 < side * released.steering < 0.2
    assert driven(locked, Held(), 2.0).steering == pytest.approx(0)


def test_the_wheel_stops_where_it_is_held() -> None:
    assert driven(car(), Held(wheel=0.3), 2.0).steering == pytest.approx(0.06)


def test_the_pedals_change_the_speed_within_the_limits() -> None:
    assert car().after(Held(throttle=1.0), 0.1).speed_mps > 5
    assert car().after(Held(brake=1.0), 0.1).speed_mps < car().after(Held(), 0.1).speed_mps < 5
    assert driven(car(), Held(throttle=1.0), 60.0).speed_mps == 12
    assert driven(car(), Held(brake=1.0), 60.0).speed_mps == 0


def test_a_pedal_that_is_pressed_more_does_more() -> None:
    speeds = [car().after(Held(throttle=share), 0.1).speed_mps for share in (0.2, 0.6, 1.0)]
    assert np.all(np.diff(speeds) > 0)


def test_time_can_be_cut_into_any_steps() -> None:
    held = Held(wheel=1.0, throttle=0.5)
    fine, coarse = driven(car(), held, 1.0, 0.05), driven(car(), held, 1.0, 0.1)
    assert fine.speed_mps == pytest.approx(coarse.speed_mps)
    assert fine.steering == pytest.approx(coarse.steering)


def test_a_channel_that_the_model_never_learned_is_unknown() -> None:
    action = Car(5.0, 0.1, (0.0, 12.0), 0.2, (True, False)).action
    assert action[0] == 5
    assert np.isnan(action[1])
