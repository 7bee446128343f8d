"""The ground: an endless meadow and the road through it, painted pixel by pixel.

All patterns are fixed to the world and averaged over the patch of ground that a pixel covers (its
footprint), so that they neither slide nor flicker. Smooth quantities are computed in every fourth
column and interpolated.

Arrays [rows, columns] cover the part of the picture below the horizon. If a name ends in `_c`, the
array has only every fourth column. Pictures and colours have their three channels first.
"""

import math
from collections.abc import Callable
from copy import copy

import numpy as np
from einops import rearrange

from driving_sim.data.arrays import Floats32, Reals
from driving_sim.data.hashing import uniform
from driving_sim.data.synthetic.drawing.brush import HAZE_M
from driving_sim.data.synthetic.drawing.camera import Camera, View
from driving_sim.data.synthetic.drawing.palette import Palette
from driving_sim.data.synthetic.drawing.shapes import blend
from driving_sim.data.synthetic.road import HALF_WIDTH, Road

_FARTHEST_M = 500.0
_COARSE = 4

DASH_M, DASH_PERIOD_M = 5.0, 12.0
_LINE_HALF_WIDTH = 0.14
_EDGE_LINE = 3.35
_VERGE = 4.9
_PATCH_M = 7.0
_MOWN_M = 7.0


def _stripe(place: Reals, low: float, high: float, footprint: Reals) -> Reals:
    """Return the share of each pixel's footprint that lies in the stripe from `low` to `high`.

    `place` is the centre of the footprint and `footprint` its extent, in metres like the stripe.
    """
    half = 0.5 * footprint
    overlap = np.minimum(place + half, high) - np.maximum(place - half, low)
    return np.asarray(np.maximum(overlap, 0) / footprint)


def _pulses(place: Reals, footprint: Reals, period: float, length: float) -> Reals:
    """Return the share of each pixel's footprint that lies in a periodic stripe, such as a dash.

    The stripe covers the first `length` metres of every `period` metres. `place` is the centre of
    the footprint and `footprint` its extent, also in metres.
    """

    def covered_up_to(end: Reals) -> Reals:
        periods = np.floor(end / period)
        return np.asarray(periods * length + np.minimum(end - periods * period, length))

    half = 0.5 * footprint
    return np.asarray((covered_up_to(place + half) - covered_up_to(place - half)) / footprint)


_Noise = Callable[[Reals, Reals], Reals]
"""Function of the coordinates x and y of points, in metres."""


class _Swell:
    """Smooth noise over an endless plane: the sum of a few plane waves."""

    def __init__(self, rng: np.random.Generator, wavelength_m: float, waves: int) -> None:
        directions = (np.arange(waves) + rng.uniform(0.1, 0.9, waves)) * (math.pi / waves)
        numbers = 2 * math.pi / (wavelength_m * rng.uniform(0.7, 1.5, waves))
        self._x: list[float] = (numbers * np.cos(directions)).tolist()
        self._y: list[float] = (numbers * np.sin(directions)).tolist()
        self._phases: list[float] = rng.uniform(0, 2 * math.pi, waves).tolist()
        self._scale = math.sqrt(2 / waves)

    def __call__(self, x: Reals, y: Reals) -> Reals:
        """Return the noise at the points (x, y). Its mean is 0 and its standard deviation 1."""
        total = np.zeros_like(x)
        for kx, ky, phase in zip(self._x, self._y, self._phases, strict=True):
            total += np.sin(kx * x + ky * y + phase)
        return total * self._scale


