"""Bootstrap intervals: how far a figure could have come out otherwise, on other drives or clips.

What is resampled are independent units: clips with disjoint futures (a clip and its mirror image
are one), or blocks of frames, since neighbouring frames are alike.

Legend: U units, S sums of each.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.arrays import Floats, Reals

RESAMPLES = 2000
BLOCK_S = 3.0
"""Length of a block of frames that counts as a unit of its own, in s."""


def interval(values: ArrayLike, units: ArrayLike | None = None) -> dict[str, float | None]:
    """Mean of [n] and its 95 % interval, by default of independent values; see `mean_sums`."""
    return bootstrap(mean_sums(values, units), mean_of_sums)


def bootstrap(sums: ArrayLike, statistic: Callable[[Reals], Reals]) -> dict[str, float | None]:
    """A statistic of units' sums and its 95 % percentile interval over resampled units.

    Efron 1979, https://doi.org/10.1214/aos/1176344552. `sums` [U, S] are each unit's; one whose
    sums, counts among them, are all 0 is no unit. `statistic` takes sums [..., S] over units to
    values [...], NaN where they tell nothing. `mean` is its value over all units, None where that
    is NaN; `low` and `high` are None for fewer than two: of a single unit nothing is known but
    itself.
    """
    each = np.asarray(sums, np.float64)
    each = each[each.any(axis=1)]
    units, rng = len(each), np.random.default_rng(0)
    mean, low, high = float(statistic(each.sum(axis=0))), None, None
    if np.isnan(mean):
        return {"mean": None, "low": None, "high": None}
    if units > 1:
        # One at a time: all at once would take thousands of times the memory of the units.
        resampled = (each[rng.integers(units, size=units)].sum(axis=0) for _ in range(RESAMPLES))
        low, high = np.nanquantile(statistic(np.stack([*resampled])), [0.025, 0.975]).tolist()
    return {"mean": mean, "low": low, "high": high}


def mean_of_sums(sums: Reals) -> Reals:
    """A statistic for `bootstrap`: means [...] of [..., 2], a sum and its count; NaN for none."""
    return ratio(sums[..., 0], sums[..., 1])


def ratio(part: Reals, whole: Reals) -> Reals:
    """Divide; NaN where the whole is 0."""
    return np.asarray(part / np.where(whole == 0, np.nan, whole))


def mean_sums(values: ArrayLike, units: ArrayLike | None = None) -> Floats:
    """Sum of `values` [n] and their number in each unit, [U, 2], for `bootstrap`.

    `units` [n] are labels; without them each value is a unit. Sums and counts are resampled, for
    units may be of different sizes, as blocks at the ends of drives are, and the mean is over
    values.
    """
    array = np.asarray(values, np.float64)
    terms = np.stack([array, np.ones_like(array)], axis=1)
    return terms if units is None else unit_sums(units, terms)


def unit_sums(units: ArrayLike, values: ArrayLike) -> Floats:
    """Sum `values` [n, S] over those of a unit, [U, S]; `units` [n] are labels in any order."""
    terms = np.asarray(values, np.float64)
    found, place = np.unique(np.asarray(units), return_inverse=True)
    sums = np.zeros((len(found), *terms.shape[1:]))
    np.add.at(sums, place, terms)
    return sums


def block_frames(fps: float, window: int = 1) -> int:
    """Frames of a block: 3 s of them, or a model's whole window where that is longer."""
    return max(round(BLOCK_S * fps), window)
