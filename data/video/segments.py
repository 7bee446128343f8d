"""Cut drives into segments at gaps, where frames are missing, and at frames lost to damage.

Legend: P pairs of neighbouring frames.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from driving_sim.data.arrays import Floats, Mask


def median_period(timestamps: Floats) -> float:
    """Return the median time between frames in seconds, or 0 for fewer than two frames."""
    return float(np.median(np.diff(timestamps))) if len(timestamps) > 1 else 0.0


def cut(count: int, gap_after: Mask) -> list[tuple[int, int]]:
    """Cut `count` frames into segments (start, stop) after each frame [count - 1] with a gap."""
    cuts = (np.flatnonzero(gap_after) + 1).tolist()
    return list(pairwise([0, *cuts, count])) if count else []


def isolated(segments: Sequence[tuple[int, int]], lost: Mask) -> list[tuple[int, int]]:
    """Cut segments around each lost frame, so that it is a segment of its own."""
    gap_after = ~within_segments(segments) | lost[:-1] | lost[1:]
    return cut(len(lost), gap_after)


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
