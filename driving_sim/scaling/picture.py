"""A plot of a scaling law: the runs, the fitted curve with its interval, and the predictions."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from driving_sim.engine.files import atomic_file
from driving_sim.scaling.law import FittedLaw, HeldOut, Prediction

_SIZE_INCHES = (8, 5.5)
_INK, _CURVE, _HELD_OUT = "#30343b", "#2a5db0", "#b4541a"


def draw_scaling(
    path: Path, fitted: FittedLaw, held_out: HeldOut | None, prediction: Prediction
) -> None:
    """Plot bits per token against compute on logarithmic axes, and write the plot as a PNG."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    _draw_curve(axes, fitted, 2 * max(fitted.compute.max(), prediction.compute))
    axes.plot(fitted.compute, fitted.loss, "o", color=_INK, label="runs", zorder=3)
    _draw_prediction(axes, prediction, "*", _CURVE, "prediction")
    if held_out:
        label = "largest run, predicted from the smaller runs"
        _draw_prediction(axes, held_out.predicted, "D", _HELD_OUT, label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Set the ticks: on a logarithmic axis, matplotlib labels only powers of ten, and an axis that
    # spans about one bit usually contains none of them.
    low, high = axes.get_ylim()
    ticks = np.unique(np.round(np.geomspace(max(low, 0.5 * fitted.law.c), high, 8), 2))
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training compute C = 6 N D, operations", color=_INK)
    axes.set_ylabel("validation bits per token", color=_INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _draw_curve(axes: Axes, fitted: FittedLaw, end: float) -> None:
    law, compute = fitted.law, np.geomspace(fitted.compute.min() / 2, end, 120)
    label = f"{law.c:.3g} + (C / {law.a:.3g})^{law.b:.3g}"
    axes.plot(compute, law(compute), color=_CURVE, linewidth=1.5, label=label)
    bounds = fitted.interval(compute)
    if bounds is not None:
        axes.fill_between(
            compute, *bounds, color=_CURVE, alpha=0.15, linewidth=0, label="95 % of runs"
        )
    if law.c > 0:
        axes.axhline(law.c, color=_INK, linewidth=0.8, linestyle=":", label="c")


def _draw_prediction(
    axes: Axes, prediction: Prediction, marker: str, colour: str, label: str
) -> None:
    low, high = prediction.low, prediction.high
    axes.errorbar(
        [prediction.compute],
        [prediction.loss],
        None
        if low is None or high is None
        else [[prediction.loss - low], [high - prediction.loss]],
        fmt=marker,
        color=colour,
        markerfacecolor="none",
        markersize=9,
        capsize=3,
        label=label,
        zorder=4,
    )
