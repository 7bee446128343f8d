"""Rotary positions over (time, row, column): each axis turns its own share of a head's channels.

RoPE (Su et al. 2021, arXiv 2104.09864), axial as in arXiv 2403.13298. Angles are computed in
float32 from the absolute frame number; there is no table that a long rollout could outgrow.

Axes: T frames, S slots per frame, N = T * S, P pairs of channels, E channels of a head.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

_SLOWEST = 100.0  # the slowest pair of an axis turns this many times slower than the fastest


class AxialRotary(nn.Module):
    """Cosines and sines of the slots of given frames, for heads of `channels` channels."""

    row: Tensor
    col: Tensor
    frequency: Tensor

    def __init__(self, row: Tensor, col: Tensor, channels: int) -> None:
        super().__init__()
        pairs = channels // 2
        time = pairs // 4
        down = (pairs - time) // 2
        self.sizes = [time, down, pairs - time - down]
        steps = [torch.arange(size) / max(size, 1) for size in self.sizes]
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("col", col, persistent=False)
        self.register_buffer("frequency", _SLOWEST ** -torch.cat(steps), persistent=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 cosines and sines [N, P] of every slot of the frames numbered [T]."""
        time_f, row_f, col_f = torch.split(self.frequency, self.sizes)
        slots, count = len(self.row), len(frames)
        angle_TSP = torch.cat(
            [
                repeat(frames.float()[:, None] * time_f, "t p -> t s p", s=slots),
                repeat(self.row.float()[:, None] * row_f, "s p -> t s p", t=count),
                repeat(self.col.float()[:, None] * col_f, "s p -> t s p", t=count),
            ],
            dim=-1,
        )
        angle_NP = rearrange(angle_TSP, "t s p -> (t s) p")
        return angle_NP.cos(), angle_NP.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + E/2) of x [..., N, E] by its slot's angle, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)
