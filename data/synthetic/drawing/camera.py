"""The pinhole camera behind the windscreen."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats32
from driving_sim.data.synthetic.motion.vehicle import VehicleState

FORWARD_OF_REAR_AXLE_M = 1.4


class Camera:
    """A camera that looks horizontally, so a row of the picture shows ground of a single depth."""

    def __init__(
        self, height: int, width: int, degrees: float, horizon: float, above_ground_m: float
    ) -> None:
        """Make a camera.

        `degrees` is the horizontal field of view. `horizon` is the share of the picture's height
        that lies above the horizon.
        """
        self.height, self.width = height, width
        self.focal = 0.5 * width / math.tan(math.radians(degrees) / 2)
        """Focal length in pixels."""
        self.horizon_row = horizon * height
        """Position of the horizon, in rows from the top of the picture; not rounded."""
        self.above_ground_m = above_ground_m
        self.first_ground_row = math.floor(self.horizon_row + 0.5)
        """Index of the first row whose centre lies below the horizon."""

    def column_slopes(self, columns: NDArray[Any]) -> Floats32:
        """Return the slope (left / depth) of the view rays through the centre of each column."""
        return ((0.5 * self.width - columns - 0.5) / self.focal).astype(np.float32)

    def sees(self, depth: Any, left: Any, half_width_m: float = 0.0) -> Any:
        """Return whether things of this half width, at a depth and to the left, reach into view."""
        nearest_m = abs(left) - half_width_m
        return (depth > 0) & (nearest_m * self.focal <= 0.5 * self.width * depth)

    def column_of(self, depth: Any, left: Any) -> Any:
        """Return the column (not rounded) of points at a depth and a distance to the left."""
        return 0.5 * self.width - self.focal * left / depth

    def row_of(self, depth: Any, above_ground_m: Any) -> Any:
        """Return the row (not rounded) of points at a depth and a height above the ground."""
        return self.horizon_row + self.focal * (self.above_ground_m - above_ground_m) / depth


class View:
    """Position and heading of a camera that looks out of a car."""

    def __init__(self, state: VehicleState) -> None:
        self.heading = state.heading_rad
        self.cos, self.sin = math.cos(self.heading), math.sin(self.heading)
        self.x = state.x_m + FORWARD_OF_REAR_AXLE_M * self.cos
        self.y = state.y_m + FORWARD_OF_REAR_AXLE_M * self.sin

    def depth_and_left(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return how far points of the world lie ahead of the camera and to its left, in metres."""
        dx, dy = x - self.x, y - self.y
        return dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin
