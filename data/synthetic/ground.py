"""The ground: an endless meadow with the road through it, painted pixel by pixel.

Every pattern is fixed to the world, and is averaged over the pixel's footprint, so that it neither
swims nor flickers. Arrays are [rows, columns] of the picture below the horizon.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.synthetic.camera import Camera, View
from driving_sim.data.synthetic.hashing import uniform
from driving_sim.data.synthetic.palette import Colour, Palette
from driving_sim.data.synthetic.road import HALF_WIDTH, Road

Plane = NDArray[np.float32]

_FARTHEST_M = 500.0
_HAZE_M = 260.0
_TEXELS = 1024
_TEXELS_PER_WAVE = 32

DASH_M, DASH_PERIOD_M = 5.0, 12.0
_LINE_HALF_WIDTH = 0.14
_EDGE_LINE = 3.35
_VERGE = 4.9
_PATCH_M = 9.0
_MOWN_M = 7.0


def _smooth_noise(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a periodic table of smooth noise with mean 0 and standard deviation 1."""
    waves = _TEXELS // _TEXELS_PER_WAVE
    lattice = rng.standard_normal((waves, waves))
    place = np.arange(_TEXELS) / _TEXELS_PER_WAVE
    low = place.astype(np.intp)
    part = place - low
    part = part * part * (3 - 2 * part)
    high = (low + 1) % waves
    rows = lattice[low] + part[:, None] * (lattice[high] - lattice[low])
    table = rows[:, low] + part * (rows[:, high] - rows[:, low])
    return np.asarray((table - table.mean()) / table.std(), np.float32)


def _stripe(place: Plane, low: float, high: float, footprint: Plane) -> Plane:
    """Return how much of each pixel's footprint lies between `low` and `high`."""
    half = 0.5 * footprint
    overlap = np.minimum(place + half, high) - np.maximum(place - half, low)
    return np.asarray(np.maximum(overlap, 0) / footprint, dtype=np.float32)


def _pulse_integral(place: Plane, period: float, length: float) -> Plane:
    whole = np.floor(place / period)
    return np.asarray(whole * length + np.minimum(place - whole * period, length), np.float32)


def _dashes(place: Plane, footprint: Plane) -> Plane:
    """Return how much of each pixel's footprint lies on a dash."""
    half = 0.5 * footprint
    covered = _pulse_integral(place + half, DASH_PERIOD_M, DASH_M) - _pulse_integral(
        place - half, DASH_PERIOD_M, DASH_M
    )
    return np.asarray(covered / footprint, dtype=np.float32)


