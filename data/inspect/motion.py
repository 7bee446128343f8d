"""Measure from the frames of a camera how far the car turned, and whether it moved.

When the car turns, the whole picture shifts sideways. When it drives straight ahead, the picture
spreads to both sides of the vanishing point, which does not change the mean shift of the far field.
So the sideways shift of a band around the horizon measures the turn. Normalised cross-correlation
finds this shift. The band contains neither the road nearby, which moves even when the car does not
turn, nor the bonnet, which never moves.

Legend: T frames, P = T - 1 pairs of frames, R rows of the band, C columns, S shifts, V vertical
offsets.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from driving_sim.data.arrays import Floats32, Pixels

# Frames are scaled to this size before motion is measured. Such a low resolution hides most blur
# and block artefacts of the video codec. It suffices, because shifts are found to a fraction of a
# pixel, and a pixel is 0.8 % of the width.
_ROWS, _COLUMNS = 64, 128
_HORIZON = slice(10, 35)
_ROAD = slice(32, 54)
_MAX_SHIFT = 32
_MAX_PITCH = 2
_DETAIL_SIGMA = 6.0
_FAINTEST_DETAIL = 4.0
_CUT_SCORE = 0.2
# Shifts this close to the best one, in pixels, belong to the same match.
_PEAK_WIDTH = 4
_PAIRS_AT_ONCE = 64


class Motion(NamedTuple):
    """How the far field moves between consecutive frames."""

    sideways: Floats32
    """[P] Shift to the right in picture widths, at most a quarter to either side; 0 if the frames
    do not match, for example at a cut. Positive means that the car turns left."""
    downward: Floats32
    """[P] Shift downwards in 64ths of the picture height, at most 2.5. On average it is 0 for a
    camera that looks ahead."""
    distinctness: Floats32
    """[P] How much better the frames match at this shift than at any other one, from 0 to 2. It is
    almost 0 if the picture has too little texture."""


def _grey(frames: Pixels) -> Tensor:
    """Convert frames [T, H, W, 3] to grey levels [T, 64, 128]."""
    grey = torch.from_numpy(np.ascontiguousarray(frames)).float() @ torch.full((3,), 1 / 3)
    return functional.interpolate(grey[:, None], (_ROWS, _COLUMNS), mode="area")[:, 0]


@cache
def _blur_matrix(length: int, sigma: float) -> Tensor:
    """Return the matrix [length, length] of a Gaussian blur; each row sums to 1."""
    places = torch.arange(length, dtype=torch.float32)
    return torch.softmax(-((places[:, None] - places) / sigma).square() / 2, dim=1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur images [..., H, W] with a Gaussian of `sigma` pixels.

    Multiplying by matrices is far faster than convolving.
    """
    return _blur_matrix(images.shape[-2], sigma) @ images @ _blur_matrix(images.shape[-1], sigma).T


def local_detail(grey: Tensor, sigma: float) -> Tensor:
    """Subtract the local mean from grey levels [..., H, W], and equalise the local contrast.

    In the result, a bright kerb has no more weight than a faint hill, and changes of the light
    disappear.
    """
    detail = grey - blurred(grey, sigma)
    return detail / (blurred(detail.square(), sigma).sqrt() + _FAINTEST_DETAIL)


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """Return the normalised cross-correlation [P, S] of image bands [P, R, C] at shifts -32 to 32.

    A positive shift means that `after` shows the scene farther to the right than `before`.
    """
    columns = before.shape[-1]
    # Pad with zeros to twice the width, so shifted columns do not wrap around.
    spectra = (torch.fft.rfft(image, 2 * columns) for image in (before, after))
    first, second = spectra
    products = torch.fft.irfft((first.conj() * second).sum(dim=1), 2 * columns)
    shifts = torch.arange(-_MAX_SHIFT, _MAX_SHIFT + 1)
    energy_before, energy_after = (
        functional.pad(reduce(image.square(), "p r c -> p c", "sum").cumsum(1), (1, 0))
        for image in (before, after)
    )
    # At shift s, columns [0, C - s) of `before` overlap columns [s, C) of `after`.
    low, high = (-shifts).clamp(min=0), columns - shifts.clamp(min=0)
    met_before = energy_before[:, high] - energy_before[:, low]
    met_after = energy_after[:, high + shifts] - energy_after[:, low + shifts]
    correlation = products[:, shifts] / (met_before * met_after + 1.0).sqrt()
    # Penalise large shifts, because a small overlap more easily matches by chance.
    overlap: Tensor = correlation * (1 - shifts.abs() / columns).sqrt()
    return overlap


