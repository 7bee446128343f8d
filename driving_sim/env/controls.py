"""Turn an agent's actions, two numbers in [-1, 1], into speed and steering.

Axes: N environments.
"""

from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say
from driving_sim.world_model.actions import CHANNELS
from driving_sim.world_model.world_model import WorldModel

ACCELERATION_MPS2 = 3.0
"""Default acceleration for an action of 1, in m/s²."""

_told: "WeakSet[WorldModel]" = WeakSet()


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """What an action means: the scale of both channels, and the limits of the speed.

    The first number of an action changes the speed, the second one is the steering.
    """

    acceleration_mps2: float
    """Acceleration for an action of 1; the speed changes by it, times the length of a step."""
    slowest_mps: float
    fastest_mps: float
    """Limits of the speed, from the training data."""
    usual_mps: float
    """Speed to begin with if the context's speed is unknown."""
    steering_limit: float
    """Steering for an action of 1, in the unit of the model's steering kind."""
    step_s: float
    """Length of a step in s."""
    known: tuple[bool, bool]
    """Whether the model was trained with speed, and whether it was trained with steering."""

    @classmethod
    def of(cls, world: WorldModel, acceleration_mps2: float = ACCELERATION_MPS2) -> "Controls":
        """Scale actions to the training data of a model.

        Says once for each model which channel has no effect. Raises DriveSimError if the
        acceleration is not positive.
        """
        if not 0 < acceleration_mps2 < np.inf:
            raise DriveSimError(
                f"`acceleration_mps2` {acceleration_mps2:g}: must be a positive number of m/s²"
            )
        statistics = world.statistics
        slowest_mps, fastest_mps = statistics.speed_limits
        _tell_unknown(world)
        return cls(
            acceleration_mps2=acceleration_mps2,
            slowest_mps=slowest_mps,
            fastest_mps=fastest_mps,
            usual_mps=statistics.mean[SPEED],
            steering_limit=statistics.steering_p99,
            step_s=1 / world.fps,
            known=world.known_channels,
        )

    def checked(self, actions: ArrayLike, count: int) -> Floats:
        """Return actions [N, 2], clipped to [-1, 1].

        Raises DriveSimError for another shape, and for numbers that are not finite.
        """
        values = np.asarray(actions, np.float64)
        if values.shape != (count, len(CHANNELS)):
            raise DriveSimError(
                f"actions of shape {list(values.shape)}: must be {[count, len(CHANNELS)]}, the "
                "change of speed and the steering of each environment"
            )
        if not np.isfinite(values).all():
            raise DriveSimError("an action is NaN or infinite; give numbers from -1 to 1")
        return np.clip(values, -1.0, 1.0)

    def first_speed(self, speed_mps: float) -> float:
        """Return the speed [m/s] to begin with, given the context's last speed or NaN."""
        if np.isnan(speed_mps):
            speed_mps = self.usual_mps
        return float(np.clip(speed_mps, self.slowest_mps, self.fastest_mps))

    def apply(self, actions: Floats, speed_mps: Floats) -> tuple[Floats, Floats]:
        """Return the new speeds [N] in m/s and the steering [N], given the speeds [N] so far."""
        change = actions[:, SPEED] * (self.acceleration_mps2 * self.step_s)
        speed = np.clip(speed_mps + change, self.slowest_mps, self.fastest_mps)
        return speed, actions[:, STEERING] * self.steering_limit


def _tell_unknown(world: WorldModel) -> None:
    unknown = [
        f"without {name}, so the {which} number of an action has no effect"
        for name, which, known in zip(
            CHANNELS, ("first", "second"), world.known_channels, strict=True
        )
        if not known
    ]
    if unknown and world not in _told:
        _told.add(world)
        say(f"the model was trained {' and '.join(unknown)}")
