"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505).

Each of D channels is squashed to a bounded range and rounded to one of a few levels. The codebook
holds all combinations of levels. It needs no learning, no commitment loss and no lookup table.
In the original, the two outer levels are only half as wide as the others. Here all levels are
equally wide, so that they are used more evenly (as in iFSQ, arXiv 2601.17124).

Axes: D channels of a code, K codes in the codebook, `...` any leading axes.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

RULE = "levels of equal width"
"""Name of the rounding rule.

The name is part of a tokenizer's fingerprint, because the weights do not show which rule they need.
"""
Levels = Annotated[
    tuple[Annotated[int, Field(ge=2, le=2**16)], ...], Field(min_length=1, max_length=16)
]
"""Type of a config field that holds the number of levels of each channel."""
_EDGE = 1e-3  # margin that keeps a saturated tanh from rounding to a level that does not exist


class FSQ(nn.Module):
    """Quantises channel d of the last axis to `levels[d]` values (straight-through gradients)."""

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
        """Return the codes of z [..., D], float32 in [-1, 1].

        The backward pass ignores the rounding, but not the tanh before it. Computes in float32 even
        under autocast, because bfloat16 would merge neighbouring levels.
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
