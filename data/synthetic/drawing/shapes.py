"""Anti-aliased flat shapes on a float picture: rectangles, ellipses and convex polygons."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats, Floats32

Rgb = Floats32
"""Colour [3, 1, 1] in 0..255; it broadcasts over a picture."""
Point = tuple[float, float]
"""Column and row, not rounded. The centre of the first pixel is (0.5, 0.5)."""


def rgb(colour: tuple[float, float, float] | Floats) -> Rgb:
    """Convert a colour to an `Rgb` array."""
    return np.array(colour, np.float32)[:, None, None]


def blend(picture: Floats32, colour: NDArray[Any], cover: NDArray[Any]) -> None:
    """Paint a colour over a picture [3, rows, columns] in place; `cover` is the opacity (0..1)."""
    change = colour - picture
    change *= cover
    picture += change


class Canvas:
    """A float32 RGB picture [3, H, W] to draw on. Later shapes cover earlier ones."""

    def __init__(self, frame: Floats32) -> None:
        self._frame = frame
        height, width = frame.shape[1:]
        self._columns = np.arange(width, dtype=np.float32)[None, :] + np.float32(0.5)
        self._rows = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)

    def _window(
        self, left: float, top: float, right: float, bottom: float
    ) -> tuple[Floats32, Floats32, Floats32]:
        """Return the picture's pixels inside a box, and the centres of their columns and rows."""
        wide = slice(max(math.floor(left), 0), max(math.ceil(right), 0))
        high = slice(max(math.floor(top), 0), max(math.ceil(bottom), 0))
        return self._frame[:, high, wide], self._columns[:, wide], self._rows[high]

    def rectangle(self, corner: Point, opposite: Point, colour: Rgb, opacity: float) -> None:
        """Draw a rectangle with upper left corner `corner` and lower right corner `opposite`."""
        (left, top), (right, bottom) = corner, opposite
        part, columns, rows = self._window(left, top, right, bottom)
        wide = np.minimum(columns + 0.5, right) - np.maximum(columns - 0.5, left)
        high = np.minimum(rows + 0.5, bottom) - np.maximum(rows - 0.5, top)
        blend(part, colour, wide * (high * opacity))

    def ellipse(
        self, centre: Point, radii: Point, colour: Rgb, opacity: float, light: float = 0.0
    ) -> None:
        """Draw an ellipse. `light` in 0..1 shades it like a ball that is lit from above left."""
        (x, y), (a, b) = centre, radii
        part, columns, rows = self._window(x - a - 0.5, y - b - 0.5, x + a + 0.5, y + b + 0.5)
        across, down = (columns - x) / a, (rows - y) / b
        cover = np.sqrt(across * across + down * down)
        # Soften the edge over one pixel. An ellipse thinner than a pixel gets a lower opacity, so
        # that it fades instead of vanishing.
        edge = max(min(a, b), 0.5)
        cover *= -edge
        cover += edge + 0.5
        np.minimum(np.maximum(cover, 0, out=cover), 1, out=cover)  # this is faster than np.clip
        cover *= opacity * min(1.0, 2 * a) * min(1.0, 2 * b)
        if light:
            colour = ((1 - 0.75 * light * down) - 0.45 * light * across) * colour
        blend(part, colour, cover)

    def cone(
        self, apex: Point, base_row: float, half_width: float, colour: Rgb, opacity: float
    ) -> None:
        """Draw an upright isosceles triangle."""
        x, top = apex
        if base_row - top < 1e-3:
            return
        part, columns, rows = self._window(x - half_width, top, x + half_width, base_row)
        high = np.minimum(rows + 0.5, base_row) - np.maximum(rows - 0.5, top)
        half = (rows - top) * (half_width / (base_row - top))
        cover = np.minimum(np.maximum(half + 0.5 - np.abs(columns - x), 0), 1)
        # Near the apex, the triangle is narrower than a pixel, so lower the pixel's opacity there.
        cover *= np.minimum(2 * np.maximum(half, 0), 1) * (high * opacity)
        blend(part, colour, cover)

    def polygon(self, points: Sequence[Point], colour: Rgb, opacity: float) -> None:
        """Draw a convex polygon, with its corners in clockwise or anticlockwise order."""
        xs, ys = zip(*points, strict=True)
        part, columns, rows = self._window(
            min(xs) - 0.5, min(ys) - 0.5, max(xs) + 0.5, max(ys) + 0.5
        )
        if not part.size:
            return
        edges = list(zip(points, (*points[1:], points[0]), strict=True))
        area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in edges)
        sense = math.copysign(1.0, area)
        lines: list[tuple[float, float, float]] = []
        for (x0, y0), (x1, y1) in edges:
            length = math.hypot(x1 - x0, y1 - y0)
            if length > 1e-6:
                a, b = sense * (y0 - y1) / length, sense * (x1 - x0) / length
                lines.append((a, b, -0.5 - a * x0 - b * y0))
        a_e, b_e, c_e = np.array(lines, np.float32).T[:, :, None, None]
        outside = a_e * columns + (b_e * rows + c_e)
        np.maximum(np.minimum(outside, 0, out=outside), -1, out=outside)
        # Begin with full pixels, and subtract the part of each pixel that lies outside each edge.
        # The result is right even for polygons thinner than a pixel.
        cover = outside.sum(axis=0) + 1
        blend(part, colour, np.maximum(cover, 0) * opacity)
