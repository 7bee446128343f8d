"""What pairs of neighbouring frames show of the motion between them.

How far the picture turned (`data.motion.yaw_motion`) and, the turn taken out, how every part of it
correlates with displaced parts of the next frame: a cost volume, as in PWC-Net
(https://arxiv.org/abs/1709.02371).

Legend: T frames of a clip, P = T - 1 pairs of neighbours, V versions of a picture (sharp, soft),
B of a batch, K pairs, D displacements; H, W pixels and R, C cells of a picture.
"""

from functools import partial

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional

from driving_sim.data.arrays import Pixels
from driving_sim.data.inspect.motion import blurred, local_detail, yaw_motion

# Frames are seen at this size, whatever they come in: blur and blocks of a decoder matter little.
_ROWS, _COLUMNS = 64, 128
# What is left of the motion once the turn is taken out is measured at half of it.
_ACROSS, _UP, _DOWN = 6, 1, 4
_CELL = (4, 8)
DISPLACEMENTS = (2 * _ACROSS + 1) * (_UP + 1 + _DOWN)
"""How many places in the next frame a cell is compared with."""
CELLS = (_ROWS // 2 // _CELL[0]) * (_COLUMNS // 2 // _CELL[1])
"""How many cells a picture has."""
_DETAIL_SIGMA = 3.0
_FAINTEST_CELL = 0.02
_PAIRS_AT_ONCE = 64
_SOFT_SIGMA = 1.5
"""Blur of the soft pictures, in pixels: reconstructions and rollouts are softer than life."""
RECIPE = f"{_ROWS} {_COLUMNS} {_DETAIL_SIGMA} {_FAINTEST_CELL}"
"""What the cues depend on, beside their shapes."""


def motion_cues(frames: Pixels, *, soften: bool = False) -> tuple[Tensor, Tensor]:
    """Measure the pairs of neighbouring frames among uint8 [T, H, W, 3], of any size and aspect.

    Returns the turns, float32 [V, P] picture widths that the scene moves right, and the motion
    [V, P, D, R, C], the likeness of each cell with the next frame displaced, the turn taken out.
    With `soften` there are two versions: the frames as they are, and blurred.
    """
    grey = _grey(frames)
    versions = [grey, blurred(grey, _SOFT_SIGMA)] if soften else [grey]
    turns = [_turns(version) for version in versions]
    return torch.stack(turns), torch.stack([*map(_motion, versions, turns)])


def mirrored_motion(motion: Tensor) -> Tensor:
    """Return the motion [..., D, R, C] of the mirror image."""
    by_row = rearrange(motion, "... (y x) r c -> ... y x r c", x=2 * _ACROSS + 1)
    return rearrange(by_row.flip(-3, -1), "... y x r c -> ... (y x) r c")


def _grey(frames: Pixels) -> Tensor:
    """Frames [T, H, W, 3] as grey levels, float32 [T, 64, 128]."""
    parts = []
    for part in torch.split(torch.from_numpy(np.ascontiguousarray(frames)), _PAIRS_AT_ONCE):
        # A sum of bytes is exact in any order: a mirrored picture gives mirrored levels.
        light = reduce(part.float(), "t h w c -> t 1 h w", "sum")
        parts.append(functional.interpolate(light, (_ROWS, _COLUMNS), mode="area")[:, 0] / 3)
    return torch.cat(parts)


def _turns(grey: Tensor) -> Tensor:
    """How far the scene moves right [P], in picture widths, exactly odd under mirroring."""
    frames = repeat(grey.round().to(torch.uint8).numpy(), "t h w -> t h w c", c=3)
    mirrored = np.ascontiguousarray(frames[:, :, ::-1])
    return torch.from_numpy((yaw_motion(frames) - yaw_motion(mirrored)) / 2)


def _motion(grey: Tensor, turns: Tensor) -> Tensor:
    """Likeness [P, D, R, C] of the cells of grey levels [T, H, W] with the next frame displaced."""
    parts = [torch.zeros(0, DISPLACEMENTS, _ROWS // 2 // _CELL[0], _COLUMNS // 2 // _CELL[1])]
    for first in range(0, len(turns), _PAIRS_AT_ONCE):
        turned = turns[first : first + _PAIRS_AT_ONCE]
        half = functional.avg_pool2d(grey[first : first + len(turned) + 1], 2)
        detail = local_detail(half, _DETAIL_SIGMA)
        parts.append(_likeness(detail[:-1], _turned_back(detail[1:], turned)))
    return torch.cat(parts)


def _likeness(before: Tensor, after: Tensor) -> Tensor:
    """Normalised cross-correlation [P, D, R, C] of the cells of [P, H, W], for displacements."""
    rows, columns = before.shape[-2:]
    padded = functional.pad(after, (_ACROSS, _ACROSS, _UP, _DOWN))
    cells = partial(functional.avg_pool2d, kernel_size=_CELL)
    energy = cells(before.square())
    scores = []
    for down in range(_UP + 1 + _DOWN):
        for right in range(2 * _ACROSS + 1):
            met = padded[:, down : down + rows, right : right + columns]
            both = (energy * cells(met.square())).sqrt().clamp(min=_FAINTEST_CELL)
            scores.append(cells(before * met) / both)
    return torch.stack(scores, dim=1)


def _turned_back(images: Tensor, turns: Tensor) -> Tensor:
    """Move images [P, H, W] left by `turns` [P] of their width, with nothing beyond the edges."""
    columns = images.shape[-1]
    places = torch.arange(columns) + turns[:, None] * columns
    first = places.floor()
    fraction = (places - first)[:, None]
    # One column of nothing at each side, for all places outside.
    padded = functional.pad(images, (1, 1))
    sides = [
        repeat((first + step).clamp(-1, columns) + 1, "p w -> p h w", h=images.shape[1])
        for step in (0, 1)
    ]
    left, right = (padded.gather(2, side.long()) for side in sides)
    return torch.lerp(left, right, fraction)
