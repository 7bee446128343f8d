"""What the picture says about the car's motion: how far it turned, and whether it moved.

A car that turns shifts its whole picture sideways; a car that drives ahead spreads it to both sides
of the vanishing point, which leaves the mean shift of the far field alone. So the shift of the band
around the horizon, found by normalised cross-correlation, measures the turn. The road below and the
bonnet do not take part: one moves by itself, the other never does.

Legend: T frames, P = T - 1 pairs of frames, R rows of the band, C columns, S shifts.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from driving_sim.data.arrays import Floats32, Pixels

# Frames are measured at this size, whatever they come in: a pixel is 0.8 % of the width, the peak
# is found to a fraction of that, and blur or block artefacts of a decoder matter little.
_ROWS, _COLUMNS = 64, 128
_HORIZON = slice(10, 35)
_ROAD = slice(32, 54)
_MAX_SHIFT = 32
_MAX_PITCH = 2
_DETAIL_SIGMA = 6.0
_FAINTEST_DETAIL = 4.0
_CUT_SCORE = 0.2
_PAIRS_AT_ONCE = 64


def _grey(frames: Pixels) -> Tensor:
    """Frames [T, H, W, 3] as grey levels [T, 64, 128]."""
    grey = torch.from_numpy(np.ascontiguousarray(frames)).float() @ torch.full((3,), 1 / 3)
    return functional.interpolate(grey[:, None], (_ROWS, _COLUMNS), mode="area")[:, 0]


@cache
def _blur_matrix(length: int, sigma: float) -> Tensor:
    """Gaussian weights [length, length] of the neighbours of each place; each row sums to 1."""
    places = torch.arange(length, dtype=torch.float32)
    return torch.softmax(-((places[:, None] - places) / sigma).square() / 2, dim=1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [..., H, W], sigma in pixels: as matrices, far cheaper than convolutions."""
    return _blur_matrix(images.shape[-2], sigma) @ images @ _blur_matrix(images.shape[-1], sigma).T


def local_detail(grey: Tensor, sigma: float) -> Tensor:
    """Grey levels [..., H, W] minus their surroundings, at equal contrast everywhere.

    A bright kerb then weighs no more than a faint hill, and a change of light nothing.
    """
    detail = grey - blurred(grey, sigma)
    return detail / (blurred(detail.square(), sigma).sqrt() + _FAINTEST_DETAIL)


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """Normalised cross-correlation [P, S] of [P, R, C] for shifts -32 to 32, right positive."""
    columns = before.shape[-1]
    # Zero padding to twice the width keeps the shifts from wrapping around.
    spectra = (torch.fft.rfft(image, 2 * columns) for image in (before, after))
    first, second = spectra
    products = torch.fft.irfft((first.conj() * second).sum(dim=1), 2 * columns)
    shifts = torch.arange(-_MAX_SHIFT, _MAX_SHIFT + 1)
    energy_before, energy_after = (
        functional.pad(reduce(image.square(), "p r c -> p c", "sum").cumsum(1), (1, 0))
        for image in (before, after)
    )
    # At shift s, columns [0, C - s) before meet columns [s, C) after.
    low, high = (-shifts).clamp(min=0), columns - shifts.clamp(min=0)
    met_before = energy_before[:, high] - energy_before[:, low]
    met_after = energy_after[:, high + shifts] - energy_after[:, low + shifts]
    correlation = products[:, shifts] / (met_before * met_after + 1.0).sqrt()
    # A small overlap fits by chance more easily.
    overlap: Tensor = correlation * (1 - shifts.abs() / columns).sqrt()
    return overlap


def _peak(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Where scores [P, S] are highest, as a shift in fractions of a pixel, and how high."""
    height, index = scores.max(dim=1)
    inner = index.clamp(1, scores.shape[1] - 2)
    left, centre, right = (scores.gather(1, inner[:, None] + step)[:, 0] for step in (-1, 0, 1))
    curvature = (left - 2 * centre + right).clamp(max=-1e-9)
    fraction = ((left - right) / (2 * curvature)).clamp(-0.5, 0.5)
    return inner + fraction - _MAX_SHIFT, height


def _chunks(frames: Pixels) -> Iterator[Pixels]:
    """Pieces that share one frame, so that together they hold every pair of neighbours."""
    for start in range(0, len(frames) - 1, _PAIRS_AT_ONCE):
        yield frames[start : start + _PAIRS_AT_ONCE + 1]


def yaw_motion(frames: Pixels) -> Floats32:
    """Measure how far the scene moves sideways between consecutive frames.

    Takes uint8 [T, H, W, 3] of any size and returns float32 [T - 1] in picture widths, at most a
    quarter either way. Positive: the scene moves right, because the car turns left. Two frames that
    do not match (a cut) give 0.
    """
    shifts = [np.zeros(0, np.float32)]
    for chunk in _chunks(frames):
        detail = local_detail(_grey(chunk), _DETAIL_SIGMA)
        before = detail[:-1, _HORIZON]
        # The car also pitches: take the best of a few vertical offsets.
        scores = torch.stack(
            [
                _correlation(before, detail[1:, _HORIZON.start + dy : _HORIZON.stop + dy])
                for dy in range(-_MAX_PITCH, _MAX_PITCH + 1)
            ]
        ).amax(dim=0)
        shift, height = _peak(scores)
        shifts.append(torch.where(height > _CUT_SCORE, shift / _COLUMNS, 0.0).float().numpy())
    return np.concatenate(shifts)


def picture_change(frames: Pixels) -> Floats32:
    """Measure how much the road ahead changes between consecutive frames: near 0 at a standstill.

    Takes uint8 [T, H, W, 3] and returns float32 [T - 1], the mean difference as a share of white.
    """
    changes = [np.zeros(0, np.float32)]
    for chunk in _chunks(frames):
        road = _grey(chunk)[:, _ROAD] / 255
        changes.append(reduce(road.diff(dim=0).abs(), "p r c -> p", "mean").numpy())
    return np.concatenate(changes)
