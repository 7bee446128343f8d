"""Measure the frame rate of a drive, and choose frames for a lower rate."""

import math
from collections.abc import Sequence

import numpy as np

from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.video.segments import gaps

RATE_TOLERANCE = 0.25
"""Largest relative difference between the frame rates of two drives, or of a drive and a model.

A model learns one frame rate. The tolerance is larger than 15 %, because the rate that
`choose_frames` achieves may differ from the requested rate by that much."""

_STRIDE_TOLERANCE = 0.15


def mean_rate(timestamps: Floats, segments: Sequence[tuple[int, int]]) -> float:
    """Return the mean frame rate within segments (start, stop), or 0 if no segment has two frames.

    The median time between frames would be wrong: frames chosen on a regular grid are sometimes
    one and sometimes two periods of the video apart, and the true value lies between these two.
    """
    seconds = sum(float(timestamps[stop - 1] - timestamps[start]) for start, stop in segments)
    intervals = sum(stop - start - 1 for start, stop in segments)
    return intervals / seconds if intervals else 0.0


def choose_frames(
    timestamps: Floats, *, fps: float | None = None, every: int | None = None
) -> Ints:
    """Return the increasing numbers of the frames to keep for a lower frame rate.

    `every=n` keeps every n-th frame. `fps` keeps every k-th frame if the video's rate is within
    15 % of k times `fps`, because evenly spaced frames do not jitter. Otherwise `fps` keeps the
    frame nearest to each tick of a regular grid. All frames are kept if `fps` is above the video's
    rate, or if neither `fps` nor `every` is given.

    Raises ValueError if both `fps` and `every` are given, or if one of them is not positive.
    """
    if fps is not None and every is not None:
        raise ValueError(f"fps={fps} and every={every}: give only one of them")
    if every is not None and every < 1:
        raise ValueError(f"every={every}: must be at least 1")
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps}: must be a positive number")
    stride = every or 1
    if fps is not None:
        ratio = mean_rate(timestamps, gaps(timestamps)) / fps
        stride = max(1, round(ratio))
        if ratio > 1 and abs(ratio / stride - 1) > _STRIDE_TOLERANCE:
            return _nearest_to_grid(timestamps, 1.0 / fps)
    return np.arange(0, len(timestamps), stride, dtype=np.int64)


def _nearest_to_grid(timestamps: Floats, period: float) -> Ints:
    ticks = np.arange(timestamps[0], timestamps[-1] + period / 2, period)
    after = np.searchsorted(timestamps, ticks).clip(1, len(timestamps) - 1)
    nearer_before = ticks - timestamps[after - 1] <= timestamps[after] - ticks
    return np.unique(after - nearer_before).astype(np.int64)
