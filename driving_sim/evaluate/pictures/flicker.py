"""How often a tokenizer's tokens change where the picture does not.

Legend: T frames, P = T - 1 pairs of frames, r c token rows and columns, h w pixels of a cell.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from einops import reduce
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Flicker:
    """Counts of token cells in pairs of consecutive frames; those of several drives add up."""

    cells: int
    """All cells of all pairs."""
    changed: int
    """Cells whose token changed."""
    still: int
    """Cells whose pixels did not change, or hardly."""
    still_changed: int
    """Cells whose token changed although their pixels did not."""

    def __add__(self, other: "Flicker") -> "Flicker":
        return Flicker(
            cells=self.cells + other.cells,
            changed=self.changed + other.changed,
            still=self.still + other.still,
            still_changed=self.still_changed + other.still_changed,
        )

    def shares(self) -> dict[str, Any]:
        """Return the shares that are reported; None where there is nothing to have a share of."""
        return {
            "flicker": self.still_changed / self.still if self.still else None,
            "still_cells": self.still,
            "still_share": self.still / self.cells if self.cells else None,
            "changed_share": self.changed / self.cells if self.cells else None,
        }


def flicker(
    tokens: NDArray[np.int64], frames: NDArray[np.uint8], *, stride: int = 16, threshold: float = 2
) -> Flicker:
    """Count still cells and changed tokens between consecutive frames of one drive.

    Takes tokens [T, r, c] and the frames they were encoded from, uint8 [T, r·stride, c·stride, 3].
    A cell is still where its pixels change by less than `threshold` grey levels on average: 2 lets
    the noise of compressed video pass. Pieces of a drive add up to the whole where each begins with
    the last frame of the one before.
    """
    expected = (len(tokens), tokens.shape[1] * stride, tokens.shape[2] * stride, 3)
    if frames.shape != expected:
        raise ValueError(f"frames of shape {frames.shape}: tokens and stride want {expected}")
    # Pair by pair: whole drives as signed integers would be several times their frames.
    changes = [_cell_change(*pair, stride) for pair in pairwise(frames)]
    still = np.array(changes).reshape(-1, *tokens.shape[1:]) < threshold
    changed = tokens[1:] != tokens[:-1]
    return Flicker(
        cells=changed.size,
        changed=int(changed.sum()),
        still=int(still.sum()),
        still_changed=int((still & changed).sum()),
    )


def _cell_change(
    before: NDArray[np.uint8], after: NDArray[np.uint8], stride: int
) -> NDArray[np.float32]:
    """Mean absolute change [r, c] in grey levels between two frames [H, W, 3]."""
    difference = np.abs(after.astype(np.float32) - before)
    change: NDArray[np.float32] = reduce(
        difference, "(r h) (c w) rgb -> r c", "mean", h=stride, w=stride
    )
    return change
