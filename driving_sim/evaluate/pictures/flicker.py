"""How often a tokenizer's tokens change where the picture does not.

Legend: T frames, P = T - 1 pairs of frames, r c token rows and columns, h w pixels of a cell.
"""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
from einops import reduce

from driving_sim.data.arrays import Floats32, Ints, Pixels


def flicker(
    tokens: Ints, frames: Pixels, *, stride: int = 16, threshold: float = 2
) -> Counter[str]:
    """Count still cells and changed tokens between consecutive frames of one drive.

    Of all `cells` of all pairs of frames, the tokens of `changed` ones changed, the pixels of
    `still` ones did not, or hardly, and of `still_changed` ones only the tokens did.

    Takes tokens [T, r, c] and the frames they were encoded from, uint8 [T, r·stride, c·stride, 3].
    A cell is still where its pixels change by less than `threshold` grey levels on average: 2 lets
    the noise of compressed video pass. Pieces of a drive add up to the whole where each begins with
    the last frame of the one before.
    """
    # Pair by pair: whole drives as signed integers would be several times their frames.
    changes = [_cell_change(*pair, stride) for pair in pairwise(frames)]
    still = np.array(changes).reshape(-1, *tokens.shape[1:]) < threshold
    changed = tokens[1:] != tokens[:-1]
    return Counter(
        cells=changed.size,
        changed=int(changed.sum()),
        still=int(still.sum()),
        still_changed=int((still & changed).sum()),
    )


def flicker_shares(counts: Counter[str]) -> dict[str, Any]:
    """Return the shares that are reported of counts; None where there is nothing to have one of."""
    cells, still = counts["cells"], counts["still"]
    return {
        "flicker": counts["still_changed"] / still if still else None,
        "still_cells": still,
        "still_share": still / cells if cells else None,
        "changed_share": counts["changed"] / cells if cells else None,
    }


def _cell_change(before: Pixels, after: Pixels, stride: int) -> Floats32:
    """Mean absolute change [r, c] in grey levels between two frames [H, W, 3]."""
    difference = np.abs(after.astype(np.float32) - before)
    return np.asarray(reduce(difference, "(r h) (c w) rgb -> r c", "mean", h=stride, w=stride))
