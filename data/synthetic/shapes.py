"""Anti-aliased flat shapes on a float picture: ellipses and convex polygons."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
"""Column and row, continuous: pixel (i, j) covers i to i + 1 and j to j + 1."""


class Canvas:
    """A float32 RGB picture [H, W, 3] to draw on, in painter's order."""

    def __init__(self, frame: NDArray[np.float32]) -> None:
        self._frame = frame
        self._height, self._width = frame.shape[:2]
        self._columns = np.arange(self._width, dtype=np.float32)[None, :] + np.float32(0.5)
        self._rows = np.arange(self._height, dtype=np.float32)[:, None] + np.float32(0.5)

    def _window(
        self, left: float, top: float, right: float, bottom: float
    ) -> tuple[slice, slice] | None:
        """Return the pixels that the box touches, or None where it misses the picture."""
        x0, x1 = max(math.floor(left - 0.5), 0), min(math.ceil(right + 0.5), self._width)
        y0, y1 = max(math.floor(top - 0.5), 0), min(math.ceil(bottom + 0.5), self._height)
        if x0 >= x1 or y0 >= y1:
            return None
        return slice(y0, y1), slice(x0, x1)

    def ellipse(
        self,
        centre: Point,
        radii: Point,
        colour: NDArray[np.float32],
        *,
        opacity: float = 1.0,
        light: float = 0.0,
    ) -> None:
        """Draw a filled ellipse; `light` in 0..1 shades it as a ball lit from above left."""
        (x, y), (a, b) = centre, radii
        window = self._window(x - a, y - b, x + a, y + b)
        if window is None:
            return
        across = (self._columns[:, window[1]] - np.float32(x)) * np.float32(1 / a)
        down = (self._rows[window[0]] - np.float32(y)) * np.float32(1 / b)
        radius = np.sqrt(across * across + down * down)
        # Thinner than a pixel: the shape fades instead of vanishing.
        edge = np.float32(max(min(a, b), 0.5))
        cover = np.clip((1 - radius) * edge + 0.5, 0, 1) * np.float32(
            opacity * min(1.0, 2 * a) * min(1.0, 2 * b)
        )
        patch = self._frame[window]
        if light:
            shade = 1 - np.float32(light) * (0.45 * across + 0.75 * down)
            patch += cover[..., None] * (shade[..., None] * colour - patch)
        else:
            patch += cover[..., None] * (colour - patch)

    def polygon(
        self, points: Sequence[Point], colour: NDArray[np.float32], *, opacity: float = 1.0
    ) -> None:
        """Draw a filled convex polygon, its corners in either sense."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        window = self._window(min(xs), min(ys), max(xs), max(ys))
        if window is None:
            return
        columns, rows = self._columns[:, window[1]], self._rows[window[0]]
        area = sum(
            x0 * y1 - x1 * y0
            for x0, y0, x1, y1 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
        )
        sense = 1.0 if area > 0 else -1.0
        # One minus what each edge cuts off: exact for a sliver thinner than a pixel too.
        cover = np.ones((rows.shape[0], columns.shape[1]), np.float32)
        for x0, y0, x1, y1 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            if length < 1e-6:
                continue
            nx, ny = sense * (y0 - y1) / length, sense * (x1 - x0) / length
            outside = rows * np.float32(ny) + np.float32(0.5 - nx * x0 - ny * y0 - 1)
            outside = outside + columns * np.float32(nx)
            cover += np.clip(outside, -1, 0, out=outside)
        np.maximum(cover, 0, out=cover)
        if opacity < 1:
            cover *= np.float32(opacity)
        patch = self._frame[window]
        patch += cover[..., None] * (colour - patch)
