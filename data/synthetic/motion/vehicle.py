"""The car: a kinematic bicycle model, integrated exactly."""

import math
from dataclasses import dataclass

WHEELBASE_M = 2.7
MAX_STEERING_RAD = 0.6


@dataclass(frozen=True, slots=True)
class VehicleState:
    """Position, heading and time of the car. The future depends only on these and the actions."""

    x_m: float
    y_m: float
    heading_rad: float
    """Heading in radians, anticlockwise from the x axis; may exceed a full turn."""
    time_s: float


def step_vehicle(
    state: VehicleState, speed_mps: float, steering_rad: float, dt: float
) -> VehicleState:
    """Return the state after `dt` seconds at a constant speed and road-wheel angle (left positive).

    The rear axle moves along a circular arc, so two half steps equal one whole step. Steering
    is limited to `MAX_STEERING_RAD`.
    """
    steering = min(max(steering_rad, -MAX_STEERING_RAD), MAX_STEERING_RAD)
    distance = speed_mps * dt
    half_turn = 0.5 * distance * math.tan(steering) / WHEELBASE_M
    # The chord of the arc points along the mean heading. Its length is that of the arc times
    # sin(a) / a, where a is `half_turn`.
    chord = distance * (math.sin(half_turn) / half_turn if abs(half_turn) > 1e-9 else 1.0)
    direction = state.heading_rad + half_turn
    return VehicleState(
        x_m=state.x_m + chord * math.cos(direction),
        y_m=state.y_m + chord * math.sin(direction),
        heading_rad=state.heading_rad + 2 * half_turn,
        time_s=state.time_s + dt,
    )
