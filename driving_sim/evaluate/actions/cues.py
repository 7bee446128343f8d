"""Measure the motion between neighbouring frames, as input for the inverse-dynamics probe.

Two cues are measured for each pair of frames:

- The turn is the sideways shift of the whole scene (`data.inspect.motion.yaw_motion`).
- The motion shows how each cell of the picture moves in addition to the turn. To measure it, the
  second frame is shifted back by the turn. Then each cell of the first frame is correlated with the
  second frame at several displacements. The result is a cost volume, as in PWC-Net
  (https://arxiv.org/abs/1709.02371).

Legend: T frames of a clip, P = T - 1 pairs of neighbouring frames, V versions of a picture (sharp,
soft), D displacements; H, W pixels and R, C cells of a picture.
"""

from functools import partial

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional

from driving_sim.data.arrays import Pixels
from driving_sim.data.inspect.motion import blurred, local_detail, yaw_motion

# Frames are resized to this size, at which a decoder's blur and block artefacts matter little.
_ROWS, _COLUMNS = 64, 128
# Cells are compared in pictures of half this size. Their largest displacements to either side, up
# and down are given in pixels of these half-size pictures.
_ACROSS, _UP, _DOWN = 6, 1, 4
# Height and width of a cell, in pixels of the half-size picture.
_CELL = (4, 8)
DISPLACEMENTS = (2 * _ACROSS + 1) * (_UP + 1 + _DOWN)
"""Number of displacements at which a cell is compared with the next frame."""
CELLS = (_ROWS // 2 // _CELL[0]) * (_COLUMNS // 2 // _CELL[1])
"""Number of cells in a picture."""
_DETAIL_SIGMA = 3.0
_FAINTEST_CELL = 0.02
_PAIRS_AT_ONCE = 64
_SOFT_SIGMA = 1.5
"""Standard deviation of the blur in the soft version of a picture, in pixels.

A probe also trains on soft pictures, because reconstructions and rollouts are softer than video.
"""
RECIPE = f"{_ROWS} {_COLUMNS} {_DETAIL_SIGMA} {_FAINTEST_CELL}"
"""The settings that change the cues but not their shapes.

A probe's fingerprint includes them, because the probe's weights do not reveal them.
"""


def motion_cues(frames: Pixels, *, soften: bool = False) -> tuple[Tensor, Tensor]:
    """Measure turn and motion between neighbouring frames, uint8 [T, H, W, 3] of any size.

    Returns the turns, float32 [V, P], and the motion, float32 [V, P, D, R, C]. A turn is how far
    the scene moves right, in picture widths. The motion is the correlation of each cell with the
    next frame at each displacement, after the next frame is shifted back by the turn. Normally V is
    1. With `soften`, V is 2: the second version is measured on blurred frames.
    """
    grey = _grey(frames)
    versions = [grey, blurred(grey, _SOFT_SIGMA)] if soften else [grey]
    turns = [_turns(version) for version in versions]
    return torch.stack(turns), torch.stack([*map(_motion, versions, turns)])


def mirrored_motion(motion: Tensor) -> Tensor:
    """Return the motion [..., D, R, C] that the frames would have if they were mirrored."""
    by_row = rearrange(motion, "... (y x) r c -> ... y x r c", x=2 * _ACROSS + 1)
    return rearrange(by_row.flip(-3, -1), "... y x r c -> ... (y x) r c")


def _grey(frames: Pixels) -> Tensor:
    """Convert frames [T, H, W, 3] to small grey pictures, float32 [T, 64, 128]."""
    parts = []
    for part in torch.split(torch.from_numpy(np.ascontiguousarray(frames)), _PAIRS_AT_ONCE):
        # Sums of whole numbers are exact, so a mirrored frame gives exactly the mirrored picture.
        light = reduce(part.float(), "t h w c -> t 1 h w", "sum")
        parts.append(functional.interpolate(light, (_ROWS, _COLUMNS), mode="area")[:, 0] / 3)
    return torch.cat(parts)


def _turns(grey: Tensor) -> Tensor:
    """Return how far the scene moves right between frames [P], in picture widths.

    Mirrored frames give exactly the negated values.
    """
    frames = repeat(grey.round().to(torch.uint8).numpy(), "t h w -> t h w c", c=3)
    mirrored = np.ascontiguousarray(frames[:, :, ::-1])
    return torch.from_numpy((yaw_motion(frames) - yaw_motion(mirrored)) / 2)


def _motion(grey: Tensor, turns: Tensor) -> Tensor:
    """Correlate each cell of grey frames [T, H, W] with the next frame, [P, D, R, C].

    Each next frame is first shifted back by its turn in `turns` [P].
    """
    parts = [torch.zeros(0, DISPLACEMENTS, _ROWS // 2 // _CELL[0], _COLUMNS // 2 // _CELL[1])]
    for first in range(0, len(turns), _PAIRS_AT_ONCE):
        turned = turns[first : first + _PAIRS_AT_ONCE]
        half = functional.avg_pool2d(grey[first : first + len(turned) + 1], 2)
        detail = local_detail(half, _DETAIL_SIGMA)
        parts.append(_cell_correlation(detail[:-1], _turned_back(detail[1:], turned)))
    return torch.cat(parts)


def _cell_correlation(before: Tensor, after: Tensor) -> Tensor:
    """Return the normalised correlation [P, D, R, C] of each cell with the next image.

    `before` and `after` are images [P, H, W]. A cell of `before` is compared with `after` at each
    of the D displacements.
    """
    rows, columns = before.shape[-2:]
    padded = functional.pad(after, (_ACROSS, _ACROSS, _UP, _DOWN))
    cells = partial(functional.avg_pool2d, kernel_size=_CELL)
    energy = cells(before.square())
    scores = []
    for down in range(_UP + 1 + _DOWN):
        for right in range(2 * _ACROSS + 1):
            displaced = padded[:, down : down + rows, right : right + columns]
            norm = (energy * cells(displaced.square())).sqrt().clamp(min=_FAINTEST_CELL)
            scores.append(cells(before * displaced) / norm)
    return torch.stack(scores, dim=1)


def _turned_back(images: Tensor, turns: Tensor) -> Tensor:
    """Move images [P, H, W] left by `turns` [P], in picture widths, and fill with zeros."""
    columns = images.shape[-1]
    positions = torch.arange(columns) + turns[:, None] * columns
    first = positions.floor()
    fraction = (positions - first)[:, None]
    # Add a column of zeros at each side. Positions outside the image read from these columns.
    padded = functional.pad(images, (1, 1))
    sides = [
        repeat((first + step).clamp(-1, columns) + 1, "p w -> p h w", h=images.shape[1])
        for step in (0, 1)
    ]
    left, right = (padded.gather(2, side.long()) for side in sides)
    return torch.lerp(left, right, fraction)
