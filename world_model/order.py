"""The order of a frame's slots, in which whole diagonals ("waves") of tokens are sampled at once.

A frame of `rows x cols` tokens is a sequence of `rows * (cols + 1)` slots. Slot (r, 0) is the
start of row r and takes no token. Slot (r, c) with c > 0 takes token (r, c-1) as its input. Slot
(r, c) with c < cols predicts token (r, c). The last slot of a row predicts nothing; it only brings
the row's last token into the cache.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Wave:
    """One pass of the sampler over slots `start` to `stop`; those from `first` on predict a token.

    Within a wave, columns decrease as rows increase, so slots of the last column come first. They
    are the ones that predict nothing.
    """

    start: int
    stop: int
    first: int


class SlotOrder:
    """The slots of one frame sorted by (wave, row), where slot (r, c) has wave `c + lag * r`.

    A slot's input token is drawn one wave earlier, so one pass computes all slots of a wave. With
    `lag = cols + 1` the order is raster order, one slot per wave. With `lag = 2` a token sees its
    left, above-left, above and above-right neighbours. With `lag = 0` a wave is a whole column. All
    index tensors are int64 on the CPU.
    """

    def __init__(self, *, rows: int, cols: int, lag: int = 2) -> None:
        self.rows, self.cols = rows, cols
        self.slots = rows * (cols + 1)
        """Number of slots in a frame."""
        self.tokens = rows * cols
        """Number of tokens in a frame."""
        row, col = torch.arange(rows)[:, None], torch.arange(cols + 1)
        row_major = torch.argsort(((col + lag * row) * rows + row).flatten())
        self.row = row_major // (cols + 1)
        """Row of each slot, [slots]."""
        self.col = row_major % (cols + 1)
        """Column of each slot, from 0 to `cols` inclusive, [slots]."""
        self.wave = self.col + lag * self.row
        """Wave number of each slot, [slots]."""
        token = self.row * cols + self.col
        self.source = torch.where(self.col > 0, token - 1, self.tokens)
        """Raster index of the token that each slot takes; `tokens` at a row's start, [slots]."""
        self.target = torch.where(self.col < cols, token, self.tokens)
        """Raster index of the token that each slot predicts, or `tokens` if none, [slots]."""
        self.slot_of_token = torch.argsort(self.target)[: self.tokens]
        """For each token in raster order, the index of the slot that predicts it, [tokens]."""

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        """The passes of a frame: `cols + 1 + lag * (rows - 1)`, less the waves that are empty."""
        waves, start = [], 0
        for size in torch.unique_consecutive(self.wave, return_counts=True)[1].tolist():
            silent = int((self.target[start : start + size] == self.tokens).sum())
            waves.append(Wave(start, start + size, start + silent))
            start += size
        return tuple(waves)

    def neighbours(self, reach: int) -> Tensor:
        """Return the raster indices of the tokens within `reach` rows and columns of each slot.

        The shape is [slots, (2 reach + 1)^2], row by row. Positions outside the frame have index
        `tokens`. With a reach of 0 this is `target`.
        """
        step = torch.arange(-reach, reach + 1)
        row = self.row[:, None, None] + step[:, None]
        col = self.col[:, None, None] + step
        inside = (row >= 0) & (row < self.rows) & (col >= 0) & (col < self.cols)
        return torch.where(inside, row * self.cols + col, self.tokens).flatten(1)
