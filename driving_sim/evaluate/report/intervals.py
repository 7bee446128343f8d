"""Compute bootstrap intervals, which show how much a value would vary with other drives or clips.

The bootstrap resamples independent units. If clips are measured, a unit is a clip with its mirror
image, because the futures of clips share no frames. If frames are measured, a unit is a block of
frames, because neighbouring frames are alike.

Axes: U units, S sums of each unit, n values.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.arrays import Floats, Reals

RESAMPLES = 2000
"""Number of times that the bootstrap resamples the units."""
BLOCK_S = 3.0
"""Minimum length of a block of frames that counts as a unit, in s."""


def interval(values: ArrayLike, units: ArrayLike | None = None) -> dict[str, float | None]:
    """Return the mean of `values` [n] and its 95 % interval.

    `units` [n] labels the unit of each value. By default every value is a unit.
    """
    return bootstrap(mean_sums(values, units), mean_of_sums)


def bootstrap(sums: ArrayLike, statistic: Callable[[Reals], Reals]) -> dict[str, float | None]:
    """Return a statistic over all units and its 95 % percentile interval over resampled units.

    The bootstrap is from Efron 1979, https://doi.org/10.1214/aos/1176344552. `sums` [U, S] has a
    row for each unit, with all sums and counts that the statistic needs. A row of only zeros has no
    data and is dropped. The rows of all units, or of the resampled units, are added up. `statistic`
    maps these totals [..., S] to values [...], or to NaN if there are no data.

    Returns a dict. `mean` is the statistic over all units, and `low` and `high` are the ends of its
    interval. With fewer than two units, `low` and `high` are None. If the statistic is NaN, all
    three are None.
    """
    unit_rows = np.asarray(sums, np.float64)
    unit_rows = unit_rows[unit_rows.any(axis=1)]
    units, rng = len(unit_rows), np.random.default_rng(0)
    mean, low, high = float(statistic(unit_rows.sum(axis=0))), None, None
    if np.isnan(mean):
        return {"mean": None, "low": None, "high": None}
    if units > 1:
        # Draw one resample at a time. All of them together would take `RESAMPLES` times the memory.
        resampled = (
            unit_rows[rng.integers(units, size=units)].sum(axis=0) for _ in range(RESAMPLES)
        )
        low, high = np.nanquantile(statistic(np.stack([*resampled])), [0.025, 0.975]).tolist()
    return {"mean": mean, "low": low, "high": high}


def number_and_interval(name: str, estimate: Mapping[str, float | None] | None) -> dict[str, Any]:
    """Return the metrics `NAME` and `NAME_interval` of an estimate, which may be None.

    The first is a number, so a reader of `metrics.json` need not know that it has an interval. The
    second has the interval's ends, `low` and `high`.
    """
    known = estimate or {"mean": None, "low": None, "high": None}
    return {name: known["mean"], f"{name}_interval": {end: known[end] for end in ("low", "high")}}


def estimate_of(metrics: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """Return the estimate that `number_and_interval` wrote to `metrics`, for a table's cell."""
    ends = metrics.get(f"{name}_interval") or {"low": None, "high": None}
    return {"mean": metrics[name], **ends}


def mean_of_sums(sums: Reals) -> Reals:
    """Return means [...] from pairs (sum, count) [..., 2], with NaN where the count is 0.

    This is a statistic for `bootstrap`.
    """
    return ratio(sums[..., 0], sums[..., 1])


def ratio(part: Reals, whole: Reals) -> Reals:
    """Return `part / whole`, with NaN where `whole` is 0."""
    return np.asarray(part / np.where(whole == 0, np.nan, whole))


def mean_sums(values: ArrayLike, units: ArrayLike | None = None) -> Floats:
    """Return the sum and the number of `values` [n] in each unit, [U, 2], for `bootstrap`.

    `units` [n] labels the unit of each value. By default every value is a unit. Units may differ in
    size: the last block of a drive may be shorter, for example. The numbers of values are returned
    so that a mean can give every value, not every unit, the same weight.
    """
    array = np.asarray(values, np.float64)
    terms = np.stack([array, np.ones_like(array)], axis=1)
    return terms if units is None else unit_sums(units, terms)


def unit_sums(units: ArrayLike, values: ArrayLike) -> Floats:
    """Return the sum of the `values` [n, S] of each unit, [U, S].

    `units` [n] labels the unit of each value. The units may be in any order.
    """
    terms = np.asarray(values, np.float64)
    labels, unit = np.unique(np.asarray(units), return_inverse=True)
    sums = np.zeros((len(labels), *terms.shape[1:]))
    np.add.at(sums, unit, terms)
    return sums


def block_frames(fps: float, window: int = 1) -> int:
    """Return the length of a block in frames: `BLOCK_S`, but at least `window` frames."""
    return max(round(BLOCK_S * fps), window)
