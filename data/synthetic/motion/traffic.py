"""Oncoming cars, which avoid the driver. Their places depend on the seed and the time."""

import math
from dataclasses import dataclass

import numpy as np

from driving_sim.data.hashing import uniform
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.road import LANE_OFFSET, Road
from driving_sim.data.synthetic.scenery import VISIBLE_M, Kind, Things

_SPEED_MPS = 9.0
_GAP_M = 130.0
_ROOM_M = 2.6
"""Sideways distance in metres, centre to centre, at which oncoming cars pass the driver."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """An endless column of oncoming cars, which give way to a driver on their side of the road."""

    road: Road
    seed: int
    density: float
    """Share of the places in the column that are taken by a car."""

    def near(self, state: VehicleState) -> Things:
        """Return the oncoming cars near the driver's car."""
        travelled = _SPEED_MPS * state.time_s
        low, high = (state.x_m + side * VISIBLE_M + travelled for side in (-1, 1))
        car = np.arange(math.floor(low / _GAP_M) - 1, math.floor(high / _GAP_M) + 1)
        along, tint, chance = (uniform(self.seed, 300, car, draw) for draw in range(3))
        station = (car + 0.6 * along) * _GAP_M - travelled
        here, aside, _ = self.road.project(np.array([state.x_m]), np.array([state.y_m]))
        closeness = np.clip(2.0 - np.abs(station - here) / 20.0, 0, 1)
        # Oncoming cars stay in their lane if the driver is in the meadow to the left of the road.
        closeness = closeness * np.clip((6.5 - aside) / 2.0, 0, 1)
        offset = -LANE_OFFSET + closeness * np.maximum(aside + _ROOM_M + LANE_OFFSET, 0)
        x, y, heading = self.road.place(station, offset)
        height = np.full(len(car), 1.5)
        cars = Things(np.full(len(car), int(Kind.CAR)), x, y, heading + math.pi, height, tint)
        return cars.chosen(chance < self.density)
