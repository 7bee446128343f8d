"""Compare the steering with the motion in the picture, to find its lag, its sign and wrong units.

When a car turns, its picture shifts sideways. So speed times curvature predicts the image motion up
to one factor, the focal length of the camera. The lag is the offset at which prediction and motion
match best. The sign of their correlation tells whether positive steering means left. If the factor
is no plausible focal length, a unit is wrong.

Legend: T frames, P = T - 1 pairs of frames.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from driving_sim.data.actions.action_log import SPEED, STEERING, SteeringKind
from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.data.drive import SampledDrive
from driving_sim.data.video.segments import median_period, within_segments

# Wheelbase of a typical passenger car. Real wheelbases differ from it by up to a factor of 1.5. The
# bounds on the focal length allow for this error.
_WHEELBASE_M = 2.7
# Divide a steering value by this ratio to get the angle of the front wheels in rad.
_STEERING_RATIOS = {"road_wheel": 1.0, "steering_wheel": 15.0, "normalised": 2.0}
# Shortest and longest plausible focal length, in picture widths.
_FOCAL_WIDTHS = (0.2, 3.0)

_MAX_LAG_S = 1.5
_CAR_DELAY_S = 0.25
_MIN_PAIRS = 30
_MIN_CORRELATION = 0.5
# A lag outside the normal range is reported only if it fits clearly better than all normal lags.
# Even the best of these must leave at least this many times as much variance unexplained.
_CLEARLY_WORSE = 1.15
# It is a problem if picture and steering turn in opposite directions for at least this long.
# Briefly differing signs are normal.
_CONTRARY_S = 1.0
# Image motion between two frames, in picture widths, above which it is clearly visible.
_VISIBLE_MOTION = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class Synchrony:
    """How well image motion and steering agree."""

    lag_frames: int | None = None
    """Number of frames by which the actions are late (or early, if negative); None if unknown."""
    lag_s: float | None = None
    """The lag in seconds."""
    sign: int | None = None
    """1 if positive steering turns the car left, -1 if it turns it right; None if unknown."""
    correlation: float | None = None
    """Correlation of image motion and steering at the best lag; None if it cannot be computed."""
    focal_widths: float | None = None
    """Focal length in picture widths with which the steering would explain the image motion; None
    if unknown."""
    problems: tuple[str, ...] = ()
    """Problems with the steering and what to do about them, one line each."""


def curvature(steering: Floats, kind: SteeringKind) -> Floats:
    """Convert steering to the curvature of a passenger car's path in 1/m."""
    if kind == "curvature":
        return steering
    return np.tan(steering / _STEERING_RATIOS[kind]) / _WHEELBASE_M


def _turns(sampled: SampledDrive, kind: SteeringKind) -> tuple[Floats, Mask]:
    """Return the change of heading [P] that the actions predict, and where it is known [P].

    The change is in rad. If the drive has no known speed, it is the change at 1 m/s instead.
    """
    actions, valid = sampled.actions[:-1].astype(np.float64), sampled.action_valid[:-1]
    turns = curvature(actions[:, STEERING], kind) * np.diff(sampled.timestamps)
    known = valid[:, STEERING]
    if sampled.action_valid[:, SPEED].any():
        return turns * actions[:, SPEED], known & valid[:, SPEED]
    return turns, known


def _correlations(motion: Floats, turns: Floats, usable: Mask, max_lag: int) -> Floats:
    """Return the correlation of motion[t] with turns[t + k] for each k from -max_lag to max_lag.

    It is NaN if there are too few usable pairs, or if motion or turns do not vary.
    """
    correlations = np.full(2 * max_lag + 1, np.nan)
    for lag in range(-max_lag, max_lag + 1):
        known = usable & _later(usable, lag)
        a, b = motion[known], _later(turns, lag)[known]
        if len(a) >= _MIN_PAIRS and a.std() > 1e-6 and b.std() > 1e-6:
            correlations[lag + max_lag] = np.corrcoef(a, b)[0, 1]
    return correlations


def _later(values: npt.NDArray[Any], lag: int) -> npt.NDArray[Any]:
    """Return values[t + lag] for all t; values beyond either end are 0 or False."""
    return np.pad(values, abs(lag))[abs(lag) + lag :][: len(values)]


