"""Two rewards with the ends that belong to them, and the types of a user's own functions.

Axes: N environments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driving_sim.data.arrays import Floats
from driving_sim.data.synthetic.road import HALF_WIDTH, LANE_OFFSET
from driving_sim.engine.errors import DriveSimError
from driving_sim.env.moment import Moment

Reward = Callable[[Moment], ArrayLike]
"""Type of a function that returns the rewards [N] of a moment."""
End = Callable[[Moment], ArrayLike]
"""Type of a function that returns whether the episodes end with a moment, bool [N]."""

RECENT_S = 1.0
"""Length in s of the time over which recent surprise is averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressWithoutSurprise:
    """Rewards the distance driven, less the surprise beyond that of real footage.

    A high surprise means that the pictures are no longer like the training data, for example
    because the car has left the road.
    """

    weight: float = 1.0
    """Cost of a nat of surprise per token, in m."""
    tolerance_nats: float = 0.3
    """Surprise above that of footage that costs nothing, in nats per token."""
    limit_nats: float = 1.0
    """The episode ends if the mean surprise of the last second exceeds that of footage by more than
    this, in nats."""

    def __call__(self, moment: Moment) -> Floats:
        """Return the rewards [N], in m."""
        beyond = moment.surprise_nats - moment.usual_surprise_nats - self.tolerance_nats
        return moment.distance_m - self.weight * np.maximum(beyond, 0.0)

    def end(self, moment: Moment) -> NDArray[np.bool_]:
        """Return whether the surprise has been high for a second, [N]."""
        beyond = moment.recent_surprise_nats - moment.usual_surprise_nats
        return (moment.time_s >= RECENT_S) & (beyond > self.limit_nats)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepLane:
    """Rewards the distance driven in the lane, most in its middle; needs a lane probe.

    The distances are those of the synthetic world, where cars drive on the right.
    """

    half_width_m: float = -LANE_OFFSET
    """Distance from the middle of the lane at which the reward falls to 0, in m."""
    left_edge_m: float = HALF_WIDTH - LANE_OFFSET
    """Distance from the middle of the lane to the left edge of the road, in m."""
    right_edge_m: float = HALF_WIDTH + LANE_OFFSET
    """Distance from the middle of the lane to the right edge of the road, in m."""

    def __call__(self, moment: Moment) -> Floats:
        """Return the rewards [N], in m."""
        share = 1.0 - np.square(moment.lane_offset_m / self.half_width_m)
        return moment.distance_m * np.maximum(share, 0.0)

    def end(self, moment: Moment) -> NDArray[np.bool_]:
        """Return whether the car has left the road, [N]."""
        offset = moment.lane_offset_m
        return (offset > self.left_edge_m) | (offset < -self.right_edge_m)


def never(moment: Moment) -> NDArray[np.bool_]:
    """Return False for every environment: an `end` for episodes that only time ends."""
    return np.zeros(len(moment.time_s), np.bool_)


def end_of(reward: Reward) -> End:
    """Return the end that belongs to a reward: its method `end`, or `never`."""
    end: End = getattr(reward, "end", never)
    return end


def values_of(function: Reward | End, moment: Moment, name: str) -> NDArray[Any]:
    """Return what a reward or an end says about N environments, [N].

    Raises DriveSimError for another shape. `name` is the setting that the function was given as.
    """
    values = np.asarray(function(moment))
    count = len(moment.time_s)
    if values.shape != (count,):
        raise DriveSimError(
            f"`{name}` returned an array of shape {list(values.shape)}; return one value for each "
            f"environment, [{count}]"
        )
    return values