def _peak(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Find the highest of the scores [P, S] of each pair.

    Returns its index [P], with a fraction, and its height [P].
    """
    height, index = scores.max(dim=1)
    inner = index.clamp(1, scores.shape[1] - 2)
    left, centre, right = (scores.gather(1, inner[:, None] + step)[:, 0] for step in (-1, 0, 1))
    curvature = (left - 2 * centre + right).clamp(max=-1e-9)
    fraction = ((left - right) / (2 * curvature)).clamp(-0.5, 0.5)
    return inner + fraction, height


def _distinctness(scores: Tensor) -> Tensor:
    """Return by how much the highest of the scores [P, S] exceeds those that are not near it."""
    places = torch.arange(scores.shape[1])
    near = (places - scores.argmax(dim=1, keepdim=True)).abs() <= _PEAK_WIDTH
    distinctness: Tensor = scores.amax(dim=1) - scores.masked_fill(near, -1.0).amax(dim=1)
    return distinctness


def _chunks(frames: Pixels) -> Iterator[Pixels]:
    """Split frames into chunks that overlap by one frame, because motion is measured in pairs."""
    for start in range(0, len(frames) - 1, _PAIRS_AT_ONCE):
        yield frames[start : start + _PAIRS_AT_ONCE + 1]


def measure_motion(frames: Pixels) -> Motion:
    """Measure how the scene moves between consecutive frames, uint8 [T, H, W, 3] of any size."""
    measured = [torch.zeros(3, 0)]
    for chunk in _chunks(frames):
        detail = local_detail(_grey(chunk), _DETAIL_SIGMA)
        before = detail[:-1, _HORIZON]
        # The car also pitches, so take the best of several vertical offsets.
        scores = torch.stack(
            [
                _correlation(before, detail[1:, _HORIZON.start + dy : _HORIZON.stop + dy])
                for dy in range(-_MAX_PITCH, _MAX_PITCH + 1)
            ]
        )
        best = scores.amax(dim=0)
        place, height = _peak(best)
        shift = torch.where(height > _CUT_SCORE, (place - _MAX_SHIFT) / _COLUMNS, 0.0)
        offset = _peak(reduce(scores, "v p s -> p v", "max"))[0] - _MAX_PITCH
        measured.append(torch.stack([shift, offset, _distinctness(best)]))
    return Motion(*torch.cat(measured, dim=1).float().numpy())


def yaw_motion(frames: Pixels) -> Floats32:
    """Measure how far the scene moves sideways between consecutive frames.

    Takes uint8 [T, H, W, 3] of any size and returns float32 [T - 1] in picture widths, at most a
    quarter to either side. Positive means that the scene moves right, because the car turns left.
    If two frames do not match, for example at a cut, the result is 0.
    """
    return measure_motion(frames).sideways


def picture_change(frames: Pixels) -> Floats32:
    """Measure how much the road ahead changes between consecutive frames.

    Takes uint8 [T, H, W, 3] and returns float32 [T - 1]: the mean absolute difference of the grey
    levels, where black is 0 and white is 1. It is almost 0 while the car stands still.
    """
    changes = [np.zeros(0, np.float32)]
    for chunk in _chunks(frames):
        road = _grey(chunk)[:, _ROAD] / 255
        changes.append(reduce(road.diff(dim=0).abs(), "p r c -> p", "mean").numpy())
    return np.concatenate(changes)
