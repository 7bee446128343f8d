"""Draws simple solids in perspective: what the things beside the road are made of."""

import math
from collections.abc import Sequence

from driving_sim.data.synthetic.drawing.camera import Camera
from driving_sim.data.synthetic.drawing.shapes import Canvas, Point, Rgb, rgb

Corner = tuple[float, float, float]
"""Depth, metres to the left, metres above the ground: all as seen from the camera."""

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


class Brush:
    """Draws one thing: whatever it draws has the haze of its depth and its opacity.

    Everything but faces and boxes needs a depth of at least `NEAREST_M`.
    """

    def __init__(
        self, canvas: Canvas, camera: Camera, haze: Rgb, depth: float, left: float, opacity: float
    ) -> None:
        self._canvas = canvas
        self._camera = camera
        self._haze = haze
        self._depth = depth
        self._left = left
        self._opacity = opacity
        self._clearness = math.exp(-max(depth, 0.0) / HAZE_M)

    def _hazy(self, colour: Rgb) -> Rgb:
        return self._haze + self._clearness * (colour - self._haze)

    def _point(self, depth: float, left: float, above: float) -> Point:
        return self._camera.column_of(depth, left), self._camera.row_of(depth, above)

    def face(self, corners: Sequence[Corner], colour: Rgb) -> None:
        """Draw a flat convex polygon in space."""
        visible = _clipped(corners)
        if len(visible) >= 3:
            points = [self._point(*corner) for corner in visible]
            self._canvas.polygon(points, self._hazy(colour), self._opacity)

    def upright(self, half_width: float, low: float, high: float, colour: Rgb) -> None:
        """Draw a thin thing that turns its face to the camera, between two heights."""
        corner = self._point(self._depth, self._left + half_width, high)
        opposite = self._point(self._depth, self._left - half_width, low)
        self._canvas.rectangle(corner, opposite, self._hazy(colour), self._opacity)

    def cone(self, half_width: float, low: float, high: float, colour: Rgb) -> None:
        """Draw a cone that stands on its base, between two heights."""
        apex = self._point(self._depth, self._left, high)
        base_row = self._camera.row_of(self._depth, low)
        half = self._camera.focal / self._depth * half_width
        self._canvas.cone(apex, base_row, half, self._hazy(colour), self._opacity)

    def ball(
        self, middle: float, half_width: float, half_height: float, colour: Rgb, light: float
    ) -> None:
        """Draw an upright ellipsoid around a height, lit from above left."""
        scale = self._camera.focal / self._depth
        centre = self._point(self._depth, self._left, middle)
        radii = (scale * half_width, scale * half_height)
        self._canvas.ellipse(centre, radii, self._hazy(colour), self._opacity, light)

    def shadow(self, radius: float) -> None:
        """Darken the ground around the foot."""
        across = self._camera.focal / self._depth * radius
        if across < _LEAST_SHADOW_PX:
            return
        centre = self._point(self._depth, self._left, 0.0)
        radii = (across, max(across * self._camera.above_ground_m / self._depth, 0.3))
        self._canvas.ellipse(centre, radii, _BLACK, 0.4 * self._opacity)

    def place(self, heading: float, along: float, across: float, above: float) -> Corner:
        """Return a corner given in a thing's own axes: ahead, left and up from its foot."""
        cos, sin = math.cos(heading), math.sin(heading)
        depth = self._depth + along * cos - across * sin
        return depth, self._left + along * sin + across * cos, above

    def camera_place(self, heading: float) -> Corner:
        """Return where the camera is in a thing's own axes: ahead, left and up from its foot."""
        cos, sin = math.cos(heading), math.sin(heading)
        along = -self._depth * cos - self._left * sin
        return along, self._depth * sin - self._left * cos, self._camera.above_ground_m

    def panel(
        self, heading: float, sides: tuple[float, float], heights: tuple[float, float], colour: Rgb
    ) -> None:
        """Draw an upright rectangle that faces along a heading."""
        (right, left), (low, high) = sides, heights
        ends = ((right, low), (left, low), (left, high), (right, high))
        self.face([self.place(heading, 0.0, *end) for end in ends], colour)

    def box(
        self,
        heading: float,
        length: tuple[float, float],
        half_width: float,
        heights: tuple[float, float],
        colours: tuple[Rgb, Rgb],
    ) -> None:
        """Draw the sides of a box that face the camera, and its top where that is seen.

        `length` is from its back to its front, `colours` are those of its sides and its top.
        """
        (back, front), (low, high), (side, top) = length, heights, colours
        along, across, above = self.camera_place(heading)
        feet = (
            (front, half_width),
            (back, half_width),
            (back, -half_width),
            (front, -half_width),
        )
        outside = (across - half_width, back - along, -half_width - across, along - front)
        for i, light in enumerate((0.86, 0.72, 0.86, 1.0)):
            if outside[i] > 0:
                end, other = feet[i], feet[(i + 1) % 4]
                outline = ((*end, low), (*other, low), (*other, high), (*end, high))
                self.face([self.place(heading, *own) for own in outline], side * light)
        if above > high:
            self.face([self.place(heading, *foot, high) for foot in feet], top)
