"""A scaling law, loss = c + (x / a)^b for training compute x, fitted to a few runs.

GAIA-1 (arXiv 2309.17080, section 6) used this form to predict the loss of a model with 6.5
billion parameters from models that were trained with less than a twentieth of its compute. c is
the loss that remains with infinite compute.

Axes: n runs, R resamples, G candidate exponents.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import DriveSimError, TooLittleDataError

PARAMETERS = 3
"""Number of parameters of the law. A fit needs at least as many runs of different compute."""

_RESAMPLES = 1000
_EXPONENTS = (0.02, 2.0)
"""Smallest and largest value of -b that the fit tries."""
_MAX_LOG = 700.0  # exp() overflows above about 709.
_CANDIDATES = 33
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLaw:
    """The law loss(x) = c + (x / a)^b, for training compute x."""

    c: float
    """Irreducible loss, 0 or more: the limit for infinite compute."""
    a: float
    """Compute at which the loss is `c` + 1."""
    b: float
    """Exponent of the compute, below 0."""

    def __call__(self, compute: ArrayLike) -> Floats:
        """Return the loss at each value of `compute`."""
        return np.asarray(self.c + np.exp(self.b * (np.log(compute) - np.log(self.a))), np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted loss of a run with a given compute."""

    compute: float
    """Training compute of the run, in floating-point operations."""
    loss: float
    """Predicted loss, in bits per token."""
    low: float | None
    """Lower end of the 95 % prediction interval, or None if there are too few runs for one."""
    high: float | None
    """Upper end of the 95 % prediction interval, or None if there are too few runs for one."""

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.loss:.4f}{bounds} bits per token"


class FittedLaw:
    """The law that fits the `loss` [n] of n runs at their `compute` [n], and its uncertainty.

    The fit minimises the sum of the squared relative errors.

    Raises TooLittleDataError if there are fewer than three different values of compute, or if the
    loss does not fall with compute.
    """

    def __init__(self, compute: ArrayLike, loss: ArrayLike) -> None:
        self.compute, self.loss = np.asarray(compute, np.float64), np.asarray(loss, np.float64)
        different = len(np.unique(self.compute))
        if different < PARAMETERS:
            raise TooLittleDataError(
                f"the runs have {different} different amounts of compute, but fitting "
                f"c + (x / a)^b needs at least {PARAMETERS}; add runs of other widths, depths or "
                "lengths"
            )
        # Without centring log compute, the fitted scale would depend strongly on the exponent.
        self._middle = float(np.log(self.compute).mean())
        floor, scale, exponent = _fit(self._centred(self.compute), self.loss[None])[0].tolist()
        falls = math.isfinite(floor + scale + exponent) and scale > 0
        log_a = self._middle + np.log(scale) / exponent if falls else math.inf
        if abs(log_a) > _MAX_LOG:
            raise TooLittleDataError(
                "the loss of these runs does not fall with compute, so no law can be fitted; train "
                "larger models for longer, on more data"
            )
        self.law = ScalingLaw(c=floor, a=float(np.exp(log_a)), b=-exponent)
        """The fitted law."""
        low, high = _EXPONENTS
        self.at_edge = not 1.01 * low < exponent < 0.99 * high
        """Whether the exponent is at an end of the range that the fit tries.

        If so, an exponent outside the range may fit better.
        """
        self.freedom = len(self.loss) - PARAMETERS
        """Degrees of freedom: the number of runs minus the number of parameters.

        If it is 0, the law fits the runs exactly, so its error is unknown.
        """
        squares = np.square(np.log(self.loss / self.law(self.compute))).sum()
        self.spread = float(np.sqrt(squares / self.freedom)) if self.freedom else 0.0
        """Standard deviation of the runs' relative errors, or 0 if `freedom` is 0."""

    def predict(self, compute: float) -> Prediction:
        """Predict the loss of a run with this compute, and a 95 % interval for it."""
        bounds = self.interval([compute])
        low, high = [None, None] if bounds is None else [float(bound[0]) for bound in bounds]
        return Prediction(compute=compute, loss=float(self.law(compute)), low=low, high=high)

    def interval(self, compute: ArrayLike) -> tuple[Floats, Floats] | None:
        """Return the lower and upper ends of the 95 % prediction interval at each compute.

        Returns None if there are no more runs than parameters. The interval comes from a parametric
        bootstrap. Each resample adds random errors to the law's losses and fits a new law to them.
        It also draws the standard deviation of the errors at random, because a few runs determine
        it only roughly.
        """
        if not self.freedom:
            return None
        laws, deviations, noise = self._resampled
        floor, scale, exponent = laws.T[..., None]
        curves = floor + scale * np.exp(-exponent * self._centred(compute))
        measured = curves * _factor(deviations * noise)
        low, high = np.quantile(measured, [0.025, 0.975], axis=0)
        return low, high

    @cached_property
    def _resampled(self) -> tuple[Floats, Floats, Floats]:
        """Law parameters, standard deviations and noise of the R bootstrap resamples.

        The law parameters [R, 3] are those of the law that was fitted to each resample. The
        standard deviations [R, 1] are those of the relative errors in each resample. The noise
        [R, 1] is standard normal. Multiplied by the standard deviation, it is the relative error of
        the predicted run.
        """
        rng = np.random.default_rng(0)
        shrinkage = np.sqrt(self.freedom / rng.chisquare(self.freedom, (_RESAMPLES, 1)))
        deviations = self.spread * shrinkage
        noise = rng.standard_normal((_RESAMPLES, len(self.loss)))
        losses = self.law(self.compute) * _factor(deviations * noise)
        fitted = _fit(self._centred(self.compute), losses)
        return fitted, deviations, rng.standard_normal((_RESAMPLES, 1))

    def _centred(self, compute: ArrayLike) -> Floats:
        """Return log compute, minus the mean log compute of the runs."""
        return np.log(compute) - self._middle