class Ground:
    """Paints everything flat: meadow, fields, verge, asphalt, markings."""

    def __init__(
        self,
        camera: Camera,
        road: Road,
        palette: Palette,
        rng: np.random.Generator,
        texture_seed: int,
    ) -> None:
        self._road = road
        self._palette = palette
        self._noise = _smooth_noise(rng)
        self._patches = (2 * uniform(texture_seed, np.arange(256)) - 1).astype(np.float32)
        self._first_row = camera.first_ground_row
        below = np.arange(self._first_row, camera.height, dtype=np.float32)
        below += 0.5 - camera.horizon_row
        depth = np.minimum(camera.focal * camera.above_ground_m / below, _FARTHEST_M)
        self._depth = depth[:, None].astype(np.float32)
        self._slopes = camera.column_slopes()[None, :]
        self._left = self._slopes * self._depth
        self._pixel_across = self._depth / np.float32(camera.focal)
        self._pixel_along = self._depth**2 / np.float32(camera.focal * camera.above_ground_m)
        self._haze = 1 - np.exp(-self._depth / _HAZE_M)[..., None]

    def _texture(self, x: Plane, y: Plane, wavelength_m: float) -> Plane:
        """Return world-fixed noise, faded where a pixel is too coarse to show it."""
        scale = np.float32(_TEXELS_PER_WAVE / wavelength_m)
        column = np.floor(x * scale).astype(np.int32) & (_TEXELS - 1)
        row = np.floor(y * scale).astype(np.int32) & (_TEXELS - 1)
        fade = np.clip(1.6 - 2.5 * self._pixel_along / wavelength_m, 0, 1)
        return np.asarray(self._noise[row, column] * fade, np.float32)

    def _footprints(self, slope: Plane, view: View) -> tuple[Plane, Plane]:
        """Return a pixel's extent along and across the road, in metres."""
        tangent_x = 1 / np.sqrt(1 + slope * slope)
        tangent_y = slope * tangent_x
        ahead = tangent_x * np.float32(view.cos) + tangent_y * np.float32(view.sin)
        left = tangent_y * np.float32(view.cos) - tangent_x * np.float32(view.sin)
        along = np.abs(left) * self._pixel_across
        along = along + np.abs(ahead + left * self._slopes) * self._pixel_along
        across = np.abs(ahead) * self._pixel_across
        across = across + np.abs(ahead * self._slopes - left) * self._pixel_along
        return along, across

    def paint(self, frame: NDArray[np.float32], view: View) -> None:
        """Fill the rows below the horizon."""
        x = view.x + self._depth * np.float32(view.cos) - self._left * np.float32(view.sin)
        y = view.y + self._depth * np.float32(view.sin) + self._left * np.float32(view.cos)
        station, offset, slope = self._road.project(x, y)
        along, across = self._footprints(slope, view)
        ground = frame[self._first_row :]
        self._paint_meadow(ground, x, y, station, offset, along)
        self._paint_road(ground, station, offset, along, across)
        ground += self._haze * (_rgb(self._palette.haze) - ground)

    def _paint_meadow(
        self, ground: Plane, x: Plane, y: Plane, station: Plane, offset: Plane, along: Plane
    ) -> None:
        meadow = np.array(self._palette.meadow, np.float32)
        field = np.array(self._palette.field, np.float32)
        ripe = np.clip(self._texture(x, y, 26.0) * 1.6 + 0.35, 0, 1)
        tone = 1 + 0.10 * self._texture(x * 0.8 - y * 0.6, x * 0.6 + y * 0.8, 5.0)
        mown = 2 * _stripe_parity(station, along) - 1
        tone += 0.13 * mown * np.clip(2.0 - np.abs(offset) / 16, 0, 1)
        ground[:] = (meadow + ripe[..., None] * (field - meadow)) * tone[..., None]

    def _paint_road(
        self, ground: Plane, station: Plane, offset: Plane, along: Plane, across: Plane
    ) -> None:
        def lay(colour: Any, cover: Plane) -> None:
            np.add(ground, cover[..., None] * (colour - ground), out=ground)

        palette = self._palette
        aside = np.abs(offset)
        lay(_rgb(palette.verge), _stripe(aside, -1.0, _VERGE, across))
        patch = self._patches[np.floor(station / _PATCH_M).astype(np.int32) & 255]
        tone = 1 + 0.16 * patch * np.clip(1.5 - along / _PATCH_M, 0, 1)
        lay(_rgb(palette.asphalt) * tone[..., None], _stripe(aside, -1.0, HALF_WIDTH, across))
        line = _LINE_HALF_WIDTH
        lines = _stripe(aside, _EDGE_LINE - line, _EDGE_LINE + line, across)
        lines += _stripe(offset, -line, line, across) * _dashes(station, along)
        lay(_rgb(palette.marking), np.minimum(lines, 1))


def _rgb(colour: Colour) -> NDArray[np.float32]:
    return np.array(colour, np.float32)


def _stripe_parity(station: Plane, along: Plane) -> Plane:
    """Return the share of each pixel that lies on the light of alternate mown bands."""
    half = 0.5 * along
    period = 2 * _MOWN_M
    light = _pulse_integral(station + half, period, _MOWN_M) - _pulse_integral(
        station - half, period, _MOWN_M
    )
    return np.asarray(light / along, np.float32)
