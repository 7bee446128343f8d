"""Compare the steering with the motion in the picture, to find its lag, its sign and wrong units.

When a car turns, its picture shifts sideways. So speed times curvature predicts the image motion up
to one factor, the focal length of the camera. The lag is the offset at which prediction and motion
match best. The sign of their correlation tells whether positive steering means left. If the factor
is no plausible focal length, a unit is wrong.

Legend: T frames, P = T - 1 pairs of frames, B blocks of about a second.
"""

from dataclasses import dataclass

import numpy as np

from driving_sim.data.actions.action_log import SPEED
from driving_sim.data.arrays import Floats, Floats32, Ints, Mask
from driving_sim.data.drive import SampledDrive
from driving_sim.data.inspect.agreement import Agreement, moments
from driving_sim.data.inspect.drift import Drift, find_drift
from driving_sim.data.inspect.turns import predicted_turns
from driving_sim.data.inspect.units import FOCAL_WIDTHS, judge_units
from driving_sim.data.inspect.view import CLEAR, View
from driving_sim.data.video.segments import median_period, within_segments

_MAX_LAG_S = 1.5
_CAR_DELAY_S = 0.25
_MIN_PAIRS = 60
# Lag and sign are unknown unless they are seen at several separate moments: more of them if the
# correlation is weak. Of 160 real drives, 98 % reach this strength, and none does with the actions
# of another drive.
_MIN_CORRELATION = 0.5
_MIN_MOMENTS = 2.5
_MIN_STRENGTH = 3.5
# If the strongest correlation is below this although the turns are visible at several moments, the
# actions hardly belong to the video.
_UNRELATED_CORRELATION = 0.6
_UNRELATED_MOMENTS = 4.0
_HARDLY_DRIVES_MPS = 0.5
# A lag outside the normal range is reported only if it fits clearly better than all normal lags.
# Even the best of these must leave at least this many times as much variance unexplained, at this
# many separate moments.
_CLEARLY_WORSE = 1.15
_LAG_MOMENTS = 2.0
# It is a problem if picture and steering turn in opposite directions for at least this long.
# Briefly differing signs are normal.
_CONTRARY_S = 1.0
# The picture turns back as fast as the steering turns, within this factor. A skid is no reversing.
_CONTRARY_FACTOR = 2.5
# Image motion between two frames, in picture widths, above which it is clearly visible.
_VISIBLE_MOTION = 0.002
_UNKNOWN = "lag and sign are unknown: "
_FLIPPED = "the steering is flipped: positive must mean left; negate the column"


@dataclass(frozen=True, kw_only=True, slots=True)
class Synchrony:
    """How well image motion and steering agree."""

    lag_frames: int | None = None
    """Number of frames by which the actions are late (or early, if negative); None if unknown. If
    they drift, this is the mean."""
    lag_s: float | None = None
    """The lag in seconds."""
    drift: Drift | None = None
    """How the lag changes during the drive; None if it is steady or unknown."""
    sign: int | None = None
    """1 if positive steering turns the car left, -1 if it turns it right; None if unknown."""
    correlation: float | None = None
    """Correlation of image motion and steering at the best lag, with the largest values clipped;
    None if it cannot be computed."""
    focal_widths: float | None = None
    """Focal length in picture widths with which the steering would explain the image motion; None
    if unknown."""
    problems: tuple[str, ...] = ()
    """Problems with the steering and what to do about them, one line each."""
    notices: tuple[str, ...] = ()
    """What cannot be told about the steering, and why, one line each."""


def _likely_lag(agreement: Agreement, best: int, sign: float, period: float) -> int:
    """Return the lag: the `best` one if it fits clearly better than all normal lags.

    The motion may normally follow the actions by up to 0.25 s, but it must not precede them.
    """
    delay = min(max(1, round(_CAR_DELAY_S / period)), agreement.max_lag)
    normal = np.arange(-delay, 1)
    correlations = sign * agreement.correlation(agreement.steady(0) + normal[:, None])
    if -delay <= best <= 0 or np.isnan(correlations).all():
        return best
    usual = int(normal[np.nanargmax(correlations)])
    agreement = agreement.without_contradictions(agreement.steady(best))
    rest, usual_rest = (agreement.unexplained(agreement.steady(lag)) for lag in (best, usual))
    is_clear = usual_rest.sum() >= _CLEARLY_WORSE * rest.sum()
    return best if is_clear and moments(usual_rest - rest) >= _LAG_MOMENTS else usual


def _lag_problem(lag: int, period: float) -> str | None:
    if -max(1, round(_CAR_DELAY_S / period)) <= lag <= 0:
        return None
    frames = "1 frame" if abs(lag) == 1 else f"{abs(lag)} frames"
    return (
        f"the actions are {frames} ({abs(lag) * period:.2f} s) {'late' if lag > 0 else 'early'} "
        f"compared with the motion in the picture: shift them by `time_offset={-lag * period:.2f}`"
    )


def _later(turns: Floats, usable: Mask, lags: Ints) -> tuple[Floats, Mask]:
    """Return turns[t + lags[t]] for each t [P], and whether they are usable [P]."""
    at = np.arange(len(turns)) + lags
    inside = at.clip(0, len(turns) - 1)
    return turns[inside], usable[inside] & (at == inside)


