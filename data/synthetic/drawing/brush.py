"""Draws boxes, balls, cones and other simple shapes in perspective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from driving_sim.data.synthetic.drawing.camera import Camera
from driving_sim.data.synthetic.drawing.palette import Palette
from driving_sim.data.synthetic.drawing.shapes import Canvas, Point, Rgb, rgb

Corner = tuple[float, float, float]
"""A point in metres: depth ahead of the camera, distance to its left, height above the ground."""

NEAREST_M = 0.4
HAZE_M = 260.0
_LEAST_SHADOW_PX = 2.0
_BLACK = rgb((0, 0, 0))


def _clipped(corners: Sequence[Corner]) -> Sequence[Corner]:
    """Return the part of a polygon in front of the camera (Sutherland and Hodgman 1974)."""
    if all(corner[0] >= NEAREST_M for corner in corners):
        return corners
    kept: list[Corner] = []
    for (d0, l0, h0), (d1, l1, h1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if d0 >= NEAREST_M:
            kept.append((d0, l0, h0))
        if (d0 >= NEAREST_M) != (d1 >= NEAREST_M):
            part = (NEAREST_M - d0) / (d1 - d0)
            kept.append((NEAREST_M, l0 + part * (l1 - l0), h0 + part * (h1 - h0)))
    return kept


@dataclass(slots=True)
class Brush:
    """Draws the shapes of one thing. The farther away the thing is, the more haze covers it.

    `upright`, `cone`, `ball` and `shadow` need a `depth` of at least `NEAREST_M`.
    """

    canvas: Canvas
    camera: Camera
    palette: Palette
    depth: float
    left: float
    heading: float
    """Heading of the thing in radians, anticlockwise from the camera's heading."""
    opacity: float

    def _hazy(self, colour: Rgb) -> Rgb:
        haze = self.palette["haze"]
        return haze + math.exp(-max(self.depth, 0.0) / HAZE_M) * (colour - haze)

    def _point(self, depth: float, left: float, above: float) -> Point:
        return self.camera.column_of(depth, left), self.camera.row_of(depth, above)

    def face(self, corners: Sequence[Corner], colour: Rgb) -> None:
        """Draw a flat convex polygon, given by its corners in 3D."""
        visible = _clipped(corners)
        if len(visible) >= 3:
            points = [self._point(*corner) for corner in visible]
            self.canvas.polygon(points, self._hazy(colour), self.opacity)

    def upright(self, half_width: float, low: float, high: float, colour: Rgb) -> None:
        """Draw an upright rectangle that faces the camera, from height `low` to height `high`."""
        corner = self._point(self.depth, self.left + half_width, high)
        opposite = self._point(self.depth, self.left - half_width, low)
        self.canvas.rectangle(corner, opposite, self._hazy(colour), self.opacity)

    def cone(self, half_width: float, low: float, high: float, colour: Rgb) -> None:
        """Draw an upright cone with its base at height `low` and its apex at height `high`."""
        apex = self._point(self.depth, self.left, high)
        base_row = self.camera.row_of(self.depth, low)
        half = self.camera.focal / self.depth * half_width
        self.canvas.cone(apex, base_row, half, self._hazy(colour), self.opacity)

    def ball(
        self, middle: float, half_width: float, half_height: float, colour: Rgb, light: float
    ) -> None:
        """Draw an upright ellipsoid with its centre at height `middle`, lit from above left."""
        scale = self.camera.focal / self.depth
        centre = self._point(self.depth, self.left, middle)
        radii = (scale * half_width, scale * half_height)
        self.canvas.ellipse(centre, radii, self._hazy(colour), self.opacity, light)

    def shadow(self, radius: float) -> None:
        """Draw a round shadow on the ground around the thing's foot."""
        across = self.camera.focal / self.depth * radius
        if across < _LEAST_SHADOW_PX:
            return
        centre = self._point(self.depth, self.left, 0.0)
        radii = (across, max(across * self.camera.above_ground_m / self.depth, 0.3))
        self.canvas.ellipse(centre, radii, _BLACK, 0.4 * self.opacity)

    def place(self, along: float, across: float, above: float) -> Corner:
        """Return the `Corner` that is this far ahead of, left of and above the thing's foot."""
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        depth = self.depth + along * cos - across * sin
        return depth, self.left + along * sin + across * cos, above

    def camera_place(self) -> Corner:
        """Return how far ahead of, left of and above the thing's foot the camera is, in metres."""
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        along = -self.depth * cos - self.left * sin
        return along, self.depth * sin - self.left * cos, self.camera.above_ground_m

    def panel(self, right: float, left: float, low: float, high: float, colour: Rgb) -> None:
        """Draw an upright rectangle perpendicular to the thing's heading."""
        ends = ((right, low), (left, low), (left, high), (right, high))
        self.face([self.place(0.0, *end) for end in ends], colour)

    def box(
        self,
        length: tuple[float, float],
        half_width: float,
        heights: tuple[float, float],
        colours: tuple[Rgb, Rgb],
    ) -> None:
        """Draw the sides of a box that face the camera, and its top if the camera sees it.

        All positions are relative to the thing's foot, in metres. `length` is (back, front),
        `heights` is (bottom, top), and `colours` is (colour of the sides, colour of the top).
        """
        (back, front), (low, high), (side, top) = length, heights, colours
        along, across, above = self.camera_place()
        feet = [(front, half_width), (back, half_width), (back, -half_width), (front, -half_width)]
        outside = (across - half_width, back - along, -half_width - across, along - front)
        for i, light in enumerate((0.86, 0.72, 0.86, 1.0)):
            if outside[i] > 0:
                start, end = feet[i], feet[(i + 1) % 4]
                outline = ((*start, low), (*end, low), (*end, high), (*start, high))
                self.face([self.place(*point) for point in outline], side * light)
        if above > high:
            self.face([self.place(*foot, high) for foot in feet], top)
