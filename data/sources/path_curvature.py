"""Turn a car's speed and yaw rate into actions: the speed, and the curvature of its path."""

import numpy as np

from driving_sim.data.actions.action_log import (
    SPEED_RANGE_MPS,
    STEERING_LIMIT,
    ActionLog,
    Channel,
)
from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import DriveSimError

SLOWEST_MPS = 1.0
"""Below this speed, noise outweighs the curvature, and a standing car has none."""
_FASTEST_TURN_RADPS = 6.0


def check_speed(speed: Floats, where: str) -> None:
    """Raise DriveSimError, which begins with `where`, if a speed in m/s is impossible for a car."""
    low, high = SPEED_RANGE_MPS
    _check(speed, low, high, f"{where}: has speeds", "m/s")


def path_log(times: Floats, speed: Floats, yaw_rate: Floats, origin: str) -> ActionLog:
    """Return the actions of a car at times [M] in seconds on the clock of the frames.

    `speed` [M] is in m/s, positive forwards, and `yaw_rate` [M] in rad/s, positive to the left. The
    curvature is unknown where the car is slower than 1 m/s. Raises DriveSimError, which begins with
    `origin`, if a value is impossible for a car.
    """
    check_speed(speed, origin)
    _check(yaw_rate, -_FASTEST_TURN_RADPS, _FASTEST_TURN_RADPS, f"{origin}: has yaw rates", "rad/s")
    moves = abs(speed) >= SLOWEST_MPS
    curvature = yaw_rate[moves] / speed[moves]
    limit = STEERING_LIMIT["curvature"]
    assert abs(curvature).max(initial=0) <= limit
    steering = None
    notices = ["the steering is the curvature of the path: the yaw rate divided by the speed"]
    if moves.sum() > 1:
        steering = Channel(times=times[moves], values=curvature.astype(np.float32))
    if not moves.all():
        notices.append(
            f"the curvature is unknown below {SLOWEST_MPS:g} m/s: {(~moves).mean():.0%} of the time"
        )
    return ActionLog(
        speed=Channel(times=times, values=speed.astype(np.float32)),
        steering=steering,
        steering_kind="curvature" if steering is not None else None,
        notices=tuple(notices),
        origin=origin,
    )


def _check(values: Floats, low: float, high: float, where: str, unit: str) -> None:
    if not (np.isfinite(values).all() and values.min() >= low and values.max() <= high):
        raise DriveSimError(
            f"{where} from {values.min():g} to {values.max():g} {unit}, but only {low:g} to "
            f"{high:g} is possible; leave this recording out"
        )
