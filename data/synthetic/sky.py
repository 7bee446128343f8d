"""Sky, sun, clouds and hills: a panorama painted once, of which each frame shows a part."""

import math

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.synthetic.camera import Camera, View
from driving_sim.data.synthetic.palette import Colour, Palette
from driving_sim.data.synthetic.road import Floats

_AZIMUTHS = 4096
_ROWS = 160
_TOP = 0.9
"""Tangent of the highest elevation in the panorama."""


def _waves(rng: np.random.Generator, azimuth: Floats, harmonics: range, decay: float) -> Floats:
    """Return a smooth periodic function of the azimuth in about -1..1."""
    total = np.zeros_like(azimuth)
    for harmonic in harmonics:
        phase = rng.uniform(0, 2 * math.pi)
        total += harmonic**-decay * np.sin(harmonic * azimuth + phase)
    return np.asarray(total / np.abs(total).max())


class Sky:
    """Everything that is too far away to move as the car does: it only turns."""

    def __init__(self, camera: Camera, palette: Palette, rng: np.random.Generator) -> None:
        self._rows = camera.first_ground_row
        self._column_azimuths = np.arctan(camera.column_slopes())
        self._panorama = self._paint(palette, rng)
        self._elevations = self._elevation_indices(camera)

    def _elevation_indices(self, camera: Camera) -> NDArray[np.intp]:
        rise = (camera.horizon_row - 0.5 - np.arange(self._rows))[:, None] / camera.focal
        # A pixel to the side is further from the camera, so it looks less steeply up.
        tangent = rise * np.cos(self._column_azimuths)[None, :]
        return np.clip((tangent / _TOP * _ROWS).astype(np.intp), 0, _ROWS - 1)

    def _paint(self, palette: Palette, rng: np.random.Generator) -> NDArray[np.uint8]:
        azimuth = (np.arange(_AZIMUTHS, dtype=np.float32) / _AZIMUTHS * 2 * np.pi)[None, :]
        tangent = ((np.arange(_ROWS, dtype=np.float32) + 0.5) / _ROWS * _TOP)[:, None]
        elevation = np.arctan(tangent)
        picture = np.empty((_ROWS, _AZIMUTHS, 3), np.float32)
        picture[:] = palette.horizon

        def lay(colour: Colour, cover: Floats) -> None:
            picture[:] += cover[..., None] * (np.array(colour, np.float32) - picture)

        lay(palette.zenith, np.broadcast_to(1 - np.exp(-2.6 * elevation), (_ROWS, _AZIMUTHS)))
        sun_azimuth, sun_elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.22, 0.42)
        apart = np.sqrt(
            (2 * np.sin((azimuth - sun_azimuth) / 2)) ** 2 + (elevation - sun_elevation) ** 2
        )
        lay(palette.sun, 0.75 * np.exp(-apart / 0.25) + np.clip((0.07 - apart) * 60, 0, 1) * 0.9)
        billow = 0.5 * _waves(rng, azimuth + 2.2 * elevation, range(3, 14), 0.6)
        billow = billow + 0.5 * _waves(rng, azimuth - 5.0 * elevation, range(2, 12), 0.4)
        band = np.exp(-(((elevation - 0.34) / 0.16) ** 2))
        lay(palette.cloud, 0.85 * np.clip((billow * band - 0.16) * 5, 0, 1))
        for colour, base, swing, harmonics in (
            (palette.far_hills, 0.115, 0.075, range(3, 40)),
            (palette.near_hills, 0.050, 0.038, range(5, 60)),
        ):
            ridge = base + swing * _waves(rng, azimuth, harmonics, 1.1)
            lay(colour, np.clip((ridge - tangent) * _ROWS / _TOP + 0.5, 0, 1))
        return np.clip(picture, 0, 255).astype(np.uint8)

    def paint(self, frame: NDArray[np.float32], view: View) -> None:
        """Fill the rows above the horizon."""
        turn = (view.heading + self._column_azimuths) / (2 * math.pi) * _AZIMUTHS
        columns = np.floor(turn).astype(np.intp) % _AZIMUTHS
        frame[: self._rows] = self._panorama[self._elevations, columns[None, :]]
