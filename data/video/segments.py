"""Cut drives into segments at the gaps between the times of their frames.

Legend: P pairs of neighbouring frames, one less than frames.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from driving_sim.data.arrays import Floats, Ints, Mask

_GAP_PERIODS = 1.5


def median_period(timestamps: Floats) -> float:
    """Return the median time between frames in seconds, or 0 for fewer than two frames."""
    return float(np.median(np.diff(timestamps))) if len(timestamps) > 1 else 0.0


def gaps(timestamps: Floats) -> list[tuple[int, int]]:
    """Cut a drive where two neighbouring frames are more than 1.5 median periods apart.

    Returns the segments as (start, stop) frame numbers; together they cover every frame.
    """
    limit = _GAP_PERIODS * median_period(timestamps)
    return _cut(len(timestamps), np.diff(timestamps) > limit)


def chosen_segments(timestamps: Floats, indices: Ints) -> list[tuple[int, int]]:
    """Cut the frames chosen from a drive, at increasing `indices`, at the gaps of the drive.

    Returns the segments as (start, stop) positions in `indices`. Gaps are found among all frames
    of the drive, because chosen frames do not show them: they may be unevenly spaced although no
    frame is missing, and evenly spaced although one is.
    """
    starts = [start for start, _ in gaps(timestamps)]
    return _cut(len(indices), np.diff(np.searchsorted(starts, indices, side="right")) > 0)


def _cut(count: int, gap_after: Mask) -> list[tuple[int, int]]:
    cuts = (np.flatnonzero(gap_after) + 1).tolist()
    return list(pairwise([0, *cuts, count])) if count else []


def clipped(segments: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of segments within [begin, end), counted from `begin`."""
    return [
        (max(start, begin) - begin, min(stop, end) - begin)
        for start, stop in segments
        if start < end and stop > begin
    ]


def within_segments(segments: Sequence[tuple[int, int]]) -> Mask:
    """Return which pairs of neighbouring frames [P] lie within one segment, without a gap."""
    inside = np.ones(segments[-1][1] - 1, np.bool_)
    inside[[start - 1 for start, _ in segments[1:]]] = False
    return inside
