"""The car: turns how the driver holds the wheel and the pedals into speed and steering."""

from dataclasses import dataclass, replace

import numpy as np

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats32, Mask
from driving_sim.world_model.world_model import WorldModel

_ACCELERATION_MPS2 = 3.0
_BRAKING_MPS2 = 6.0
_COASTING_MPS2 = 0.4
"""Deceleration with both pedals released."""
_LOCK_S = 0.5
"""Time in which the wheel turns from straight ahead to the limit."""


@dataclass(frozen=True, slots=True)
class Held:
    """How the driver holds the wheel (-1 right to 1 left) and the pedals (0 to 1)."""

    wheel: float = 0.0
    throttle: float = 0.0
    brake: float = 0.0

    @property
    def is_neutral(self) -> bool:
        """Whether the driver touches neither wheel nor pedals."""
        return self == Held()


@dataclass(frozen=True, slots=True)
class Car:
    """Speed and steering at a frame. The driver keeps both within the training data's range."""

    speed_mps: float
    steering: float
    """In the unit of the model's steering kind, left positive."""
    limits_mps: tuple[float, float]
    steering_limit: float
    """The training data's 99th percentile of |steering|."""
    known: tuple[bool, bool]
    """Whether the model learned speed, and whether it learned steering."""

    @classmethod
    def of(cls, world: WorldModel, action: Floats32, valid: Mask) -> "Car":
        """Return the car after the last action [2] of a context.

        An unknown speed becomes the usual one, an unknown steering becomes 0.
        """
        statistics = world.statistics
        limits, most = statistics.speed_limits, statistics.steering_p99
        speed = float(action[SPEED]) if valid[SPEED] else statistics.mean[SPEED]
        steering = float(action[STEERING]) if valid[STEERING] else 0.0
        return cls(
            float(np.clip(speed, *limits)),
            float(np.clip(steering, -most, most)),
            limits,
            most,
            world.known_channels,
        )

    def after(self, held: Held, dt: float) -> "Car":
        """Return the car `dt` seconds later. The wheel turns at a rate to where it is held."""
        pull = held.throttle * _ACCELERATION_MPS2 - held.brake * _BRAKING_MPS2
        if held.throttle == held.brake == 0:
            pull = -_COASTING_MPS2
        speed = float(np.clip(self.speed_mps + pull * dt, *self.limits_mps))
        reach = self.steering_limit * dt / _LOCK_S
        turn = held.wheel * self.steering_limit - self.steering
        return self.at(speed, self.steering + float(np.clip(turn, -reach, reach)))

    def at(self, speed_mps: float, steering: float) -> "Car":
        """Return the car with another speed and steering."""
        return replace(self, speed_mps=speed_mps, steering=steering)

    @property
    def action(self) -> Floats32:
        """Speed and steering, float32 [2]; NaN where the model learned none."""
        values = np.array([self.speed_mps, self.steering], np.float32)
        return np.where(self.known, values, np.float32(np.nan))
