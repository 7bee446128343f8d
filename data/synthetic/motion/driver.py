"""The driver: follows the road, but with actions that cannot be predicted from the picture.

A model can learn the effect of steering only if it cannot infer the steering from the road. The
driver therefore swerves off the road to both sides, drives off-centre, goes straight on in a bend,
brakes to a stop for no reason, and returns to the road.
"""

import math
from dataclasses import dataclass

import numpy as np

from driving_sim.data.synthetic.motion.vehicle import WHEELBASE_M, VehicleState
from driving_sim.data.synthetic.road import LANE_OFFSET, Road
from driving_sim.data.synthetic.world import SyntheticConfig

_ACCELERATION_MPS2 = 2.5
_STEERING_RATE_RADPS = 1.2
_MOST_STEERING_RAD = 0.2


@dataclass(frozen=True, slots=True)
class _Manoeuvre:
    """A manoeuvre of a few seconds, such as a swerve or a stop."""

    seconds: float
    speed_mps: float
    """Target speed in m/s."""
    braking_mps2: float = 2.5
    offset_m: float = LANE_OFFSET
    """Target offset from the centre line in metres, left positive, if `steering_rad` is None."""
    steering_rad: float | None = None
    """Fixed road-wheel angle in radians, or None to follow the road."""


class Driver:
    """Chooses the action of each frame from the car's state, partly at random."""

    def __init__(self, road: Road, seed: int, config: SyntheticConfig) -> None:
        self._road = road
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._speed = float(self._rng.choice([0.0, self._cruising_speed()]))
        self._steering = 0.0
        self._deck: list[str] = []
        self._sides: list[float] = []
        self._now = self._follow()
        self._remaining = self._now.seconds

    def act(self, state: VehicleState, dt: float) -> tuple[float, float]:
        """Return the speed (m/s) and the road-wheel angle (rad) for the next `dt` seconds."""
        if self._remaining <= 0:
            self._now = self._next(state)
            self._remaining = self._now.seconds
        self._remaining -= dt
        now = self._now
        change = now.speed_mps - self._speed
        self._speed += min(max(change, -now.braking_mps2 * dt), _ACCELERATION_MPS2 * dt)
        target = now.steering_rad
        if target is None:
            target = self._towards(state, now.offset_m)
        # Limit the steering so that the tyres do not slip at this speed.
        grip = self._config.lateral_mps2 * WHEELBASE_M / max(self._speed, 1.0) ** 2
        most = min(math.atan(grip), _MOST_STEERING_RAD)
        turn = min(max(target, -most), most) - self._steering
        reach = _STEERING_RATE_RADPS * dt
        self._steering += min(max(turn, -reach), reach)
        return self._speed, self._steering

    def _towards(self, state: VehicleState, offset_m: float) -> float:
        """Return the steering angle that leads to an offset on the road ahead.

        The method is pure pursuit (Coulter 1992).
        """
        station, _, slope = self._road.project(np.array([state.x_m]), np.array([state.y_m]))
        ahead = (6.0 + 0.8 * self._speed) / math.hypot(1.0, slope[0])
        x, y, _ = self._road.place(station + ahead, np.array([offset_m]))
        dx, dy = float(x[0]) - state.x_m, float(y[0]) - state.y_m
        bearing = math.remainder(math.atan2(dy, dx) - state.heading_rad, 2 * math.pi)
        if abs(bearing) > math.pi / 2:
            return math.copysign(_MOST_STEERING_RAD, bearing)
        return math.atan(2 * WHEELBASE_M * math.sin(bearing) / math.hypot(dx, dy))

    def _cruising_speed(self) -> float:
        return float(self._rng.uniform(*self._config.cruise_mps))

    def _follow(self) -> _Manoeuvre:
        near, anywhere = self._rng.normal(LANE_OFFSET, 0.5), self._rng.uniform(-4.5, 4.5)
        seconds, speed = self._rng.uniform(2.0, 5.0), self._cruising_speed()
        offset = float(near if self._rng.random() < 0.5 else anywhere)
        return _Manoeuvre(seconds, speed, offset_m=offset)

    def _side(self) -> float:
        """Return 1 (left) or -1 (right), at random but equally often."""
        if not self._sides:
            self._sides = self._rng.permutation([-1.0, 1.0, -1.0, 1.0]).tolist()
        return self._sides.pop()

    def _next(self, state: VehicleState) -> _Manoeuvre:
        _, offset, _ = self._road.project(np.array([state.x_m]), np.array([state.y_m]))
        # Follow the road for a while after a manoeuvre that steers freely, after a stop, or if the
        # car is far off the road.
        if self._now.steering_rad is not None or self._now.speed_mps == 0.0 or abs(offset) > 6.0:
            return self._follow()
        if not self._deck:
            kinds = ["swerve", "swerve", "swerve", "swerve", "straight", "stop", "stop", "follow"]
            self._deck = self._rng.permutation(kinds).tolist()
        rng = self._rng
        match self._deck.pop():
            case "swerve":
                seconds = rng.uniform(0.8, 2.6)
                speed = self._speed if rng.random() < 0.6 else self._cruising_speed()
                braking, side = rng.uniform(2.0, 5.0), self._side()
                steering = side * rng.uniform(*self._config.swerves_rad)
                return _Manoeuvre(seconds, speed, braking, steering_rad=steering)
            case "straight":
                return _Manoeuvre(rng.uniform(1.5, 3.0), self._speed, steering_rad=0.0)
            case "stop":
                braking = rng.uniform(2.5, 5.5)
                seconds = self._speed / braking + rng.uniform(*self._config.stops_s)
                straight = rng.random() < 0.4
                return _Manoeuvre(seconds, 0.0, braking, steering_rad=0.0 if straight else None)
            case _:
                return self._follow()
