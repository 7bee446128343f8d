"""Cut drives into segments at gaps, where frames are missing.

Legend: P pairs of neighbouring frames.
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

    Returns the segments as (start, stop) frame numbers. Every frame is in exactly one segment.
    """
    limit = _GAP_PERIODS * median_period(timestamps)
    return _cut(len(timestamps), np.diff(timestamps) > limit)


def chosen_segments(timestamps: Floats, indices: Ints) -> list[tuple[int, int]]:
    """Cut the frames that are chosen from a drive into segments at the gaps of the drive.

    `timestamps` are the times of all frames of the drive, and `indices` the increasing numbers of
    the chosen frames. Returns the segments as (start, stop) positions in `indices`.

    The times of the chosen frames alone do not show the gaps: they may be unevenly spaced although
    no frame of the drive is missing, or evenly spaced although a frame is missing.
    """
    starts = [start for start, _ in gaps(timestamps)]
    return _cut(len(indices), np.diff(np.searchsorted(starts, indices, side="right")) > 0)


def _cut(count: int, gap_after: Mask) -> list[tuple[int, int]]:
    cuts = (np.flatnonzero(gap_after) + 1).tolist()
    return list(pairwise([0, *cuts, count])) if count else []


def clipped(segments: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of segments that lie within [begin, end), relative to `begin`."""
    return [
        (max(start, begin) - begin, min(stop, end) - begin)
        for start, stop in segments
        if start < end and stop > begin
    ]


def within_segments(segments: Sequence[tuple[int, int]]) -> Mask:
    """Return for each pair of neighbouring frames [P] whether both are in the same segment."""
    inside = np.ones(segments[-1][1] - 1, np.bool_)
    inside[[start - 1 for start, _ in segments[1:]]] = False
    return inside
