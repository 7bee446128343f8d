"""Align actions with frames: average the log over each interval between two frames.

Legend: T frames, M samples of the log.
"""

import numpy as np

from driving_sim.data.actions.action_file import ActionLog
from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.engine.errors import DriveSimError

EXTRAPOLATION_S = 0.1
"""A log also covers this many seconds before its first sample, and as many after its last sample.
The nearest sample gives the actions there."""
GAP_S = 0.25
"""Actions are interpolated between two samples of a log only if these are at most this many seconds
apart."""
MIN_COVERAGE = 0.5
"""A log fits its video only if at least this share of the video's frames has valid actions."""

# Tolerance for the rounding of timestamps: samples at 4 Hz may be up to 0.251 s apart.
_SLACK_S = 1e-3


def interval_ends(timestamps: Floats) -> Floats:
    """Return the end [T] of each frame's interval in seconds: the time of the next frame.

    The last interval is one median period long.
    """
    if len(timestamps) < 2:
        return timestamps + EXTRAPOLATION_S
    return np.append(timestamps[1:], timestamps[-1] + np.median(np.diff(timestamps)))


def _integral(times: Floats, values: Floats, at: Floats) -> Floats:
    """Integrate the linear interpolant of values [M, 2] from times[0] to each time of `at` [T].

    Returns [T, 2].
    """
    widths = np.diff(times)[:, None]
    areas = widths * (values[:-1] + values[1:]) / 2
    cumulative = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(areas, axis=0)])
    left = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    elapsed = (at - times[left])[:, None]
    slope = (values[left + 1] - values[left]) / widths[left]
    return cumulative[left] + elapsed * (values[left] + slope * elapsed / 2)


def _covered(times: Floats, starts: Floats, ends: Floats) -> Mask:
    """Return for each interval [T] whether it lies within `times` and overlaps no gap in them."""
    gaps_before = np.append(0, np.cumsum(np.diff(times) > GAP_S + _SLACK_S))
    last = len(times) - 2
    first = np.clip(np.searchsorted(times, starts, side="right") - 1, 0, last)
    final = np.clip(np.searchsorted(times, ends, side="left") - 1, 0, last)
    inside = (starts >= times[0] - 1e-9) & (ends <= times[-1] + 1e-9)
    covered: Mask = inside & (gaps_before[final + 1] == gaps_before[first])
    return covered


def align(log: ActionLog | None, timestamps: Floats) -> tuple[Floats32, Mask]:
    """Return the mean actions of a log between one frame and the next.

    `timestamps` [T] are the strictly increasing times of the frames in seconds. Returns the actions
    as float32 [T, 2], and whether each value is valid as bool [T, 2]. actions[t] describes how the
    car gets from frame t to frame t + 1: it is the exact mean of the log's linear interpolant over
    [timestamps[t], timestamps[t + 1]). The last interval is one median period long.

    A value is invalid, and set to 0, if its interval extends more than 0.1 s beyond the log, or
    overlaps a gap of more than 0.25 s or a pause of its channel.
    """
    count = len(timestamps)
    if log is None:
        return np.zeros((count, 2), np.float32), np.zeros((count, 2), np.bool_)
    pad = EXTRAPOLATION_S
    times = np.concatenate([[log.times[0] - pad], log.times, [log.times[-1] + pad]])
    values = np.concatenate([log.values[:1], log.values, log.values[-1:]]).astype(np.float64)
    ends = interval_ends(timestamps)
    covered = _covered(times, timestamps, ends)
    valid = covered[:, None] & log.has
    for channel, start, stop in log.pauses:
        valid[(ends > start) & (timestamps < stop), channel] = False
    total = _integral(times, values, ends) - _integral(times, values, timestamps)
    means = total / (ends - timestamps)[:, None]
    return np.where(valid, means, 0).astype(np.float32), valid


def check_coverage(log: ActionLog, timestamps: Floats) -> None:
    """Check that a log fits a video whose frames have the times `timestamps` [T] in seconds.

    Raises DriveSimError if the times of the log and the video do not overlap, if the samples are
    more than 0.25 s apart, or if the log covers less than half of the frames.
    """
    ends = interval_ends(timestamps)
    span = f"{log.times[0]:.2f} to {log.times[-1]:.2f} s"
    video = f"the video runs from {timestamps[0]:.2f} to {ends[-1]:.2f} s"
    if log.times[-1] < timestamps[0] or log.times[0] > ends[-1]:
        offset = timestamps[0] - log.times[0]
        raise DriveSimError(
            f"{log.origin}: its times ({span}) do not overlap the video's: {video}; shift them "
            f"with `time_offset` (such as {offset:.2f} if both started together)"
        )
    apart = float(np.median(np.diff(log.times)))
    if apart > GAP_S + _SLACK_S:
        raise DriveSimError(
            f"{log.origin}: its samples are {apart:.3g} s apart, more than {GAP_S} s; check the "
            "unit of the time column (timestamp_ms, timestamp_us), or log more often"
        )
    share = float(align(log, timestamps)[1].any(axis=1).mean())
    if share < MIN_COVERAGE:
        raise DriveSimError(
            f"{log.origin}: covers {share:.0%} of the video's frames (samples from {span}; "
            f"{video}); check the unit of the time column and `time_offset`, or cut the video"
        )
