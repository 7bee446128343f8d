"""The speed and the steering of a drive over time.

Legend: M samples of a channel.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats, Floats32, Mask

SteeringKind = Literal["steering_wheel", "road_wheel", "curvature", "normalised"]
SPEED, STEERING = 0, 1
CHANNELS = ("speed", "steering")
UNITS: dict[SteeringKind, str] = {
    "steering_wheel": "rad",
    "road_wheel": "rad",
    "curvature": "1/m",
    "normalised": "of full lock",
}
"""Unit in which an `ActionLog` contains each kind of steering."""

# No car reaches values outside these limits (360 km/h, three turns of the steering wheel, ...), so
# the unit of such a value must be wrong. Model cars turn on circles with a radius of 0.1 m.
SPEED_RANGE_MPS = (-30.0, 100.0)
STEERING_LIMIT: dict[SteeringKind, float] = {
    "steering_wheel": 20.0,
    "road_wheel": 1.3,
    "curvature": 10.0,
    "normalised": 1.001,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Channel:
    """The samples of the speed or of the steering, on the clock of the video."""

    times: Floats
    """[M] Time of each sample in seconds from the video's first frame, strictly increasing."""
    values: Floats32
    """[M] Speed in m/s, or steering in the unit that `UNITS` lists for its kind."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActionLog:
    """The speed and steering of a drive over time. Each channel has its own samples."""

    speed: Channel | None = None
    """The speed in m/s, or None if it was not recorded."""
    steering: Channel | None = None
    """The steering, left positive, or None if it was not recorded."""
    steering_kind: SteeringKind | None = None
    """What `steering` measures, or None if the log has no steering."""
    notices: tuple[str, ...] = ()
    """Assumptions made while reading the log, one line each."""
    origin: str = "the actions"
    """File or folder that the samples come from, for messages."""

    @classmethod
    def on_one_clock(
        cls, times: Floats, values: NDArray[Any], kind: SteeringKind | None, **fields: Any
    ) -> "ActionLog":
        """Return a log of the actions [M, 2] at times [M] in seconds. Without a `kind`, the log has
        no steering."""
        speed, steering = (
            Channel(times=times, values=column) for column in values.T.astype(np.float32)
        )
        return cls(speed=speed, steering=steering if kind else None, steering_kind=kind, **fields)

    @property
    def channels(self) -> tuple[Channel | None, Channel | None]:
        """The speed and the steering, in the order of the columns of actions."""
        return self.speed, self.steering

    @property
    def has(self) -> Mask:
        """[2] Whether the log has speed, and whether it has steering."""
        return np.array([channel is not None for channel in self.channels])

    @property
    def span(self) -> tuple[float, float]:
        """Times in seconds of the first and the last sample of any channel."""
        times = [channel.times for channel in self.channels if channel is not None]
        return float(min(t[0] for t in times)), float(max(t[-1] for t in times))

    def only(self, known: tuple[bool, bool]) -> "ActionLog":
        """Return the log without the channels that are not `known`."""
        speed, steering = known
        return replace(
            self,
            speed=self.speed if speed else None,
            steering=self.steering if steering else None,
            steering_kind=self.steering_kind if steering else None,
        )