def _lag_problem(lag: int, correlations: Floats, period: float) -> str | None:
    """Return a message if the lag is abnormal, otherwise None.

    The motion may normally follow the actions by up to 0.25 s, but it must not precede them.
    """
    middle = len(correlations) // 2
    delay = max(1, round(_CAR_DELAY_S / period))
    unexplained = 1 - np.square(correlations)
    normal = np.nanmin(unexplained[max(0, middle - delay) : middle + 1], initial=1.0)
    if -delay <= lag <= 0 or normal < _CLEARLY_WORSE * unexplained[middle + lag]:
        return None
    frames = "1 frame" if abs(lag) == 1 else f"{abs(lag)} frames"
    return (
        f"the actions are {frames} ({abs(lag) * period:.2f} s) {'late' if lag > 0 else 'early'} "
        f"compared with the motion in the picture: shift them by `time_offset={-lag * period:.2f}`"
    )


def _unit_problem(focal: float) -> str | None:
    low, high = _FOCAL_WIDTHS
    if low <= focal <= high:
        return None
    view = math.degrees(2 * math.atan(0.5 / focal))
    more = "less" if focal < low else "more"
    return (
        f"the picture turns far {more} than speed and steering predict (only a camera with a "
        f"field of view of {view:.0f} degrees would show this): check their units and the kind of "
        "steering"
    )


def _contrary_problem(motion: Floats, turns: Floats, usable: Mask, times: Floats) -> str | None:
    """Return a message if picture and steering turn in opposite directions for 1 s, or None."""
    scale = motion[usable].std() / turns[usable].std()
    against = usable & (np.minimum(np.abs(motion), np.abs(turns * scale)) > _VISIBLE_MOTION)
    against &= np.sign(motion) != np.sign(turns)
    edges = np.flatnonzero(np.diff(against, prepend=False, append=False)).reshape(-1, 2)
    for start, stop in times[edges]:
        if stop - start >= _CONTRARY_S:
            return (
                f"from {start:.1f} to {stop:.1f} s the picture turns opposite to the "
                "steering: if the car reverses there, its speed must be negative"
            )
    return None


def measure_synchrony(motion: Floats32, sampled: SampledDrive) -> Synchrony:
    """Compare the image motion [T - 1] between a drive's frames with its actions.

    Tries lags of up to 1.5 s in both directions. Sets no field if the drive has no steering, is too
    short, or never turns. If the correlation is weaker than 0.5 at all lags, sets only
    `correlation`. In that case, if the turns should be visible in the picture, `problems` says that
    the picture does not follow the steering.
    """
    kind = sampled.drive.log.steering_kind if sampled.drive.log else None
    if kind is None or len(motion) < 2 * _MIN_PAIRS:
        return Synchrony()
    turns, known = _turns(sampled, kind)
    usable = known & within_segments(sampled.segments)
    period = median_period(sampled.timestamps)
    max_lag = min(round(_MAX_LAG_S / period), len(motion) // 3)
    seen = motion.astype(np.float64)
    correlations = _correlations(seen, turns, usable, max_lag)
    if np.isnan(correlations).all():
        return Synchrony()
    best = int(np.nanargmax(np.abs(correlations)))
    lag, correlation = best - max_lag, float(correlations[best])
    has_speed = bool(sampled.action_valid[:, SPEED].any())
    if abs(correlation) < _MIN_CORRELATION:
        # Report a problem only if the turns should be visible with any plausible focal length.
        visible = has_speed and turns[usable].std() * _FOCAL_WIDTHS[0] > _VISIBLE_MOTION
        unclear = (
            f"the picture does not follow the steering (strongest correlation {correlation:.2f}): "
            "check that the actions belong to this video, and check their units"
        )
        return Synchrony(correlation=correlation, problems=(unclear,) if visible else ())
    focal = float(seen[usable].std() / turns[usable].std()) if has_speed else None
    sign = 1 if correlation > 0 else -1
    problems = [
        _lag_problem(lag, correlations, period),
        _contrary_problem(
            seen, _later(turns, lag) * sign, usable & _later(usable, lag), sampled.timestamps
        ),
    ]
    if sign < 0:
        problems.append("the steering is flipped: positive must mean left; negate the column")
    if focal is not None:
        problems.append(_unit_problem(focal))
    return Synchrony(
        lag_frames=lag,
        lag_s=lag * period,
        sign=sign,
        correlation=correlation,
        focal_widths=focal,
        problems=tuple(line for line in problems if line is not None),
    )
