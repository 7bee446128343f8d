"""The road: an endless curve y = f(x). Converts between (x, y) and places along the road."""

import math

import numpy as np

from driving_sim.data.arrays import Reals

HALF_WIDTH = 3.7
"""Distance from the centre line to the edge of the asphalt, in metres."""
LANE_OFFSET = -1.8
"""Offset of the middle of the driver's lane from the centre line, in metres, left positive."""

# The road is a sum of three sine waves with these wavelengths and maximum slopes. The slopes add up
# to 0.74, so the road never turns more than 37 degrees from the x axis and never crosses itself.
_WAVELENGTHS_M = (430.0, 210.0, 118.0)
_SLOPES = (0.30, 0.29, 0.15)


class Road:
    """A curve that is endless in both directions and whose curvature changes smoothly.

    A place on the road is a station (x of the centre line, in metres) and an offset (metres to the
    left of the centre line).
    """

    def __init__(self, rng: np.random.Generator) -> None:
        wavelengths = np.array(_WAVELENGTHS_M) * rng.uniform(0.88, 1.14, 3)
        self._wave_numbers: list[float] = (2 * math.pi / wavelengths).tolist()
        self._phases: list[float] = rng.uniform(0, 2 * math.pi, 3).tolist()
        slopes = np.array(_SLOPES) * rng.uniform(0.85, 1.0, 3)
        self._amplitudes: list[float] = (slopes * wavelengths / (2 * math.pi)).tolist()

    def centre_and_slope(self, station: Reals) -> tuple[Reals, Reals]:
        """Return f(x) in metres and f'(x) at each station."""
        centre = np.zeros_like(station, dtype=np.result_type(station, np.float32))
        slope = np.zeros_like(centre)
        for k, phase, amplitude in zip(
            self._wave_numbers, self._phases, self._amplitudes, strict=True
        ):
            angle = station * k + phase
            centre += amplitude * np.sin(angle)
            slope += (amplitude * k) * np.cos(angle)
        return centre, slope

    def place(self, station: Reals, offset: Reals) -> tuple[Reals, Reals, Reals]:
        """Return x and y (metres) of places on the road, and the road's heading (radians) there."""
        centre, slope = self.centre_and_slope(station)
        heading = np.arctan(slope)
        return station - offset * np.sin(heading), centre + offset * np.cos(heading), heading

    def project(self, x: Reals, y: Reals) -> tuple[Reals, Reals, Reals]:
        """Return the station and the offset of points, and the road's slope at that station.

        Stations and offsets are in metres, and offsets are positive to the left. The result is
        exact near the road. Far from the road, the offset may be too large but never too small, so
        that no road appears where there is none.
        """
        station = x
        centre, slope = self.centre_and_slope(station)
        for _ in range(2):  # Gauss-Newton steps to the nearest point
            station = station + ((x - station) + (y - centre) * slope) / (1 + slope * slope)
            centre, slope = self.centre_and_slope(station)
        across = (y - centre) - slope * (x - station)
        return station, np.copysign(np.hypot(x - station, y - centre), across), slope
