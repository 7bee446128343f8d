"""The pinhole camera behind the windscreen."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.synthetic.motion.vehicle import VehicleState

FORWARD_OF_REAR_AXLE_M = 1.4


@dataclass(frozen=True, slots=True)
class Camera:
    """A level camera: the horizon is a straight row, and rows below it are at one depth each."""

    height: int
    width: int
    focal: float
    """In pixels."""
    horizon_row: float
    """Continuous: row i of the picture covers i to i + 1."""
    above_ground_m: float

    @classmethod
    def with_field_of_view(
        cls, height: int, width: int, degrees: float, horizon: float, above_ground_m: float
    ) -> "Camera":
        """Make a camera with a horizontal field of view and the horizon's share of the height."""
        focal = 0.5 * width / math.tan(math.radians(degrees) / 2)
        return cls(height, width, focal, horizon * height, above_ground_m)

    @property
    def first_ground_row(self) -> int:
        """The first row whose centre lies below the horizon."""
        return math.floor(self.horizon_row + 0.5)

    def column_slopes(self) -> NDArray[np.float32]:
        """Metres to the left per metre of depth, for each column."""
        columns = np.arange(self.width, dtype=np.float32) + 0.5
        return ((0.5 * self.width - columns) / self.focal).astype(np.float32)

    def column_of(self, depth: Any, left: Any) -> Any:
        """Return the continuous column of points at a depth and metres to the left."""
        return 0.5 * self.width - self.focal * left / depth

    def row_of(self, depth: Any, above_ground_m: Any) -> Any:
        """Return the continuous row of points at a depth and a height."""
        return self.horizon_row + self.focal * (self.above_ground_m - above_ground_m) / depth


@dataclass(frozen=True, slots=True)
class View:
    """The place the camera looks from."""

    x: float
    y: float
    cos: float
    sin: float
    heading: float

    @classmethod
    def from_state(cls, state: VehicleState) -> "View":
        """Return the view out of a car."""
        cos, sin = math.cos(state.heading_rad), math.sin(state.heading_rad)
        return cls(
            state.x_m + FORWARD_OF_REAR_AXLE_M * cos,
            state.y_m + FORWARD_OF_REAR_AXLE_M * sin,
            cos,
            sin,
            state.heading_rad,
        )

    def depth_and_left(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return how far ahead and how far to the left of the camera points of the world are."""
        dx, dy = x - self.x, y - self.y
        return dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin
