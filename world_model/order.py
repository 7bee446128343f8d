"""The order of a frame's slots: tokens are sampled in "waves", one whole diagonal at a time.

The transformer sees a frame of `rows x cols` tokens as a sequence of `rows * (cols + 1)` slots.
Slot (r, c) takes token (r, c-1) as its input and predicts token (r, c). There are two exceptions.
Slot (r, 0), the start of row r, takes no token. Slot (r, cols), the last of row r, predicts no
token, and only adds the row's last token to the cache.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Wave:
    """The slots of one pass, from `start` to `stop` (exclusive).

    The slots from `first` on predict a token. The slots before `first` are in the last column and
    predict none. They come first, because the slots of a wave are sorted by row, and the slot of a
    lower row is never further to the right.
    """

    start: int
    stop: int
    first: int


class SlotOrder:
    """The slots of one frame sorted by (wave, row), where slot (r, c) is in wave `c + lag * r`.

    The input token of a slot is drawn one wave earlier, so one pass can compute all slots of a
    wave. With `lag = cols + 1`, the order is raster order, and a wave is a single slot. With
    `lag = 2`, a token sees its left, above-left, above and above-right neighbours. With `lag = 0`,
    a wave is a whole column. All index tensors are int64 on the CPU.
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
        """Raster index of the token that each slot takes, or `tokens` if none, [slots]."""
        self.target = torch.where(self.col < cols, token, self.tokens)
        """Raster index of the token that each slot predicts, or `tokens` if none, [slots]."""
        self.slot_of_token = torch.argsort(self.target)[: self.tokens]
        """For each token in raster order, the index of the slot that predicts it, [tokens]."""

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        """All waves of a frame, in order, except waves without slots."""
        waves, start = [], 0
        for size in torch.unique_consecutive(self.wave, return_counts=True)[1].tolist():
            silent = int((self.target[start : start + size] == self.tokens).sum())
            waves.append(Wave(start, start + size, start + silent))
            start += size
        return tuple(waves)

    def neighbours(self, reach: int) -> Tensor:
        """Return the raster indices of the tokens within `reach` rows and columns of each slot.

        The shape is [slots, (2 reach + 1)^2]; the tokens of a slot are in raster order. Positions
        outside the frame have index `tokens`. If `reach` is 0, the result equals `target`.
        """
        step = torch.arange(-reach, reach + 1)
        row = self.row[:, None, None] + step[:, None]
        col = self.col[:, None, None] + step
        inside = (row >= 0) & (row < self.rows) & (col >= 0) & (col < self.cols)
        return torch.where(inside, row * self.cols + col, self.tokens).flatten(1)
