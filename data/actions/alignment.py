"""Align actions with frames: average the log over each interval between two frames.

Legend: T frames, M samples of a channel.
"""

import numpy as np

from driving_sim.data.actions.action_log import CHANNELS, ActionLog, Channel
from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.engine.errors import DriveSimError

EXTRAPOLATION_S = 0.1
"""A channel also covers this many seconds before its first sample, and as many after its last. The
nearest sample gives the actions there."""
GAP_S = 0.25
"""Actions are interpolated between two samples at most this many seconds apart, or between two
neighbours of a slower channel."""
LONGEST_GAP_S = 1.5
"""Actions are never interpolated over more than this many seconds."""
MIN_COVERAGE = 0.5
"""A log fits its video only if at least this share of the video's frames has valid actions."""

_GAP_PERIODS = 1.5
# Tolerance for the rounding of timestamps: samples at 4 Hz may be up to 0.251 s apart.
_SLACK_S = 1e-3


def interval_ends(timestamps: Floats) -> Floats:
    """Return the end [T] of each frame's interval in seconds: the time of the next frame.

    The last interval is one median period long.
    """
    if len(timestamps) < 2:
        return timestamps + EXTRAPOLATION_S
    return np.append(timestamps[1:], timestamps[-1] + np.median(np.diff(timestamps)))


def gap_limit(times: Floats) -> float:
    """Return how many seconds two samples may be apart at most to interpolate between them.

    This is 0.25 s, or 1.5 median periods if the channel is slower, but at most 1.5 s: GPS has one
    sample a second.
    """
    period = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return min(max(GAP_S, _GAP_PERIODS * period), LONGEST_GAP_S) + _SLACK_S


def _integral(times: Floats, values: Floats, at: Floats) -> Floats:
    """Integrate the linear interpolant of values [M] from times[0] to each time of `at` [T]."""
    widths = np.diff(times)
    cumulative = np.append(0.0, np.cumsum(widths * (values[:-1] + values[1:]) / 2))
    left = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    elapsed = at - times[left]
    slope = (values[left + 1] - values[left]) / widths[left]
    integral: Floats = cumulative[left] + elapsed * (values[left] + slope * elapsed / 2)
    return integral


def _covered(times: Floats, starts: Floats, ends: Floats, limit: float) -> Mask:
    """Return for each interval [T] whether it lies within `times` and overlaps no gap in them."""
    gaps_before = np.append(0, np.cumsum(np.diff(times) > limit))
    last = len(times) - 2
    first = np.clip(np.searchsorted(times, starts, side="right") - 1, 0, last)
    final = np.clip(np.searchsorted(times, ends, side="left") - 1, 0, last)
    inside = (starts >= times[0] - 1e-9) & (ends <= times[-1] + 1e-9)
    covered: Mask = inside & (gaps_before[final + 1] == gaps_before[first])
    return covered


def _means(channel: Channel, starts: Floats, ends: Floats) -> tuple[Floats, Mask]:
    """Return a channel's mean over each interval [T], and whether it is known there [T]."""
    first, last = channel.times[0] - EXTRAPOLATION_S, channel.times[-1] + EXTRAPOLATION_S
    times = np.concatenate([[first], channel.times, [last]])
    values = np.concatenate([channel.values[:1], channel.values, channel.values[-1:]]).astype(float)
    valid = _covered(times, starts, ends, gap_limit(channel.times))
    total = _integral(times, values, ends) - _integral(times, values, starts)
    return np.where(valid, total / (ends - starts), 0.0), valid


def align(log: ActionLog | None, timestamps: Floats) -> tuple[Floats32, Mask]:
    """Return the mean actions of a log between one frame and the next.

    `timestamps` [T] are the strictly increasing times of the frames in seconds. Returns the actions
    as float32 [T, 2], and whether each value is valid as bool [T, 2]. actions[t] describes how the
    car gets from frame t to frame t + 1: it is the exact mean of the log's linear interpolant over
    [timestamps[t], timestamps[t + 1]). The last interval is one median period long.

    A value is invalid, and set to 0, if its interval extends more than 0.1 s beyond the samples of
    its channel, or overlaps a gap between them that is longer than `gap_limit`.
    """
    actions = np.zeros((len(timestamps), 2), np.float32)
    valid = np.zeros((len(timestamps), 2), np.bool_)
    ends = interval_ends(timestamps)
    for number, channel in enumerate(log.channels if log is not None else ()):
        if channel is not None:
            actions[:, number], valid[:, number] = _means(channel, timestamps, ends)
    return actions, valid


def check_coverage(log: ActionLog, timestamps: Floats) -> list[str]:
    """Check that a log fits a video whose frames have the times `timestamps` [T] in seconds.

    Returns a line for each channel that is known in less than half of the frames.

    Raises DriveSimError if the times of the log and the video do not overlap, if the samples of
    every channel are more than 1.5 s apart, or if the log covers less than half of the frames.
    """
    ends = interval_ends(timestamps)
    first, last = log.span
    span = f"{first:.2f} to {last:.2f} s"
    video = f"the video runs from {timestamps[0]:.2f} to {ends[-1]:.2f} s"
    if last < timestamps[0] or first > ends[-1]:
        offset = timestamps[0] - first
        raise DriveSimError(
            f"{log.origin}: its times ({span}) do not overlap the video's: {video}; shift them "
            f"with `time_offset` (such as {offset:.2f} if both started together)"
        )
    apart = min(float(np.median(np.diff(c.times))) for c in log.channels if c is not None)
    if apart > LONGEST_GAP_S + _SLACK_S:
        raise DriveSimError(
            f"{log.origin}: its samples are {apart:.3g} s apart, more than {LONGEST_GAP_S} s; "
            "check the unit of the time column (timestamp_ms, timestamp_us), or log more often"
        )
    valid = align(log, timestamps)[1]
    share = float(valid.any(axis=1).mean())
    if share < MIN_COVERAGE:
        raise DriveSimError(
            f"{log.origin}: covers {share:.0%} of the video's frames (samples from {span}; "
            f"{video}); check the unit of the time column and `time_offset`, or cut the video"
        )
    return [
        f"{name} is known in only {known:.0%} of the frames"
        for name, channel, known in zip(CHANNELS, log.channels, valid.mean(axis=0), strict=True)
        if channel is not None and known < MIN_COVERAGE
    ]
