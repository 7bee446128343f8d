"""Anti-aliased flat shapes on a float picture: rectangles, ellipses and convex polygons."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.float32]
"""[3, 1, 1] in 0..255, so that it broadcasts over a picture."""
Point = tuple[float, float]
"""Column and row, continuous: pixel (i, j) covers i to i + 1 and j to j + 1."""


def rgb(colour: tuple[float, float, float]) -> Rgb:
    """Return a colour to draw with."""
    return np.array(colour, np.float32)[:, None, None]


class Canvas:
    """A float32 RGB picture [3, H, W] to draw on, in painter's order."""

    def __init__(self, frame: NDArray[np.float32]) -> None:
        self._frame = frame
        self._height, self._width = frame.shape[1:]
        self._columns = np.arange(self._width, dtype=np.float32)[None, :] + np.float32(0.5)
        self._rows = np.arange(self._height, dtype=np.float32)[:, None] + np.float32(0.5)

    def _window(
        self, left: float, top: float, right: float, bottom: float
    ) -> tuple[slice, slice] | None:
        """Return the pixels that the box touches, or None where it misses the picture."""
        x0, x1 = max(math.floor(left), 0), min(math.ceil(right), self._width)
        y0, y1 = max(math.floor(top), 0), min(math.ceil(bottom), self._height)
        if x0 >= x1 or y0 >= y1:
            return None
        return slice(y0, y1), slice(x0, x1)

    def _blend(self, window: tuple[slice, slice], colour: Rgb, cover: NDArray[np.float32]) -> None:
        patch = self._frame[:, window[0], window[1]]
        change = colour - patch
        change *= cover
        patch += change

    def rectangle(self, corner: Point, opposite: Point, colour: Rgb, opacity: float) -> None:
        """Draw an upright rectangle, from its upper left corner to its lower right one."""
        (left, top), (right, bottom) = corner, opposite
        window = self._window(left, top, right, bottom)
        if window is None:
            return
        columns, rows = self._columns[:, window[1]], self._rows[window[0]]
        wide = np.minimum(columns + 0.5, right) - np.maximum(columns - 0.5, left)
        high = np.minimum(rows + 0.5, bottom) - np.maximum(rows - 0.5, top)
        self._blend(window, colour, wide * (high * opacity))

    def ellipse(
        self, centre: Point, radii: Point, colour: Rgb, opacity: float, light: float = 0.0
    ) -> None:
        """Draw an ellipse; `light` in 0..1 shades it as a ball lit from above left."""
        (x, y), (a, b) = centre, radii
        window = self._window(x - a - 0.5, y - b - 0.5, x + a + 0.5, y + b + 0.5)
        if window is None:
            return
        across = (self._columns[:, window[1]] - x) / a
        down = (self._rows[window[0]] - y) / b
        cover = np.sqrt(across * across + down * down)
        # Thinner than a pixel: the shape fades instead of vanishing.
        edge = max(min(a, b), 0.5)
        cover *= -edge
        cover += edge + 0.5
        np.maximum(cover, 0, out=cover)
        np.minimum(cover, 1, out=cover)
        cover *= opacity * min(1.0, 2 * a) * min(1.0, 2 * b)
        if light:
            shade = (1 - 0.75 * light * down) - 0.45 * light * across
            colour = shade * colour
        self._blend(window, colour, cover)

    def cone(
        self, apex: Point, base_row: float, half_width: float, colour: Rgb, opacity: float
    ) -> None:
        """Draw an upright triangle of equal sides."""
        x, top = apex
        window = self._window(x - half_width, top, x + half_width, base_row)
        if window is None or base_row - top < 1e-3:
            return
        columns, rows = self._columns[:, window[1]], self._rows[window[0]]
        high = np.minimum(rows + 0.5, base_row) - np.maximum(rows - 0.5, top)
        half = (rows - top) * (half_width / (base_row - top))
        cover = half + 0.5 - np.abs(columns - x)
        np.maximum(cover, 0, out=cover)
        np.minimum(cover, 1, out=cover)
        # Near the apex it is narrower than a pixel.
        cover *= np.minimum(2 * np.maximum(half, 0), 1) * (high * opacity)
        self._blend(window, colour, cover)

    def polygon(self, points: Sequence[Point], colour: Rgb, opacity: float) -> None:
        """Draw a convex polygon, its corners in either sense."""
        xs, ys = zip(*points, strict=True)
        window = self._window(min(xs) - 0.5, min(ys) - 0.5, max(xs) + 0.5, max(ys) + 0.5)
        if window is None:
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
        outside = a_e * self._columns[:, window[1]] + (b_e * self._rows[window[0]] + c_e)
        np.minimum(outside, 0, out=outside)
        np.maximum(outside, -1, out=outside)
        # One minus what each edge cuts off: right for slivers thinner than a pixel, too.
        cover = outside.sum(axis=0)
        cover += 1
        np.maximum(cover, 0, out=cover)
        cover *= opacity
        self._blend(window, colour, cover)
