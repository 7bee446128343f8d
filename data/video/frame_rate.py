"""The rate of a video's frames, and the choice of frames for a lower one."""

import math
from collections.abc import Sequence

import numpy as np

from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.video.segments import gaps

RATE_TOLERANCE = 0.25
"""How far a drive's rate may be off that of the others, or of a model, as a share of it.

A model learns one rate; `choose_frames` already lets a drive be 15 % off the one asked for."""

_STRIDE_TOLERANCE = 0.15


def mean_rate(timestamps: Floats, segments: Sequence[tuple[int, int]]) -> float:
    """Frames per second within segments (start, stop); 0 where none has two frames.

    Not from the median time between frames: frames on a grid are one or two periods of the video
    apart, and neither is the rate.
    """
    seconds = sum(float(timestamps[stop - 1] - timestamps[start]) for start, stop in segments)
    intervals = sum(stop - start - 1 for start, stop in segments)
    return intervals / seconds if intervals else 0.0


def choose_frames(
    timestamps: Floats, *, fps: float | None = None, every: int | None = None
) -> Ints:
    """The frames to keep for a lower rate, as increasing frame numbers.

    `every` keeps every n-th frame. `fps` keeps every k-th where the video's rate is within 15 % of
    k times `fps` (a constant stride has no jitter), else the nearest frame to each tick of a
    regular grid. A rate above the video's own keeps every frame. Neither keeps every frame.

    Raises ValueError where both are given, or one is not positive.
    """
    if fps is not None and every is not None:
        raise ValueError(f"fps={fps} and every={every}: give one of them")
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