def _factor(deviations: Floats) -> Floats:
    """Turn random deviations of log loss into factors on the loss."""
    # Clip the deviations: with one degree of freedom, some are thousands of times too large.
    return np.exp(np.clip(deviations, -2.0, 2.0))


def _fit(log_compute: Floats, losses: Floats) -> Floats:
    """Fit floor + scale * exp(-exponent * log_compute) to each row of `losses` [R, n].

    Returns an array [R, 3] of floor, scale and exponent. For a fixed exponent, finding the best
    floor and scale, both 0 or more, is a linear problem. So only the exponent is searched: first on
    a grid over its whole range, then on ever finer grids around the best value. The search needs no
    initial guess.
    """
    rows = np.arange(len(losses))
    low, high = (np.full(len(losses), np.log(bound)) for bound in _EXPONENTS)
    for _ in range(_ROUNDS):
        log_exponents = np.linspace(low, high, _CANDIDATES, axis=1)
        floor, scale, error = _floor_and_scale(np.exp(log_exponents), log_compute, losses)
        best = error.argmin(1)
        low = log_exponents[rows, np.maximum(best - 1, 0)]
        high = log_exponents[rows, np.minimum(best + 1, _CANDIDATES - 1)]
    return np.stack([floor[rows, best], scale[rows, best], np.exp(log_exponents[rows, best])], 1)


# If all values of compute are nearly equal, the determinant is 0. Ignore the warnings: the error of
# such a fit is set to infinity.
@np.errstate(all="ignore")
def _floor_and_scale(
    exponents: Floats, log_compute: Floats, losses: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return the best floors and scales for `exponents` [R, G], and their squared relative errors.

    All three results are [R, G]. The errors are summed over the runs.
    """
    # The law is `floor + scale * power = loss`. Divide both sides by the loss, so that the errors
    # of the fit are relative. The right side becomes 1.
    unit = 1 / losses[:, None]
    power = np.exp(-exponents[..., None] * log_compute) * unit
    power2, mixed, unit2 = (power**2).sum(-1), (power * unit).sum(-1), (unit**2).sum(-1)
    power1, unit1 = power.sum(-1), unit.sum(-1)
    determinant = power2 * unit2 - mixed**2
    floor = (unit1 * power2 - power1 * mixed) / determinant
    scale = (power1 * unit2 - unit1 * mixed) / determinant
    scale = np.where(floor < 0, power1 / power2, scale)
    floor = np.where(floor < 0, 0.0, floor)
    floor = np.where(scale < 0, unit1 / unit2, floor)
    scale = np.maximum(scale, 0.0)
    residual = floor[..., None] * unit + scale[..., None] * power - 1
    return floor, scale, np.nan_to_num((residual**2).sum(-1), nan=np.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The loss of the largest run, as measured and as predicted from the smaller runs."""

    predicted: Prediction
    """Prediction by a law that was fitted to the smaller runs only."""
    measured: float
    """Measured loss, or the mean of the losses if several runs have the largest compute."""

    @property
    def error(self) -> float:
        """Relative error of the prediction: positive if the predicted loss is too high."""
        return self.predicted.loss / self.measured - 1


def hold_out_largest(compute: ArrayLike, loss: ArrayLike) -> HeldOut | None:
    """Predict the loss of the run with the largest compute from the other runs.

    Returns None if no law can be fitted to the other runs.
    """
    compute, loss = np.asarray(compute, np.float64), np.asarray(loss, np.float64)
    smaller = compute < compute.max()
    try:
        fitted = FittedLaw(compute[smaller], loss[smaller])
    except DriveSimError:
        return None
    predicted = fitted.predict(float(compute.max()))
    return HeldOut(predicted=predicted, measured=float(loss[~smaller].mean()))
