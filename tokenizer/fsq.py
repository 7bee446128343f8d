"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505).

Each of D channels is squashed into a few levels and rounded; the codebook is the product of the
levels and needs no learning, no commitment loss and no lookup. All levels are equally wide, the
outer ones included, which the original rounds to from half as far: then all are used more evenly
(as iFSQ, arXiv 2601.17124, has it).

Axes: D channels of a code, K codes in the codebook, `...` any leading axes.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

RULE = "levels of equal width"
"""How values become codes, which weights do not tell: a part of a tokenizer's identity."""
Levels = Annotated[
    tuple[Annotated[int, Field(ge=2, le=2**16)], ...], Field(min_length=1, max_length=16)
]
"""Levels of each channel, as configs hold them."""
_EDGE = 1e-3  # keeps tanh's limits, where it saturates, from rounding to a level beyond


class FSQ(nn.Module):
    """Quantise the last axis, channel d to `levels[d]` values, with straight-through gradients."""

    half_range: Tensor
    offset: Tensor
    shift: Tensor
    scale: Tensor
    base: Tensor
    sizes: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.codebook_size = math.prod(self.levels)
        sizes = torch.tensor(self.levels, dtype=torch.int64)
        half_range = sizes.float() * (1 - _EDGE) / 2
        offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
        constants = {
            "half_range": half_range,
            "offset": offset,
            "shift": torch.atanh(offset / half_range),
            "scale": (sizes // 2).float(),
            "base": torch.cat([torch.ones(1, dtype=torch.int64), sizes.cumprod(0)[:-1]]),
            "sizes": sizes,
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return the codes of z [..., D]: float32 in [-1, 1], with the gradient of the squashing.

        Runs in float32 even under autocast: bfloat16 would merge neighbouring levels.
        """
        with torch.autocast(z.device.type, enabled=False):
            bounded = torch.tanh(z.float() + self.shift) * self.half_range - self.offset
            rounded = bounded + (bounded.round() - bounded).detach()
            return rounded / self.scale

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Return the indices [...] in 0..K-1 (int64) of codes [..., D]."""
        digits = (codes.float() * self.scale).round().long() + self.sizes // 2
        return (digits * self.base).sum(-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes [..., D] (float32) of indices [...] in 0..K-1."""
        digits = indices.unsqueeze(-1) // self.base % self.sizes
        return (digits - self.sizes // 2).float() / self.scale
