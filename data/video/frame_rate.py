"""Choose the frames of a drive for a frame rate, and find the gaps at this rate."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.video.segments import cut, median_period

RATE_TOLERANCE = 0.25
"""Largest relative difference between the frame rates of two drives, or of a drive and a model.

A model learns one frame rate. Videos with fewer frames than were asked for keep their own."""

_GAP_PERIODS = 1.5
_STRIDE_TOLERANCE = 0.15
_ROUNDING = 1e-6
_EVEN_STEP = 0.25
_EVEN_SHARE = 0.99


class Choice(NamedTuple):
    """The frames that were chosen from a drive."""

    indices: Ints
    """[T] Increasing numbers of the chosen frames in the drive."""
    segments: list[tuple[int, int]]
    """Ranges [start, stop) of the T frames, cut at the gaps. Every frame is in exactly one."""
    on_ticks: bool
    """Whether the frames nearest to the ticks of a clock were chosen, not every n-th frame."""


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
) -> Choice:
    """Choose the frames to keep for a lower frame rate, and cut them at gaps.

    `every=n` keeps every n-th frame. `fps` keeps every k-th frame if the video's rate is within
    15 % of k times `fps` and these frames are evenly spaced. Otherwise it keeps the frame nearest
    to each tick of a clock. All frames are kept if `fps` is above the video's rate, or if neither
    `fps` nor `every` is given.

    There is a gap where a tick has no frame near it: where every n-th frame comes more than 1.5
    periods after the one before, or where the video has no frame at all for so long. The period is
    1 / `fps`, or the median time between the chosen frames if that is longer or if `fps` is None.

    Raises ValueError if both `fps` and `every` are given, or if one of them is not positive.
    """
    if fps is not None and every is not None:
        raise ValueError(f"fps={fps} and every={every}: give only one of them")
    if every is not None and every < 1:
        raise ValueError(f"every={every}: must be at least 1")
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps}: must be a positive number")
    stride, on_ticks = every or 1, False
    if fps is not None and len(timestamps) > 1:
        ratio = _rate(timestamps, 1 / fps) / fps
        stride = max(1, round(ratio))
        is_off = ratio > 1 and abs(ratio / stride - 1) > _STRIDE_TOLERANCE
        on_ticks = is_off or (stride > 1 and not _is_even(timestamps, stride, 1 / fps))
    if fps is not None and on_ticks:
        indices = _nearest_to_ticks(timestamps, 1 / fps)
    else:
        indices = np.arange(0, len(timestamps), stride, dtype=np.int64)
    chosen, steps = timestamps[indices], np.diff(timestamps)
    period = max(1 / fps if fps else 0.0, median_period(chosen))
    # Frames nearest to ticks may be nearly two periods apart, although no tick lacks a frame.
    longest = np.diff(chosen)
    if on_ticks:
        longest = np.maximum.reduceat(steps[: indices[-1]], indices[:-1])
    gap_after = longest > _GAP_PERIODS * period * (1 + _ROUNDING)
    return Choice(indices, cut(len(indices), gap_after), on_ticks)


def _rate(timestamps: Floats, period: float) -> float:
    """Return the mean frame rate of a video where it has frames for ticks of this period."""
    steps = np.diff(timestamps)
    inner = steps[steps <= _GAP_PERIODS * max(period, median_period(timestamps))]
    return len(inner) / float(inner.sum()) if len(inner) else 0.0


def _is_even(timestamps: Floats, stride: int, period: float) -> bool:
    """Return whether nearly all of every `stride`-th frames follow each other after one period.

    Places where the video itself has no frame for more than 1.5 periods do not count.
    """
    steps = np.diff(timestamps[::stride]) / period
    largest = np.maximum.reduceat(np.diff(timestamps), np.arange(len(steps)) * stride)
    inner = steps[largest <= _GAP_PERIODS * period]
    return bool((abs(inner - 1) <= _EVEN_STEP).mean() >= _EVEN_SHARE) if len(inner) else False


def _nearest_to_ticks(timestamps: Floats, period: float) -> Ints:
    """Return the numbers of the frames that are nearest to a tick.

    Only ticks within one period of a frame are tried: a recording may pause for days.
    """
    before = np.floor((timestamps - timestamps[0]) / period)
    ticks = timestamps[0] + np.union1d(before, before + 1) * period
    ticks = ticks[ticks < timestamps[-1] + period / 2]
    after = np.searchsorted(timestamps, ticks).clip(1, len(timestamps) - 1)
    nearer_before = ticks - timestamps[after - 1] <= timestamps[after] - ticks
    return np.unique(after - nearer_before).astype(np.int64)
