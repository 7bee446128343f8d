"""The sky: a panorama of sun, clouds and hills, painted once. Each frame shows a part of it."""

import math
from copy import copy

import numpy as np
from einops import rearrange

from driving_sim.data.arrays import Floats32, Pixels, Reals
from driving_sim.data.synthetic.drawing.camera import Camera, View
from driving_sim.data.synthetic.drawing.palette import Palette
from driving_sim.data.synthetic.drawing.shapes import blend

# Number of texels of the panorama per pixel of a frame, in each direction. It is more than 1,
# because lookups do not interpolate.
_OVERSAMPLING = 2


def _waves(rng: np.random.Generator, azimuth: Reals, harmonics: range, decay: float) -> Reals:
    """Return a smooth periodic function of the azimuth, with values in -1..1."""
    total = np.zeros_like(azimuth)
    for harmonic in harmonics:
        phase = rng.uniform(0, 2 * math.pi)
        total += harmonic**-decay * np.sin(harmonic * azimuth + phase)
    return np.asarray(total / np.abs(total).max())


class Sky:
    """Paints the sky and the distant hills, which move in the picture only when the car turns."""

    def __init__(self, camera: Camera, palette: Palette, rng: np.random.Generator) -> None:
        self._rows = camera.first_ground_row
        self._pixel = 1 / camera.focal
        columns = np.arange(camera.width, dtype=np.float32)
        self._column_azimuths = np.arctan(camera.column_slopes(columns))
        # Compute the tangent of each pixel's elevation angle. In the same row, pixels at the sides
        # of the picture have a smaller elevation than those in the middle.
        rise = (camera.horizon_row - 0.5 - np.arange(self._rows))[:, None] * self._pixel
        tangents = np.maximum(rise * np.cos(self._column_azimuths)[None, :], 0)
        self._azimuths = round(2 * math.pi * camera.focal * _OVERSAMPLING)
        elevations = (tangents * (camera.focal * _OVERSAMPLING)).astype(np.intp)
        self._first_texels = elevations * self._azimuths
        panorama = self._paint(palette, rng, int(elevations.max()) + 1)
        padded = np.zeros((*panorama.shape[1:], 4), np.uint8)
        padded[..., :3] = rearrange(panorama, "rgb rows columns -> rows columns rgb")
        # Use four bytes per texel, so that a lookup is one gather instead of three.
        self._texels = padded.view(np.uint32).ravel()

    def _paint(self, palette: Palette, rng: np.random.Generator, rows: int) -> Pixels:
        """Paint and return the panorama [3, rows, azimuths]."""
        azimuth = (np.arange(self._azimuths, dtype=np.float32) / self._azimuths * 2 * np.pi)[None]
        tangent = (np.arange(rows, dtype=np.float32)[:, None] + 0.5) * self._pixel / _OVERSAMPLING
        elevation = np.arctan(tangent)
        picture = np.empty((3, rows, self._azimuths), np.float32)
        picture[:] = palette["horizon"]
        blend(picture, palette["zenith"], 1 - np.exp(-2.6 * elevation))
        sun_azimuth, sun_elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.22, 0.34)
        aside = 2 * np.sin((azimuth - sun_azimuth) / 2)
        apart = np.sqrt(aside**2 + (elevation - sun_elevation) ** 2)
        blend(picture, palette["sun"], 0.75 * np.exp(-apart / 0.25))
        blend(picture, palette["sun"], 0.9 * np.clip((0.07 - apart) / self._pixel + 0.5, 0, 1))
        billow = 0.5 * _waves(rng, azimuth + 2.2 * elevation, range(3, 14), 0.6)
        billow = billow + 0.5 * _waves(rng, azimuth - 5.0 * elevation, range(2, 12), 0.4)
        band = np.exp(-(((elevation - 0.34) / 0.16) ** 2))
        blend(picture, palette["cloud"], 0.85 * np.clip((billow * band - 0.16) * 5, 0, 1))
        for colour, base, swing, harmonics in (
            (palette["far_hills"], 0.115, 0.075, range(3, 40)),
            (palette["near_hills"], 0.050, 0.038, range(5, 60)),
        ):
            ridge = base + swing * _waves(rng, azimuth, harmonics, 1.1)
            blend(picture, colour, np.clip((ridge - tangent) / self._pixel + 0.5, 0, 1))
        return np.clip(picture, 0, 255).astype(np.uint8)

    def seen_from(self, view: View, elsewhere: "Sky") -> "Sky":
        """Return this sky where a camera sees it, and the sky `elsewhere` in other directions."""
        sky = copy(self)
        azimuths = np.arange(self._azimuths) / self._azimuths * 2 * math.pi
        aside = np.abs((azimuths - view.heading + math.pi) % (2 * math.pi) - math.pi)
        own, other = (part._texels.reshape(-1, self._azimuths) for part in (self, elsewhere))
        sky._texels = np.where(aside <= self._column_azimuths.max(), own, other).ravel()
        return sky

    def paint(self, frame: Floats32, view: View) -> None:
        """Fill the rows of a frame [3, H, W] above the horizon."""
        turn = (view.heading + self._column_azimuths) / (2 * math.pi) * self._azimuths
        columns = np.floor(turn).astype(np.intp) % self._azimuths
        texels = self._texels[self._first_texels + columns]
        frame[:, : self._rows] = rearrange(
            texels.view(np.uint8), "rows (columns rgb) -> rgb rows columns", rgb=4
        )[:3]
