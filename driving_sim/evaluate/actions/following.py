"""Measure how well the realised actions of rollouts follow the commands, for one channel.

The probe estimates the realised actions from the pictures. NaN marks an unknown value: a command
that was not given, or a realised action that could not be estimated.

Legend: C clips, N transitions of a clip, L levels of a sweep.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.arrays import Reals
from driving_sim.evaluate.report.intervals import (
    bootstrap,
    number_and_interval,
    ratio,
    unit_sums,
)

_LONGEST_DELAY = 5
"""Largest delay that is tried, in frames."""
_FLAT = 1e-12
"""A variance up to this share of the mean square of the same values counts as a rounding error.

Such a variance is set to 0, so that constant values have no correlation.
"""


def follow(
    commanded: Reals,
    realised: Reals,
    *,
    units: ArrayLike | None = None,
    sign_threshold: float | None = None,
) -> dict[str, Any]:
    """Compare the commanded and realised values [C, N] of one channel.

    Returns the metrics below. A metric is None if it cannot be computed from these clips.

    - `transitions`: number of transitions at which both values are known.
    - `correlation`: Pearson correlation over all clips together.
    - `gain`: slope of the least-squares line from commanded to realised values. 1 is full
      obedience; 0.5 means that the rollouts do half of what was asked. `gain_interval` has the
      ends of its interval.
    - `mean_absolute_error`: in the channel's unit.
    - `delay_frames`: number of frames by which the picture lags behind the command. It is the lag
      from -5 to 5 with the highest normalised cross-correlation, after each clip's own mean is
      subtracted. None if no lag has a positive correlation.
    - `sign_accuracy`: see `balanced_sign_accuracy`. None without a `sign_threshold`.

    Correlation, gain and sign accuracy come with intervals. `units` [C] are labels of the clips.
    Clips with the same label are resampled together, because they are not independent: a clip and
    its mirror image, for example. By default every clip is resampled alone.
    """
    x, y = _paired(commanded, realised)
    known = ~np.isnan(x)
    units = np.arange(len(x)) if units is None else units
    moments = unit_sums(units, _moments(x, y))
    sides = None if sign_threshold is None else unit_sums(units, _sides(x, y, sign_threshold))
    return {
        "transitions": int(known.sum()),
        "correlation": _estimate(moments, _correlation),
        **number_and_interval("gain", _estimate(moments, _gain)),
        "mean_absolute_error": float(np.abs(x - y)[known].mean()) if known.any() else None,
        "delay_frames": _delay(x, y),
        "sign_accuracy": None if sides is None else _estimate(sides, _balanced),
    }


def balanced_sign_accuracy(commanded: Reals, realised: Reals, threshold: float) -> float | None:
    """Return the share of commands beyond ±`threshold` that are realised with the right sign.

    The shares of left and of right commands are computed separately and then averaged. So a model
    that always turns the same way scores 0.5 on any drive. A realised value of 0 counts as wrong.
    Both arrays have the same shape. Returns None if only one side or no side is commanded.
    """
    x, y = _paired(commanded, realised)
    return _or_none(_balanced(_sides(x.reshape(1, -1), y.reshape(1, -1), threshold)[0]))


def monotonicity(commanded: Reals, realised: Reals) -> dict[str, float | None]:
    """Measure whether higher commands give higher realised values, for the levels [L] of a sweep.

    `rank_correlation` is Spearman's. It is 1 if every higher command gives a higher realised
    value. `in_order` is the share of pairs of neighbouring levels for which this is true.
    """
    x, y = (values[~np.isnan(values)] for values in _paired(commanded, realised))
    ranks = np.stack([_ranks(x), _ranks(y)])
    order = np.argsort(x, kind="stable")
    step, rise = np.diff(x[order]), np.diff(y[order])
    return {
        "rank_correlation": _or_none(_correlation(_moments(*ranks[:, None])[0])),
        "in_order": float((rise[step > 0] > 0).mean()) if (step > 0).any() else None,
    }


def _paired(commanded: Reals, realised: Reals) -> tuple[Reals, Reals]:
    """Return both arrays as float64. Where one of them is NaN, set the other to NaN as well."""
    x, y = np.array(commanded, np.float64), np.array(realised, np.float64)
    unknown = np.isnan(x) | np.isnan(y)
    x[unknown] = y[unknown] = np.nan
    return x, y


def _moments(x: Reals, y: Reals) -> Reals:
    """Return each clip's sums [C, 6] of 1, x, y, xy, xx and yy, ignoring NaN.

    The means of x and y over all clips are subtracted first.
    """
    known = ~np.isnan(x)
    x, y = (np.where(known, v - (v[known].mean() if known.any() else 0.0), 0.0) for v in (x, y))
    terms = (known.astype(np.float64), x, y, x * y, x * x, y * y)
    return np.stack([term.sum(axis=1) for term in terms], axis=1)


def _spread(moments: Reals) -> tuple[Reals, Reals, Reals]:
    """Return the covariance and the variances of x and y from sums [..., 6] of `_moments`.

    A variance that is only a rounding error becomes 0.
    """
    count, x, y, xy, xx, yy = np.moveaxis(moments, -1, 0)
    count = np.maximum(count, 1.0)
    variances = [
        np.where(square - total**2 / count > _FLAT * square, square - total**2 / count, 0.0) / count
        for square, total in ((xx, x), (yy, y))
    ]
    return (xy - x * y / count) / count, variances[0], variances[1]


def _correlation(moments: Reals) -> Reals:
    """Return the Pearson correlation from sums [..., 6]; NaN if x or y does not vary."""
    covariance, variance_x, variance_y = _spread(moments)
    return np.clip(ratio(covariance, np.sqrt(variance_x * variance_y)), -1.0, 1.0)


def _gain(moments: Reals) -> Reals:
    """Return the slope of y over x from sums [..., 6]; NaN if x does not vary."""
    covariance, variance_x, _ = _spread(moments)
    return ratio(covariance, variance_x)


def _sides(x: Reals, y: Reals, threshold: float) -> Reals:
    """Count the left and right commands of each clip, and how many were obeyed, [C, 4].

    The columns are: left, left obeyed, right, right obeyed.
    """
    left, right = x > threshold, x < -threshold
    counts = [left, left & (y > 0), right, right & (y < 0)]
    return np.stack([count.sum(axis=1) for count in counts], axis=1).astype(np.float64)


def _balanced(sides: Reals) -> Reals:
    """Return the mean of the left and the right accuracy, from counts [..., 4] of `_sides`.

    Returns NaN if a side was never commanded.
    """
    left, left_obeyed, right, right_obeyed = np.moveaxis(sides, -1, 0)
    return np.asarray((ratio(left_obeyed, left) + ratio(right_obeyed, right)) / 2)


def _estimate(sums: Reals, statistic: Callable[[Reals], Reals]) -> dict[str, float | None] | None:
    estimate = bootstrap(sums, statistic)
    return None if estimate["mean"] is None else estimate


def _delay(x: Reals, y: Reals) -> int | None:
    """Return the lag in frames at which y [C, N] correlates best with x.

    Returns the shortest of equally good lags, or None if no lag has a positive correlation.
    """
    frames = x.shape[1]
    longest = max(0, min(_LONGEST_DELAY, frames - 2))
    lags = sorted(range(-longest, longest + 1), key=abs)
    correlations = [
        _within_clip_correlation(
            x[:, max(-lag, 0) : frames - max(lag, 0)], y[:, max(lag, 0) : frames + min(lag, 0)]
        )
        for lag in lags
    ]
    best = int(np.argmax(correlations))
    return lags[best] if correlations[best] > 0 else None


def _within_clip_correlation(x: Reals, y: Reals) -> float:
    """Correlate x and y after subtracting each clip's own means.

    Otherwise the different means of the clips would give a correlation at every lag. Returns 0 if
    x or y is constant.
    """
    moments = _moments(*_paired(x, y))
    parts = [(moments[:, 0] * part).sum() for part in _spread(moments)]
    correlation = float(ratio(parts[0], np.sqrt(parts[1] * parts[2])))
    return 0.0 if np.isnan(correlation) else correlation


def _ranks(values: Reals) -> Reals:
    """Return the ranks of values, starting at 1. Equal values all get the mean of their ranks."""
    below = (values[:, None] > values[None]).sum(axis=1)
    same = (values[:, None] == values[None]).sum(axis=1)
    return np.asarray(below + (same + 1) / 2)


def _or_none(value: Reals) -> float | None:
    return None if np.isnan(value) else float(value)
