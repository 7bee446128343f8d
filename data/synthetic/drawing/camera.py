"""The pinhole camera behind the windscreen."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats32
from driving_sim.data.synthetic.motion.vehicle import VehicleState

FORWARD_OF_REAR_AXLE_M = 1.4


class Camera:
    """A level camera: the horizon is a straight row, and rows below it are at one depth each."""

    def __init__(
        self, height: int, width: int, degrees: float, horizon: float, above_ground_m: float
    ) -> None:
        """Take a horizontal field of view and the share of the height above the horizon."""
        self.height, self.width = height, width
        self.focal = 0.5 * width / math.tan(math.radians(degrees) / 2)
        """In pixels."""
        self.horizon_row = horizon * height
        """Continuous: row i of the picture covers i to i + 1."""
        self.above_ground_m = above_ground_m
        self.first_ground_row = math.floor(self.horizon_row + 0.5)
        """The first row whose centre lies below the horizon."""

    def column_slopes(self, columns: NDArray[Any]) -> Floats32:
        """Metres to the left per metre of depth, at the centres of columns."""
        return ((0.5 * self.width - columns - 0.5) / self.focal).astype(np.float32)

    def column_of(self, depth: Any, left: Any) -> Any:
        """Return the continuous column of points at a depth and metres to the left."""
        return 0.5 * self.width - self.focal * left / depth

    def row_of(self, depth: Any, above_ground_m: Any) -> Any:
        """Return the continuous row of points at a depth and a height."""
        return self.horizon_row + self.focal * (self.above_ground_m - above_ground_m) / depth


class View:
    """The place the camera looks from: out of a car."""

    def __init__(self, state: VehicleState) -> None:
        self.heading = state.heading_rad
        self.cos, self.sin = math.cos(self.heading), math.sin(self.heading)
        self.x = state.x_m + FORWARD_OF_REAR_AXLE_M * self.cos
        self.y = state.y_m + FORWARD_OF_REAR_AXLE_M * self.sin

    def depth_and_left(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return how far ahead and how far to the left of the camera points of the world are."""
        dx, dy = x - self.x, y - self.y
        return dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin
