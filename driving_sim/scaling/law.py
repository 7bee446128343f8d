"""A law of training compute, loss = c + (x / a)^b, fitted to a few runs.

GAIA-1 (arXiv 2309.17080, section 6) predicted the loss of its 6.5 B model with this form from
models trained with less than a twentieth of its compute; c is what no amount of compute removes.

Axes: n runs, R resamples, G exponents that are tried.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import DriveSimError, TooLittleDataError

PARAMETERS = 3
"""Of the law: as many runs of different compute determine it, one more says how well."""

_RESAMPLES = 1000
_EXPONENTS = (0.02, 2.0)
"""Between which the power of compute is looked for, without its sign."""
_MOST_LOG = 700.0  # exp() of more is no number
_TRIED = 33
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLaw:
    """loss(x) = c + (x / a)^b."""

    c: float
    """The loss that remains however much is trained; 0 or more."""
    a: float
    """The compute at which the loss is 1 above `c`."""
    b: float
    """The exponent, below 0."""

    def __call__(self, compute: ArrayLike) -> Floats:
        """The loss at each compute."""
        return np.asarray(self.c + np.exp(self.b * (np.log(compute) - np.log(self.a))), np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A loss at a compute that was not trained with."""

    compute: float
    loss: float
    low: float | None
    """Lower end of the 95 % interval of what a run would measure; None where runs are too few."""
    high: float | None
    """Its upper end."""

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.loss:.4f}{bounds} bits per token"


class FittedLaw:
    """The law nearest to `loss` [n] at `compute` [n], in relative error; and how sure it is.

    Raises `TooLittleDataError` where there are fewer than three different computes or the loss does
    not fall with compute.
    """

    def __init__(self, compute: ArrayLike, loss: ArrayLike) -> None:
        self.compute, self.loss = np.asarray(compute, np.float64), np.asarray(loss, np.float64)
        different = len(np.unique(self.compute))
        if different < PARAMETERS:
            raise TooLittleDataError(
                f"{different} different computes: c + (x / a)^b takes at least {PARAMETERS}; "
                "add runs of other widths, depths or lengths"
            )
        # Around the runs' middle the scale says little about the exponent: a stable fit.
        self._middle = float(np.log(self.compute).mean())
        floor, scale, exponent = _fit(self._place(self.compute), self.loss[None])[0].tolist()
        falls = math.isfinite(floor + scale + exponent) and scale > 0
        log_a = self._middle + np.log(scale) / exponent if falls else math.inf
        if abs(log_a) > _MOST_LOG:
            raise TooLittleDataError(
                "the loss does not fall with compute in these runs, so there is no law to fit; "
                "train larger models for longer, on more data"
            )
        self.law = ScalingLaw(c=floor, a=float(np.exp(log_a)), b=-exponent)
        """The fitted law."""
        low, high = _EXPONENTS
        self.at_edge = not 1.01 * low < exponent < 0.99 * high
        """Whether the exponent is an end of the range that is tried: the best may lie beyond."""
        self.freedom = len(self.loss) - PARAMETERS
        """Runs beyond those that the law's parameters take up; 0: it meets them whatever they are.

        Of several runs with one compute, each counts.
        """
        squares = np.square(np.log(self.loss / self.law(self.compute))).sum()
        self.spread = float(np.sqrt(squares / self.freedom)) if self.freedom else 0.0
        """The runs' relative deviation from the law, as a standard deviation."""

    def predict(self, compute: float) -> Prediction:
        """The loss at `compute`, and between which bounds a run there would lie 19 times of 20."""
        bounds = self.interval([compute])
        low, high = [None, None] if bounds is None else [float(bound[0]) for bound in bounds]
        return Prediction(compute=compute, loss=float(self.law(compute)), low=low, high=high)

    def interval(self, compute: ArrayLike) -> tuple[Floats, Floats] | None:
        """The bounds of `predict` at each compute; None where no run is left to judge the fit by.

        From refitted resamples: the law's own losses, each with a deviation as large as the runs'.
        How large that is, is itself known from a few runs only, so it is drawn for each resample.
        """
        if not self.freedom:
            return None
        laws, deviations, noise = self._resampled
        floor, scale, exponent = laws.T[..., None]
        curves = floor + scale * np.exp(-exponent * self._place(compute))
        measured = curves * _factor(deviations * noise)
        low, high = np.quantile(measured, [0.025, 0.975], axis=0)
        return low, high

    @cached_property
    def _resampled(self) -> tuple[Floats, Floats, Floats]:
        """Laws [R, 3] fitted to resamples, their deviations [R, 1] and a draw for a new run."""
        rng = np.random.default_rng(0)
        shrinkage = np.sqrt(self.freedom / rng.chisquare(self.freedom, (_RESAMPLES, 1)))
        deviations = self.spread * shrinkage
        noise = rng.standard_normal((_RESAMPLES, len(self.loss)))
        losses = self.law(self.compute) * _factor(deviations * noise)
        fitted = _fit(self._place(self.compute), losses)
        return fitted, deviations, rng.standard_normal((_RESAMPLES, 1))

    def _place(self, compute: ArrayLike) -> Floats:
        return np.log(compute) - self._middle


