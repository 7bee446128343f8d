"""How well what a rollout's pictures show follows what was commanded, for one channel of actions.

NaN is what is not known: a command that was not given, or a motion that could not be measured.

Legend: C clips, N transitions of a clip, L levels of a sweep.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.arrays import Reals
from driving_sim.evaluate.report.intervals import bootstrap, ratio, unit_sums

_LONGEST_DELAY = 5
_FLAT = 1e-12
"""A variance that is this small a share of the mean square is rounding."""


def follow(
    commanded: Reals,
    realised: Reals,
    *,
    units: ArrayLike | None = None,
    sign_threshold: float | None = None,
) -> dict[str, Any]:
    """Compare commanded with realised [C, N] of one channel; None is what clips cannot tell.

    - `transitions`: where both are known.
    - `correlation`: Pearson's, over all clips together.
    - `gain`: least-squares slope of realised on commanded: 1 is obedience, 0.5 half of what was
      asked.
    - `mean_absolute_error`: in the channel's unit.
    - `delay_frames`: how much later than commanded the picture follows, the lag, at most 5 frames
      either way, of the highest normalised cross-correlation of the clips, each about its own mean;
      None where it follows at no lag.
    - `sign_accuracy`: of left and right commands beyond `sign_threshold`, averaged.

    Correlation and sign accuracy have intervals, over `units`, a label [C] for each clip: clips of
    one label, a clip and its mirror image, are no independent evidence. By default each clip is a
    unit.
    """
    x, y = _paired(commanded, realised)
    known = ~np.isnan(x)
    units = np.arange(len(x)) if units is None else units
    moments = unit_sums(units, _moments(x, y))
    covariance, commanded_variance, _ = _spread(moments.sum(axis=0))
    sides = None if sign_threshold is None else unit_sums(units, _sides(x, y, sign_threshold))
    return {
        "transitions": int(known.sum()),
        "correlation": _estimate(moments, _correlation),
        "gain": _or_none(ratio(covariance, commanded_variance)),
        "mean_absolute_error": float(np.abs(x - y)[known].mean()) if known.any() else None,
        "delay_frames": _delay(x, y),
        "sign_accuracy": None if sides is None else _estimate(sides, _balanced),
    }


def balanced_sign_accuracy(commanded: Reals, realised: Reals, threshold: float) -> float | None:
    """Share of the right sign among commands beyond ±`threshold`: of left, of right, averaged.

    Takes two arrays of one shape. A model that always goes one way scores 0.5, whatever the drive;
    realised 0 is neither side. None where one side is never commanded.
    """
    x, y = _paired(commanded, realised)
    return _or_none(_balanced(_sides(x.reshape(1, -1), y.reshape(1, -1), threshold)[0]))


def monotonicity(commanded: Reals, realised: Reals) -> dict[str, float | None]:
    """Tell whether more commanded is more realised, of the levels [L] of a sweep.

    `rank_correlation` is Spearman's; 1 where every step up is one up. `in_order` is the share of
    neighbouring levels of which the higher command realised more.
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
    """Both as float64, unknown in both where unknown in either."""
    x, y = np.array(commanded, np.float64), np.array(realised, np.float64)
    unknown = np.isnan(x) | np.isnan(y)
    x[unknown] = y[unknown] = np.nan
    return x, y


def _moments(x: Reals, y: Reals) -> Reals:
    """Sums [C, 6] of 1, x, y, xy, xx and yy of each clip, about the means of all clips."""
    known = ~np.isnan(x)
    x, y = (np.where(known, v - (v[known].mean() if known.any() else 0.0), 0.0) for v in (x, y))
    terms = (known.astype(np.float64), x, y, x * y, x * x, y * y)
    return np.stack([term.sum(axis=1) for term in terms], axis=1)


def _spread(moments: Reals) -> tuple[Reals, Reals, Reals]:
    """Covariance and the variances of x and y from sums [..., 6]; 0 where nothing varies."""
    count, x, y, xy, xx, yy = np.moveaxis(moments, -1, 0)
    count = np.maximum(count, 1.0)
    variances = [
        np.where(square - total**2 / count > _FLAT * square, square - total**2 / count, 0.0) / count
        for square, total in ((xx, x), (yy, y))
    ]
    return (xy - x * y / count) / count, variances[0], variances[1]


def _correlation(moments: Reals) -> Reals:
    """Pearson's correlation from sums [..., 6]; NaN where either does not vary."""
    covariance, variance_x, variance_y = _spread(moments)
    return np.clip(ratio(covariance, np.sqrt(variance_x * variance_y)), -1.0, 1.0)


def _sides(x: Reals, y: Reals, threshold: float) -> Reals:
    """Counts [C, 4] of each clip: left commands and those realised as left, then right ones."""
    left, right = x > threshold, x < -threshold
    counts = [left, left & (y > 0), right, right & (y < 0)]
    return np.stack([count.sum(axis=1) for count in counts], axis=1).astype(np.float64)


def _balanced(sides: Reals) -> Reals:
    """Mean of the two sides' accuracies from counts [..., 4]; NaN where a side is missing."""
    left, left_right, right, right_right = np.moveaxis(sides, -1, 0)
    return np.asarray((ratio(left_right, left) + ratio(right_right, right)) / 2)


def _estimate(sums: Reals, statistic: Callable[[Reals], Reals]) -> dict[str, float | None] | None:
    found = bootstrap(sums, statistic)
    return None if found["mean"] is None else found


def _delay(x: Reals, y: Reals) -> int | None:
    """The lag at which y [C, N] is most like x before it; of equals the shortest."""
    frames = x.shape[1]
    longest = max(0, min(_LONGEST_DELAY, frames - 2))
    lags = sorted(range(-longest, longest + 1), key=abs)
    likeness = [
        _likeness(
            x[:, max(-lag, 0) : frames - max(lag, 0)], y[:, max(lag, 0) : frames + min(lag, 0)]
        )
        for lag in lags
    ]
    best = int(np.argmax(likeness))
    return lags[best] if likeness[best] > 0 else None


def _likeness(x: Reals, y: Reals) -> float:
    """Correlation of clips about their own means, so that a level is no likeness; 0 where flat."""
    moments = _moments(*_paired(x, y))
    parts = [(moments[:, 0] * part).sum() for part in _spread(moments)]
    found = float(ratio(parts[0], np.sqrt(parts[1] * parts[2])))
    return 0.0 if np.isnan(found) else found


def _ranks(values: Reals) -> Reals:
    """Ranks from 1; equal values share their mean rank."""
    below = (values[:, None] > values[None]).sum(axis=1)
    same = (values[:, None] == values[None]).sum(axis=1)
    return np.asarray(below + (same + 1) / 2)


def _or_none(value: Reals) -> float | None:
    return None if np.isnan(value) else float(value)
