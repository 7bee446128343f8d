"""Find a steady drift of the clock of the actions against the clock of the video.

Legend: B blocks of about a second.
"""

from dataclasses import dataclass

import numpy as np

from driving_sim.data.arrays import Ints
from driving_sim.data.inspect.agreement import Agreement, moments

_MIN_BLOCKS = 12
# With more lags than this in each direction, the search steps over some, to take less time.
_LAGS_EACH_WAY = 30
# A drift is reported only if it is at least this long, and fits clearly better than a steady lag:
# this must leave this many times as much variance unexplained, at this many separate moments.
_MIN_FRAMES, _MIN_S = 2, 0.15
_CLEARLY_WORSE = 1.15
_MIN_MOMENTS = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """A lag that changes evenly during a drive."""

    lags: tuple[int, int]
    """Frames by which the actions are late (or early, if negative) at the start and at the end."""
    lags_s: tuple[float, float]
    """The same in seconds."""
    measured_s: float
    """Time from the start to the end, in seconds."""

    @property
    def rate(self) -> float:
        """By how much the clock of the actions is too fast, as a share."""
        return (self.lags_s[1] - self.lags_s[0]) / self.measured_s

    @property
    def problem(self) -> str:
        """A message that says how large the drift is and what to do about it."""
        start, end = (f"{abs(lag):.2f} s {'early' if lag < 0 else 'late'}" for lag in self.lags_s)
        speed = "fast" if self.rate > 0 else "slow"
        return (
            f"the actions drift: {start} at the start, {end} at the end of the "
            f"{self.measured_s:.0f} s measured; their clock runs {100 * abs(self.rate):.2g} % "
            f"{speed}: correct the times of the log, or record it on the clock of the video"
        )


def find_drift(
    agreement: Agreement, steady: Ints, period: float, measured_s: float
) -> Drift | None:
    """Return the drift that fits better than the `steady` lags [B], or None if there is none.

    `period` is the time between two frames, and `measured_s` that between the first and the last
    one, both in seconds.
    """
    if agreement.blocks < _MIN_BLOCKS:
        return None
    step = -(-agreement.max_lag // _LAGS_EACH_WAY)
    ends = np.arange(-agreement.max_lag, agreement.max_lag + 1, max(1, step))
    firsts, lasts = (grid.ravel() for grid in np.meshgrid(ends, ends, indexing="ij"))
    long_enough = np.abs(lasts - firsts) >= max(_MIN_FRAMES, _MIN_S / period)
    pairs = [
        (int(first), int(last))
        for first, last in zip(firsts[long_enough], lasts[long_enough], strict=True)
    ]
    if not pairs:
        return None
    correlations = np.abs([agreement.correlation(agreement.along(*pair)) for pair in pairs])
    if np.isnan(correlations).all():
        return None
    best = pairs[int(np.nanargmax(correlations))]
    rest, drifting = agreement.unexplained(steady), agreement.unexplained(agreement.along(*best))
    if rest.sum() < _CLEARLY_WORSE * drifting.sum() or moments(rest - drifting) < _MIN_MOMENTS:
        return None
    first, last = best
    return Drift(
        lags=best,
        lags_s=(first * period, last * period),
        measured_s=measured_s,
    )