def _factor(deviations: Floats) -> Floats:
    # With one run to spare a draw can be thousands of times too large: no loss is that far off.
    return np.exp(np.clip(deviations, -2.0, 2.0))


def _fit(place: Floats, losses: Floats) -> Floats:
    """The floor, scale and exponent [R, 3] of floor + scale exp(-exponent place) for losses [R, n].

    For one exponent the best floor and scale, neither below 0, are a linear problem; so only the
    exponent is searched, over its whole range and then ever closer: no start to choose.
    """
    rows = np.arange(len(losses))
    low, high = (np.full(len(losses), np.log(bound)) for bound in _EXPONENTS)
    for _ in range(_ROUNDS):
        tried = np.linspace(low, high, _TRIED, axis=1)
        floor, scale, error = _floor_and_scale(np.exp(tried), place, losses)
        best = error.argmin(1)
        low = tried[rows, np.maximum(best - 1, 0)]
        high = tried[rows, np.minimum(best + 1, _TRIED - 1)]
    return np.stack([floor[rows, best], scale[rows, best], np.exp(tried[rows, best])], 1)


@np.errstate(all="ignore")  # computes that are nearly one: their exponents fit worst of all
def _floor_and_scale(
    exponents: Floats, place: Floats, losses: Floats
) -> tuple[Floats, Floats, Floats]:
    """The best floor and scale for exponents [R, G], and the sum of squared relative errors."""
    one = 1 / losses[:, None]  # relative errors: the target is 1 everywhere
    power = np.exp(-exponents[..., None] * place) * one
    power2, both, one2 = (power**2).sum(-1), (power * one).sum(-1), (one**2).sum(-1)
    power1, one1 = power.sum(-1), one.sum(-1)
    determinant = power2 * one2 - both**2
    floor = (one1 * power2 - power1 * both) / determinant
    scale = (power1 * one2 - one1 * both) / determinant
    scale = np.where(floor < 0, power1 / power2, scale)
    floor = np.where(floor < 0, 0.0, floor)
    floor = np.where(scale < 0, one1 / one2, floor)
    scale = np.maximum(scale, 0.0)
    residual = floor[..., None] * one + scale[..., None] * power - 1
    return floor, scale, np.nan_to_num((residual**2).sum(-1), nan=np.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The largest run as the smaller ones predict it: what the law is worth, in hindsight."""

    predicted: Prediction
    measured: float
    """Its loss; the mean, where several runs share the largest compute."""

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted.loss / self.measured - 1


def hold_out_largest(compute: ArrayLike, loss: ArrayLike) -> HeldOut | None:
    """Predict the run with the largest compute from the others; None where they are too few."""
    compute, loss = np.asarray(compute, np.float64), np.asarray(loss, np.float64)
    smaller = compute < compute.max()
    try:
        fitted = FittedLaw(compute[smaller], loss[smaller])
    except DriveSimError:
        return None
    predicted = fitted.predict(float(compute.max()))
    return HeldOut(predicted=predicted, measured=float(loss[~smaller].mean()))
