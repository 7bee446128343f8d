"""Rotary positions over (time, row, column): each axis turns its own share of a head's channels.

RoPE (Su et al. 2021, arXiv 2104.09864), axial as in arXiv 2403.13298. Angles are computed in
float32 from the absolute frame number; there is no table that a long rollout could outgrow.

Axes: T frames, S slots per frame, N = T * S, P pairs of channels, E channels of a head.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

_SLOWEST = 100.0  # the slowest pair of an axis turns this many times slower than the fastest


class AxialRotary(nn.Module):
    """Cosines and sines of the slots of given frames, for heads of `channels` channels."""

    row: Tensor
    col: Tensor
    axis: Tensor
    """Which of time, row and column turns each pair."""
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
        """Return float32 cosines and sines [N, P] of every slot of the frames numbered [T]."""
        shape = len(frames), len(self.row)
        places = frames[:, None].expand(shape), self.row.expand(shape), self.col.expand(shape)
        place_TS3 = torch.stack(places, dim=-1).float()
        angle_NP = rearrange(place_TS3[..., self.axis] * self.frequency, "t s p -> (t s) p")
        return angle_NP.cos(), angle_NP.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + E/2) of x [..., N, E] by its slot's angle, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)
