"""The order of a frame's slots: whole diagonals ("waves") of tokens can be sampled at once.

A frame of `rows x cols` tokens is a sequence of `rows * (cols + 1)` slots. Slot (r, 0) is the
start of row r; slot (r, c) takes token (r, c-1) as its input; slot (r, c), c < cols, predicts
token (r, c). The last slot of a row predicts nothing: it brings the row's last token into the
cache.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Wave:
    """One pass of the sampler: slots `start` to `stop` of the order, predicting from `first` on.

    In a wave columns fall as rows rise, so slots that predict nothing come first.
    """

    start: int
    stop: int
    first: int


class SlotOrder:
    """Slots of one frame sorted by (wave, row), where slot (r, c) has wave `c + lag * r`.

    A slot's input is known one wave before it, so all slots of a wave are computed in one pass.
    `lag = cols + 1` is raster order (a wave is one slot); `lag = 2` sees the left, above-left,
    above and above-right neighbours; `lag = 0` draws whole columns. All index tensors are int64
    on the CPU.
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
        """Column of each slot, 0 to `cols` included, [slots]."""
        self.wave = self.col + lag * self.row
        """Wave number of each slot, [slots]."""
        token = self.row * cols + self.col
        self.source = torch.where(self.col > 0, token - 1, self.tokens)
        """Raster number of the token each slot takes; `tokens` at a row's start, [slots]."""
        self.target = torch.where(self.col < cols, token, self.tokens)
        """Raster number of the token each slot predicts; `tokens` where none, [slots]."""
        self.slot_of_token = torch.argsort(self.target)[: self.tokens]
        """Place in this order of the slot that predicts each token, in raster order, [tokens]."""

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        """The passes of one frame: `cols + 1 + lag * (rows - 1)` of them where no wave is empty."""
        waves, start = [], 0
        for size in torch.unique_consecutive(self.wave, return_counts=True)[1].tolist():
            silent = int((self.target[start : start + size] == self.tokens).sum())
            waves.append(Wave(start, start + size, start + silent))
            start += size
        return tuple(waves)

    def neighbours(self, reach: int) -> Tensor:
        """Raster numbers of the tokens within `reach` rows and columns of each slot's position.

        [slots, (2 reach + 1)^2], row by row; `tokens` where outside the frame. With reach 0 this
        is `target`.
        """
        step = torch.arange(-reach, reach + 1)
        row = self.row[:, None, None] + step[:, None]
        col = self.col[:, None, None] + step
        inside = (row >= 0) & (row < self.rows) & (col >= 0) & (col < self.cols)
        return torch.where(inside, row * self.cols + col, self.tokens).flatten(1)
