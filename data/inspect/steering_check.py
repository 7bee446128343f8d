"""Whether the actions and the picture tell the same story: lag, sign and unit of the steering.

A car that steers turns, and a car that turns shifts its picture. So speed times curvature predicts
the image motion but for one factor, the camera's focal length; where the two series match best
tells the lag, the sign of the match which way steering is positive, and the factor a wrong unit.

Legend: T frames, P = T - 1 pairs of frames.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from driving_sim.data.actions.action_file import SPEED, STEERING, SteeringKind
from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.data.drive import SampledDrive
from driving_sim.data.video.segments import median_period, within_segments

# A passenger car's, to a factor of 1.5; the bounds on the focal length leave room for that.
_WHEELBASE_M = 2.7
# By what a steering is divided to be the angle of the front wheels, in rad.
_STEERING_RATIOS = {"road_wheel": 1.0, "steering_wheel": 15.0, "normalised": 2.0}
_FOCAL_WIDTHS = (0.2, 3.0)

_MAX_LAG_S = 1.5
_CAR_DELAY_S = 0.25
_MIN_PAIRS = 30
_MIN_CORRELATION = 0.5
# A lag counts where the best normal one leaves this much more of the motion unexplained.
_CLEARLY_WORSE = 1.15
# Crossing zero a little apart is no contradiction; this long is.
_CONTRARY_S = 1.0
# Picture widths: a standard deviation of the turn's motion that certainly shows.
_VISIBLE_MOTION = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class Synchrony:
    """How image motion and steering go together."""

    lag_frames: int | None = None
    """Frames by which the actions are late (negative: early); None where it cannot be told."""
    lag_s: float | None = None
    """The same in seconds."""
    sign: int | None = None
    """1 where positive steering turns the picture as a left turn does, -1 where it is flipped."""
    correlation: float | None = None
    """Of image motion and steering at the lag; None where one of them never changes."""
    focal_widths: float | None = None
    """The camera's focal length in picture widths that would explain the size of the motion."""
    problems: tuple[str, ...] = ()
    """What is wrong, one line each, with the remedy."""


def curvature(steering: Floats, kind: SteeringKind) -> Floats:
    """Curvature in 1/m of a passenger car's path at a steering of this kind."""
    if kind == "curvature":
        return steering
    return np.tan(steering / _STEERING_RATIOS[kind]) / _WHEELBASE_M


def _turns(sampled: SampledDrive, kind: SteeringKind) -> tuple[Floats, Mask]:
    """The change of heading [P] in rad between frames by the actions, and where it is known."""
    actions, valid = sampled.actions[:-1].astype(np.float64), sampled.action_valid[:-1]
    turns = curvature(actions[:, STEERING], kind) * np.diff(sampled.timestamps)
    known = valid[:, STEERING]
    if sampled.action_valid[:, SPEED].any():
        return turns * actions[:, SPEED], known & valid[:, SPEED]
    return turns, known


def _correlations(motion: Floats, turns: Floats, usable: Mask, max_lag: int) -> Floats:
    """Correlation of motion[t] with turns[t + k] for k from -max_lag to max_lag; NaN if unknown."""
    found = np.full(2 * max_lag + 1, np.nan)
    for lag in range(-max_lag, max_lag + 1):
        known = usable & _later(usable, lag)
        a, b = motion[known], _later(turns, lag)[known]
        if len(a) >= _MIN_PAIRS and a.std() > 1e-6 and b.std() > 1e-6:
            found[lag + max_lag] = np.corrcoef(a, b)[0, 1]
    return found


def _later(values: npt.NDArray[Any], lag: int) -> npt.NDArray[Any]:
    """values[t + lag]: 0, or False, where that is beyond either end."""
    return np.pad(values, abs(lag))[abs(lag) + lag :][: len(values)]


def _lag_problem(lag: int, correlations: Floats, period: float) -> str | None:
    """The line about a lag that no car explains: motion may trail the actions, never lead them."""
    middle = len(correlations) // 2
    delay = max(1, round(_CAR_DELAY_S / period))
    unexplained = 1 - np.square(correlations)
    normal = np.nanmin(unexplained[max(0, middle - delay) : middle + 1], initial=1.0)
    if -delay <= lag <= 0 or normal < _CLEARLY_WORSE * unexplained[middle + lag]:
        return None
    frames = "1 frame" if abs(lag) == 1 else f"{abs(lag)} frames"
    return (
        f"the actions are {frames} ({abs(lag) * period:.2f} s) {'late' if lag > 0 else 'early'}: "
        f"try `time_offset={-lag * period:.2f}`"
    )


def _unit_problem(focal: float) -> str | None:
    low, high = _FOCAL_WIDTHS
    if low <= focal <= high:
        return None
    view = math.degrees(2 * math.atan(0.5 / focal))
    more = "less" if focal < low else "more"
    return (
        f"the picture turns far {more} than speed and steering say (a camera that sees {view:.0f} "
        "degrees would explain it): check their units, and the steering's kind"
    )


def _contrary_problem(motion: Floats, turns: Floats, usable: Mask, times: Floats) -> str | None:
    """The line about the first second or more in which picture and steering turn apart."""
    scale = motion[usable].std() / turns[usable].std()
    against = usable & (np.minimum(np.abs(motion), np.abs(turns * scale)) > _VISIBLE_MOTION)
    against &= np.sign(motion) != np.sign(turns)
    edges = np.flatnonzero(np.diff(against, prepend=False, append=False)).reshape(-1, 2)
    for start, stop in times[edges]:
        if stop - start >= _CONTRARY_S:
            return (
                f"from {start:.1f} to {stop:.1f} s the picture turns against the steering: "
                "if the car reverses there, its speed must be negative"
            )
    return None


def measure_synchrony(motion: Floats32, sampled: SampledDrive) -> Synchrony:
    """Compare the image motion [T - 1] between a drive's frames with its actions.

    Lags up to 1.5 s either way are tried. Where there is no steering, or too little of it to show
    in the picture, everything is None.
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
        # Whether the turns would show in the widest picture.
        visible = has_speed and turns[usable].std() * _FOCAL_WIDTHS[0] > _VISIBLE_MOTION
        unclear = (
            f"the picture does not follow the steering (correlation {correlation:.2f} at best): "
            "are these the actions of this video, and their units right?"
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
        problems.append("the steering is flipped: positive must be left; negate the column")
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