def _contrary_problem(seen: Floats, expected: Floats, usable: Mask, times: Floats) -> str | None:
    """Return a message if the picture turns opposite to the expected motion for 1 s, or None."""
    smaller, larger = np.sort(np.abs([seen, expected]), axis=0)
    against = usable & (smaller > _VISIBLE_MOTION) & (np.sign(seen) != np.sign(expected))
    edges = np.flatnonzero(np.diff(against, prepend=False, append=False)).reshape(-1, 2)
    for first, last in edges:
        start, stop = times[first], times[last]
        ratio = np.median(larger[first:last] / smaller[first:last])
        if stop - start >= _CONTRARY_S and ratio < _CONTRARY_FACTOR:
            return (
                f"from {start:.1f} to {stop:.1f} s the picture turns opposite to the "
                "steering: if the car reverses there, its speed must be negative"
            )
    return None


def _no_verdict(agreement: Agreement, lags: Ints, view: View, *, visible: bool) -> Synchrony | None:
    """Return why lag and sign cannot be told, or None if they can.

    It is a problem, not just a notice, if the picture should show turns that are `visible`, but
    shows others.
    """
    correlation = float(agreement.correlation(lags))
    square = min(correlation**2, 1 - 1e-9)
    seen_at = moments(agreement.evidence(lags))
    is_strong = seen_at * square / (1 - square) >= _MIN_STRENGTH
    if abs(correlation) >= _MIN_CORRELATION and seen_at >= _MIN_MOMENTS and is_strong:
        return None
    now = agreement.max_lag  # The row of lag 0.
    turns_at = min(moments(agreement.turned[now]), moments(agreement.moved[now]))
    weak = f"strongest correlation {correlation:.2f}"
    is_unrelated = abs(correlation) < _UNRELATED_CORRELATION and turns_at >= _UNRELATED_MOMENTS
    if is_unrelated and visible and not view.hindrance:
        line = (
            f"the picture does not follow the steering ({weak}): check that the actions belong to "
            "this video, and check their units"
        )
        return Synchrony(correlation=correlation, problems=(line,))
    if min(turns_at, seen_at) < _MIN_MOMENTS:
        reason = "the car turns at too few moments"
    else:
        follows = view.hindrance or "the picture does not follow the steering clearly"
        reason = f"{follows} ({weak})"
    return Synchrony(correlation=correlation, notices=(_UNKNOWN + reason,))


def measure_synchrony(motion: Floats32, sampled: SampledDrive, view: View = CLEAR) -> Synchrony:
    """Compare the sideways image motion [T - 1] between a drive's frames with its actions.

    Tries lags of up to 1.5 s in both directions, which may change evenly during the drive. Sets no
    field if the drive has no steering. If lag and sign cannot be told, `notices` says why; or, if
    the turns should be visible in the picture, `problems` says that it does not follow them.
    """
    kind = sampled.drive.log.steering_kind if sampled.drive.log else None
    if kind is None:
        return Synchrony()
    if view.is_from_above:
        return Synchrony(notices=(f"{_UNKNOWN}{view.hindrance}",))
    turns, known = predicted_turns(sampled, kind)
    usable = known & within_segments(sampled.segments)
    if np.count_nonzero(usable) < _MIN_PAIRS:
        return Synchrony(notices=(f"{_UNKNOWN}fewer than {_MIN_PAIRS} frames have known actions",))
    period = median_period(sampled.timestamps)
    max_lag = min(round(_MAX_LAG_S / period), len(motion) // 3)
    seen = motion.astype(np.float64)
    agreement = Agreement.measure(seen, turns, usable, period, max_lag)
    steady = agreement.steady(0) + np.arange(-max_lag, max_lag + 1)[:, None]
    correlations = agreement.correlation(steady)
    if np.isnan(correlations).all():
        turns_vary = agreement.turned[max_lag].sum() > agreement.moved[max_lag].sum()
        reason = "the picture hardly moves sideways" if turns_vary else "the car hardly turns"
        return Synchrony(notices=(_UNKNOWN + reason,))
    has_speed = bool(sampled.action_valid[:, SPEED].any())
    speeds = np.abs(sampled.actions[:-1, SPEED][usable])
    if has_speed and np.quantile(speeds, 0.95) < _HARDLY_DRIVES_MPS:
        return Synchrony(notices=(f"{_UNKNOWN}the car hardly drives",))
    best = int(np.nanargmax(np.abs(correlations)))
    drift = find_drift(agreement, steady[best], period, float(sampled.timestamps[-1]))
    lag = _likely_lag(agreement, best - max_lag, np.sign(correlations[best]), period)
    lags = agreement.along(*drift.lags) if drift else agreement.steady(lag)
    agreement = agreement.without_contradictions(lags)
    visible = has_speed and bool(turns[usable].std() * FOCAL_WIDTHS[0] > _VISIBLE_MOTION)
    if unknown := _no_verdict(agreement, lags, view, visible=visible):
        return unknown
    correlation, factor = float(agreement.correlation(lags)), agreement.factor(lags)
    sign = 1 if correlation > 0 else -1
    expected, known = _later(turns, usable, lags[agreement.block_of])
    expected *= sign * factor
    units = judge_units(factor, correlation, kind, sampled.drive.wheelbase_m, view)
    problems = (
        drift.problem if drift else _lag_problem(lag, period),
        _contrary_problem(seen, expected, usable & known, sampled.timestamps),
        _FLIPPED if sign < 0 else None,
        units.problem if has_speed else None,
    )
    return Synchrony(
        lag_frames=round(sum(drift.lags) / 2) if drift else lag,
        lag_s=sum(drift.lags_s) / 2 if drift else lag * period,
        drift=drift,
        sign=sign,
        correlation=correlation,
        focal_widths=factor if has_speed else None,
        problems=tuple(line for line in problems if line is not None),
        notices=units.notices if has_speed else (),
    )
