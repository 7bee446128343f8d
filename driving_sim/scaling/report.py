"""Fit a scaling law to training runs, test it on the largest run, and write a report."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from driving_sim.engine.config import save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.engine.parsing import one_line
from driving_sim.engine.run_folder import check_replaceable
from driving_sim.scaling.law import FittedLaw, HeldOut, Prediction, hold_out_largest
from driving_sim.scaling.picture import draw_scaling
from driving_sim.scaling.run import ScalingRun, read_run, training_flops

REPORT, PICTURE = "scaling.json", "scaling.png"
_FORM = "bits per token = c + (C / a)^b, C = 6 N D"
_FAR = 100
"""Add a note if a prediction's compute is more than this many times that of the largest run."""
_NOTEWORTHY = 0.2
"""Add a note if the `ScalingRun.attention_share` of a run is above this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingReport:
    """A scaling law with its runs and predictions. `str(report)` is a table and a few lines."""

    runs: tuple[ScalingRun, ...]
    """Runs that the law was fitted to, sorted by compute."""
    fitted: FittedLaw
    """Law that was fitted to all runs."""
    held_out: HeldOut | None
    """Test of the law on the largest run, or None if no law fits the smaller runs alone."""
    prediction: Prediction
    """Predicted bits per token at the requested compute."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `scaling.json`."""
        held_out = self.held_out
        return {
            "form": _FORM,
            **asdict(self.fitted.law),
            "relative_deviation": self.fitted.spread if self.fitted.freedom else None,
            "runs": [
                {
                    "run": run.path.name,
                    "parameters": run.parameters,
                    "all_parameters": run.all_parameters,
                    "tokens": run.tokens,
                    "compute": run.compute,
                    "bits_per_token": run.bits,
                    "fitted": float(self.fitted.law(run.compute)),
                    "attention_share": run.attention_share,
                }
                for run in self.runs
            ],
            "held_out": held_out and asdict(held_out) | {"relative_error": held_out.error},
            "prediction": asdict(self.prediction),
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Return the reasons to doubt the law or the prediction, one line for each."""
        early = [run.path.name for run in self.runs if run.best_step < 0.9 * run.steps]
        shares = [run.attention_share for run in self.runs]
        beyond = self.prediction.compute / self.runs[-1].compute
        notes = [
            (
                bool(early),
                f"these runs were best long before their end: {', '.join(early)}; they probably "
                "ran out of data, so more compute helps less than the law predicts",
            ),
            (
                max(shares) > _NOTEWORTHY,
                "6 N D does not count the products of queries, keys and values, which add "
                f"{min(shares):.0%} to {max(shares):.0%} to the compute of these runs",
            ),
            (
                not self.fitted.freedom,
                "the law fits three runs exactly, so its error is unknown; add a fourth run",
            ),
            (
                self.fitted.at_edge,
                f"the exponent {self.fitted.law.b:.2g} is at the edge of the searched range: the "
                "runs do not follow a law of this form, or there are too few of them",
            ),
            (
                self.fitted.law.c == 0,
                "the fit finds no irreducible loss (c = 0) because the runs do not level off yet, "
                "so predictions far beyond them are too low",
            ),
            (
                beyond > _FAR,
                f"the prediction is for {beyond:,.0f} times the compute of the largest run, and "
                "its interval does not allow for a change of the law at such a scale",
            ),
        ]
        return [note for applies, note in notes if applies]

    def __str__(self) -> str:
        law = self.fitted.law
        lines = [
            f"{'run':<20}{'N':>12}{'D, tokens':>12}{'6 N D':>12}{'bits':>10}{'fitted':>10}",
            *(
                f"{run.path.name:<20}{run.parameters:>12.3g}{run.tokens:>12.3g}{run.compute:>12.3g}"
                f"{run.bits:>10.4f}{float(law(run.compute)):>10.4f}"
                for run in self.runs
            ),
            f"bits per token = {law.c:.4g} + (C / {law.a:.4g})^{law.b:.4g}",
        ]
        if self.held_out:
            lines.append(
                f"{self.runs[-1].path.name}, predicted from the smaller runs: "
                f"{self.held_out.predicted}; measured: {self.held_out.measured:.4f}; "
                f"error: {self.held_out.error:+.2%}"
            )
        lines.append(f"at {self.prediction.compute:.3g} operations: {self.prediction}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes())])


def scale(paths: Sequence[Path], out: Path, *, compute: float | None = None) -> ScalingReport:
    """Fit a law to finished world-model runs and predict the bits per token at `compute`.

    By default, `compute` is 10 times the compute of the largest run. Writes `scaling.json` and
    `scaling.png` to the folder `out`, and replaces an earlier scaling law in it. Raises
    DriveSimError if the runs are unfinished, not comparable or too few, or if `out` contains other
    files.
    """
    check_replaceable(
        out,
        REPORT,
        "a scaling law",
        lambda earlier: (REPORT, PICTURE) if earlier.get("form") == _FORM else (),
    )
    report = fit_runs([read_run(path) for path in paths], compute)
    with atomic_folder(out) as folder:
        save_json(folder / REPORT, report.to_dict())
        draw_scaling(folder / PICTURE, report.fitted, report.held_out, report.prediction)
    return report


def fit_runs(runs: Sequence[ScalingRun], compute: float | None = None) -> ScalingReport:
    """Fit a law to runs and predict the bits per token at `compute`.

    A run that is given twice counts once. Raises DriveSimError if the runs are too few or not
    comparable.
    """
    different = {run.path.resolve(): run for run in runs}.values()
    ordered = tuple(sorted(different, key=lambda run: run.compute))
    for run in ordered[1:]:
        for name, value in ordered[0].conditions.items():
            if run.conditions[name] != value:
                values = one_line(f"{run.conditions[name]:.80} and {value:.80}")
                raise DriveSimError(
                    f"{run.path}: {name} differs from that of {ordered[0].path} ({values}), so the "
                    "runs cannot be compared; leave one of them out"
                )
    computes, bits = [run.compute for run in ordered], [run.bits for run in ordered]
    fitted = FittedLaw(computes, bits)
    return ScalingReport(
        runs=ordered,
        fitted=fitted,
        held_out=hold_out_largest(computes, bits),
        prediction=fitted.predict(compute or 10 * computes[-1]),
    )


def target_compute(
    compute: float | None, parameters: float | None, tokens: float | None
) -> float | None:
    """Return the training compute in operations: `compute`, or 6 * `parameters` * `tokens`.

    Returns None if all three are None. Raises DriveSimError if a value is not above 0, if only one
    of `parameters` and `tokens` is given, or if they are given together with `compute`.
    """
    options = {"compute": compute, "parameters": parameters, "tokens": tokens}
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise DriveSimError(f"`{name}` {value:g}: give a finite number above 0")
    if parameters is None and tokens is None:
        return compute
    if parameters is None or tokens is None or compute is not None:
        raise DriveSimError("give either `compute` or both `parameters` and `tokens`")
    return training_flops(parameters, tokens)
