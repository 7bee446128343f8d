"""Embeddings that know how FSQ codes are made: codes that share a digit share what is learned.

Axes: K codes, D width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def code_digits(levels: Sequence[int]) -> Tensor:
    """Return the digits of every FSQ index, int64 [K, len(levels)], the first digit fastest."""
    base = torch.tensor([math.prod(levels[:place]) for place in range(len(levels))])
    return torch.arange(math.prod(levels))[:, None] // base % torch.tensor(levels)


class CodeEmbedding(nn.Module):
    """A vector per code: its own row of a table plus one row for each of its FSQ digits.

    A code that is rare in a small training set still starts from what its neighbours, which
    differ in one digit, have learned. Used for inputs and for the output projection alike.
    """

    rows: Tensor

    def __init__(self, levels: Sequence[int], width: int, *, std: float = 0.02) -> None:
        super().__init__()
        digits = code_digits(levels)
        offsets = torch.tensor([sum(levels[:place]) for place in range(len(levels))])
        self.codebook_size = len(digits)
        self.codes = nn.Parameter(torch.randn(self.codebook_size, width) * std)
        self.digits = nn.Parameter(torch.randn(sum(levels), width) * std)
        self.register_buffer("rows", digits + offsets, persistent=False)

    def table(self) -> Tensor:
        """Return the vectors of all codes, [K, D]."""
        return self.codes + self.digits[self.rows].sum(1)
