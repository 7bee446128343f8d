"""Frame times: rate, gaps, and the choice of frames for a lower rate."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

RATE_TOLERANCE = 0.25
"""How far a drive's rate may be off that of the others, or of a model, as a share of it.

A model learns one rate; `choose_frames` already lets a drive be 15 % off the one asked for."""

_STRIDE_TOLERANCE = 0.15
_GAP_PERIODS = 1.5


def median_period(timestamps: NDArray[np.float64]) -> float:
    """Median time between frames in seconds; 0 for fewer than two frames."""
    return float(np.median(np.diff(timestamps))) if len(timestamps) > 1 else 0.0


def mean_rate(timestamps: NDArray[np.float64], segments: Sequence[tuple[int, int]]) -> float:
    """Frames per second within segments (start, stop); 0 where none has two frames.

    Not from the median time between frames: frames on a grid are one or two periods of the video
    apart, and neither is the rate.
    """
    seconds = sum(float(timestamps[stop - 1] - timestamps[start]) for start, stop in segments)
    intervals = sum(stop - start - 1 for start, stop in segments)
    return intervals / seconds if intervals else 0.0


def gaps(timestamps: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Cut a drive where two frames are more than 1.5 median periods apart.

    Returns the segments as (start, stop) frame numbers; together they cover every frame.
    """
    if len(timestamps) == 0:
        return []
    limit = _GAP_PERIODS * median_period(timestamps)
    breaks = np.flatnonzero(np.diff(timestamps) > limit) + 1
    edges = [0, *breaks.tolist(), len(timestamps)]
    return list(pairwise(edges))


def chosen_segments(
    timestamps: NDArray[np.float64], indices: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Cut a choice of frames, increasing `indices`, where a gap of the drive lies between two.

    Returns the segments as (start, stop) positions in `indices`. The drive's own frames tell where
    a gap is: frames chosen for a lower rate may be unevenly apart with none of them missing, and
    evenly enough with one missing.
    """
    if len(indices) == 0:
        return []
    breaks = [start for start, _ in gaps(timestamps)[1:]]
    cuts = np.unique(np.searchsorted(indices, breaks))
    inner = cuts[(cuts > 0) & (cuts < len(indices))]
    return list(pairwise([0, *inner.tolist(), len(indices)]))


def choose_frames(
    timestamps: NDArray[np.float64], *, fps: float | None = None, every: int | None = None
) -> NDArray[np.int64]:
    """The frames to keep for a lower rate, as increasing frame numbers.

    `every` keeps every n-th frame. `fps` keeps every k-th where the video's rate is within 15 % of
    k times `fps` (a constant stride has no jitter), else the nearest frame to each tick of a
    regular grid. A rate above the video's own keeps every frame. Neither keeps every frame.

    Raises ValueError where both are given, or one is not positive.
    """
    stride = _stride(timestamps, fps, every)
    if stride is not None:
        return np.arange(0, len(timestamps), stride, dtype=np.int64)
    assert fps is not None
    return _nearest_to_grid(timestamps, 1.0 / fps)


def _stride(timestamps: NDArray[np.float64], fps: float | None, every: int | None) -> int | None:
    """The constant stride that serves the request; None where only a grid does."""
    if fps is not None and every is not None:
        raise ValueError(f"fps={fps} and every={every}: give one of them")
    if every is not None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        return every
    if fps is None:
        return 1
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps}: must be a positive number")
    ratio = mean_rate(timestamps, gaps(timestamps)) / fps
    nearest = max(1, round(ratio))
    return nearest if ratio <= 1 or abs(ratio / nearest - 1) <= _STRIDE_TOLERANCE else None


def _nearest_to_grid(timestamps: NDArray[np.float64], period: float) -> NDArray[np.int64]:
    ticks = np.arange(timestamps[0], timestamps[-1] + period / 2, period)
    after = np.searchsorted(timestamps, ticks).clip(1, len(timestamps) - 1)
    nearer_before = ticks - timestamps[after - 1] <= timestamps[after] - ticks
    return np.unique(after - nearer_before).astype(np.int64)
