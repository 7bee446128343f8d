"""Count how often a token changes although its cell of the picture does not change.

Legend: T frames, r c token rows and columns, h w pixels of a cell, H W pixels of a frame.
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

    Takes tokens [T, r, c] and the frames they were encoded from, uint8 [T, r·stride, c·stride, 3].
    A cell is the part of a frame that one token stands for. A cell is still if its pixels change by
    less than `threshold` grey levels on average. A threshold of 2 ignores the noise of compressed
    video.

    Returns four counts over all pairs of consecutive frames:

    - `cells`: all cells
    - `changed`: cells whose token changes
    - `still`: still cells
    - `still_changed`: still cells whose token changes

    A drive can be counted in pieces. If each piece begins with the last frame of the piece before,
    the counts of the pieces add up to the counts of the drive.
    """
    # Convert one pair of frames to float at a time, because a float32 drive takes four times the
    # memory of a uint8 drive.
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
    """Turn the counts of `flicker` into the shares to report. A share of 0 cells is None."""
    cells, still = counts["cells"], counts["still"]
    return {
        "flicker": counts["still_changed"] / still if still else None,
        "still_cells": still,
        "still_share": still / cells if cells else None,
        "changed_share": counts["changed"] / cells if cells else None,
    }


def _cell_change(before: Pixels, after: Pixels, stride: int) -> Floats32:
    """Return each cell's mean absolute change [r, c], in grey levels, between frames [H, W, 3]."""
    difference = np.abs(after.astype(np.float32) - before)
    return np.asarray(reduce(difference, "(r h) (c w) rgb -> r c", "mean", h=stride, w=stride))