class Ground:
    """Paints everything flat: meadow, fields, verge, asphalt and road markings."""

    def __init__(
        self,
        camera: Camera,
        road: Road,
        palette: Palette,
        rng: np.random.Generator,
        patch_seed: int,
    ) -> None:
        self._road = road
        self._palette = palette
        self._ripeness: _Noise = _Swell(rng, 26.0, 5)
        self._tufts: _Noise = _Swell(rng, 6.0, 4)
        self._patches = (2 * uniform(patch_seed, np.arange(256)) - 1).astype(np.float32)
        self._width = camera.width
        self._first_row = camera.first_ground_row
        below = np.arange(self._first_row, camera.height) + 0.5 - camera.horizon_row
        depth = np.minimum(camera.focal * camera.above_ground_m / below, _FARTHEST_M)
        self._depth = depth[:, None].astype(np.float32)
        self._pixel_across = self._depth / np.float32(camera.focal)
        self._pixel_along = self._depth**2 / np.float32(camera.focal * camera.above_ground_m)
        self._haze = 1 - np.exp(-self._depth / HAZE_M)
        self._slopes_c = camera.column_slopes(np.arange(0, self._width + _COARSE, _COARSE))
        self._part = np.arange(_COARSE, dtype=np.float32) / _COARSE

    def seen_from(self, view: View, camera: Camera, elsewhere: "Ground") -> "Ground":
        """Return this ground where a camera sees it, and the meadow of `elsewhere` otherwise."""

        def mixed(own: _Noise, other: _Noise) -> _Noise:
            def noise(x: Reals, y: Reals) -> Reals:
                is_seen = camera.sees(*view.depth_and_left(x, y))
                return np.asarray(np.where(is_seen, own(x, y), other(x, y)))

            return noise

        ground = copy(self)
        ground._ripeness = mixed(self._ripeness, elsewhere._ripeness)
        ground._tufts = mixed(self._tufts, elsewhere._tufts)
        return ground

    def _fine(self, values_c: Reals) -> Reals:
        """Interpolate from every fourth column to all columns."""
        low, high = values_c[:, :-1, None], values_c[:, 1:, None]
        fine = rearrange(low + (high - low) * self._part, "rows coarse part -> rows (coarse part)")
        return np.asarray(fine[:, : self._width])

    def _footprints(self, slope_c: Reals, view: View) -> tuple[Reals, Reals]:
        """Return the extent of each pixel's footprint along and across the road, in metres."""
        tangent_x = 1 / np.sqrt(1 + slope_c * slope_c)
        tangent_y = slope_c * tangent_x
        ahead = tangent_x * view.cos + tangent_y * view.sin
        left = tangent_y * view.cos - tangent_x * view.sin
        along = np.abs(left) * self._pixel_across
        along = along + np.abs(ahead + left * self._slopes_c) * self._pixel_along
        across = np.abs(ahead) * self._pixel_across
        across = across + np.abs(ahead * self._slopes_c - left) * self._pixel_along
        return along, across

    def paint(self, frame: Floats32, view: View) -> None:
        """Fill the rows of a frame [3, H, W] below the horizon."""
        left_c = self._slopes_c * self._depth
        x_c = view.x + self._depth * view.cos - left_c * view.sin
        y_c = view.y + self._depth * view.sin + left_c * view.cos
        station_c, offset_c, slope_c = self._road.project(x_c, y_c)
        along_c, across_c = self._footprints(slope_c, view)
        station, offset, along, across = map(self._fine, (station_c, offset_c, along_c, across_c))
        aside, line, palette = np.abs(offset), _LINE_HALF_WIDTH, self._palette

        mown = 2 * _pulses(station, along, 2 * _MOWN_M, _MOWN_M) - 1
        ripe, tone = self._ripeness_and_tone(x_c, y_c)
        tone = tone + 0.13 * mown * np.clip(2.0 - aside / 16, 0, 1)
        ground = frame[:, self._first_row :]
        ground[:] = (palette["meadow"] + ripe * (palette["field"] - palette["meadow"])) * tone

        worn = palette["asphalt"] * (1 + 0.22 * self._patch(station, along))
        dashes = _pulses(station, along, DASH_PERIOD_M, DASH_M)
        lines = _stripe(aside, _EDGE_LINE - line, _EDGE_LINE + line, across)
        lines += _stripe(offset, -line, line, across) * dashes
        blend(ground, palette["verge"], _stripe(aside, -1.0, _VERGE, across))
        blend(ground, worn, _stripe(aside, -1.0, HALF_WIDTH, across))
        blend(ground, palette["marking"], np.minimum(lines, 1))
        blend(ground, palette["haze"], self._haze)

    def _ripeness_and_tone(self, x_c: Reals, y_c: Reals) -> tuple[Reals, Reals]:
        """Return the ripeness of the grass (0..1) and its relative brightness at each pixel."""
        # Fade each pattern to its mean where a pixel covers too much ground to show the pattern.
        ripe_c = 0.35 + 0.6 * self._ripeness(x_c, y_c) * np.exp(-self._pixel_along / 12.0)
        tone_c = 1 + 0.08 * self._tufts(x_c, y_c) * np.exp(-self._pixel_along / 3.0)
        return self._fine(np.clip(ripe_c, 0, 1)), self._fine(tone_c)

    def _patch(self, station: Reals, along: Reals) -> Reals:
        """Return the tone of the asphalt at each pixel, in -1..1.

        The asphalt consists of patches of random tone, each `_PATCH_M` metres long.
        """
        near_end = station + 0.5 * along
        number = np.floor(near_end / _PATCH_M)
        index = number.astype(np.int32) & 255
        here, before = self._patches[index], self._patches[index - 1]
        share = np.minimum((near_end - number * _PATCH_M) / along, 1)
        return np.asarray((before + (here - before) * share) * np.minimum(_PATCH_M / along, 1))
