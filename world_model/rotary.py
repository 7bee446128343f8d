"""Rotary positions over (time, row, column); each axis rotates its own share of a head's channels.

RoPE (Su et al. 2021, arXiv 2104.09864), axial as in arXiv 2403.13298. Angles are computed in
float32 from the absolute frame number, so rollouts of any length need no lookup table.

Axes: T frames, S slots per frame, N = T * S, P pairs of channels, E channels of a head.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

_SLOWEST = 100.0  # frequencies of an axis: from 1 down to slightly above 1 / _SLOWEST


class AxialRotary(nn.Module):
    """Computes the cosines and sines that rotate the queries and keys of slots.

    `row` and `col` [S] are the positions of a frame's slots. A head has `channels` channels.
    """

    row: Tensor
    col: Tensor
    axis: Tensor
    """The axis whose position rotates each pair of channels, [P]: 0 time, 1 row, 2 column."""
    frequency: Tensor

    def __init__(self, row: Tensor, col: Tensor, channels: int) -> None:
        super().__init__()
        pairs = channels // 2
        time = pairs // 4
        down = (pairs - time) // 2
        sizes = [time, down, pairs - time - down]
        steps = [torch.arange(size) / max(size, 1) for size in sizes]
        axis = torch.tensor([axis for axis, size in enumerate(sizes) for _ in range(size)])
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("col", col, persistent=False)
        self.register_buffer("axis", axis, persistent=False)
        self.register_buffer("frequency", _SLOWEST ** -torch.cat(steps), persistent=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 cosines and sines [N, P] for all slots of the frames with numbers [T]."""
        shape = len(frames), len(self.row)
        places = frames[:, None].expand(shape), self.row.expand(shape), self.col.expand(shape)
        place_TS3 = torch.stack(places, dim=-1).float()
        angle_NP = rearrange(place_TS3[..., self.axis] * self.frequency, "t s p -> (t s) p")
        return angle_NP.cos(), angle_NP.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + E/2) of x [..., N, E] by their slots' angles, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.to(x.dtype)
