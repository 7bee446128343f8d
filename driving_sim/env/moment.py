"""What rewards and ends are functions of: one moment of all environments.

Axes: N environments, r c token rows and columns, H W pixels.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from driving_sim.data.arrays import Floats, Ints, Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.env.gauges import Gauges


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """The moment after a step. Arrays have one row for each of the N environments."""

    frames: Pixels
    """The new pictures, uint8 [N, H, W, 3]."""
    tokens: Ints
    """Their tokens, int64 [N, r, c]."""
    actions: Floats
    """The agents' actions [N, 2], clipped to [-1, 1]."""
    speed_mps: Floats
    """Speed that led to the pictures, in m/s [N]; NaN if the model knows no speed."""
    steering: Floats
    """Steering that led to the pictures [N], left positive, in the unit of the model's kind."""
    surprise_nats: Floats
    """Minus the mean log-probability of the frame's tokens under the plain model, in nats [N]."""
    recent_surprise_nats: Floats
    """Mean surprise over the last second of the episode, in nats [N]."""
    entropy_nats: Floats
    """Mean entropy of the tokens' distributions, in nats [N]: the surprise that was expected."""
    time_s: Floats
    """Time since the start of the episode, in s [N]."""
    step_s: float
    """Length of a step in s."""
    contexts: tuple[str, ...]
    """Names of the contexts that the episodes began with, N of them."""
    gauges: Gauges = field(repr=False)

    @property
    def distance_m(self) -> Floats:
        """Distance driven in the step, in m [N]. Raises DriveSimError without a known speed."""
        if np.isnan(self.speed_mps).any():
            raise DriveSimError(
                "the model was trained without speed, so there is no distance; use a `reward` of "
                "your own"
            )
        return self.speed_mps * self.step_s

    @property
    def usual_surprise_nats(self) -> float:
        """Mean surprise of a token of real footage, in nats, measured on the contexts."""
        return self.gauges.usual_surprise_nats

    @property
    def lane_offset_m(self) -> Floats:
        """Distance of the car from the middle of its lane in m [N], left positive.

        A probe reads it off the pictures. Raises DriveSimError if the model has no lane probe.
        """
        return self._lane[0]

    @property
    def lane_heading_rad(self) -> Floats:
        """Direction of the car against that of the road in rad [N], left positive, by the probe."""
        return self._lane[1]

    @cached_property
    def _lane(self) -> tuple[Floats, Floats]:
        return self.gauges.lane_probe.read(self.frames)
