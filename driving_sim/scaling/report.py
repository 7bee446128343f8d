"""A scaling law from the folders of small runs: fitted, tried on the largest, reported."""

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
_NOTEWORTHY = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingReport:
    """A law and what it was fitted to; its text is a table and a few lines."""

    runs: tuple[ScalingRun, ...]
    """The runs, by compute."""
    fitted: FittedLaw
    """The law."""
    held_out: HeldOut | None
    """The largest run as predicted by the others; None where they are too few."""
    prediction: Prediction
    """What was asked for; by default the bits at ten times the largest run's compute."""

    def to_dict(self) -> dict[str, Any]:
        """What `scaling.json` holds."""
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
        """What a reader must know before trusting the law."""
        early = [run.path.name for run in self.runs if run.best_step < 0.9 * run.steps]
        shares = [run.attention_share for run in self.runs]
        beyond = self.prediction.compute / self.runs[-1].compute
        notes = [
            (
                bool(early),
                f"best long before the end: {', '.join(early)}; with data that runs out, more "
                "compute stops helping and no such law holds",
            ),
            (
                max(shares) > _NOTEWORTHY,
                "6 N D leaves out attention's own products: in these runs "
                f"{min(shares):.0%} to {max(shares):.0%} on top",
            ),
            (
                not self.fitted.freedom,
                "three runs determine the law exactly: a fourth would say how well",
            ),
            (
                self.fitted.at_edge,
                f"the exponent {self.fitted.law.b:.2g} is the edge of what is tried: the runs do "
                "not fall as such a law does, or too few of them say how",
            ),
            (
                self.fitted.law.c == 0,
                "no loss that remains was found (c = 0): the runs do not bend towards one yet, so "
                "predictions far beyond them are too low",
            ),
            (
                beyond > _FAR,
                f"the prediction lies {beyond:,.0f} times beyond the largest run, and the "
                "interval knows only of noise, not of a law that bends",
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
                f"{self.runs[-1].path.name} as the smaller runs predict it: "
                f"{self.held_out.predicted}; measured {self.held_out.measured:.4f}, "
                f"an error of {self.held_out.error:+.2%}"
            )
        lines.append(f"at {self.prediction.compute:.3g} operations: {self.prediction}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes())])


def scale(paths: Sequence[Path], out: Path, *, compute: float | None = None) -> ScalingReport:
    """Fit a law to finished world-model runs and predict the bits per token at `compute`.

    Writes `scaling.json` and `scaling.png` into the folder `out`, in place of an earlier law there.
    Raises `DriveSimError` for runs that are unfinished, not comparable or too few, and where `out`
    holds anything else.
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
    """Fit a law to runs, each counted once; errors as for `scale`."""
    different = {run.path.resolve(): run for run in runs}.values()
    ordered = tuple(sorted(different, key=lambda run: run.compute))
    for run in ordered[1:]:
        for what, value in ordered[0].conditions.items():
            if run.conditions[what] != value:
                both = one_line(f"{run.conditions[what]:.80} and {value:.80}")
                raise DriveSimError(
                    f"{run.path} cannot be compared with {ordered[0].path}: {what} differs ({both})"
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
    """The compute that options ask for, in operations; `DriveSimError` where they do not fit."""
    given = {"compute": compute, "parameters": parameters, "tokens": tokens}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise DriveSimError(f"`{name}` {value:g}: must be a number above 0")
    if parameters is None and tokens is None:
        return compute
    if parameters is None or tokens is None or compute is not None:
        raise DriveSimError("give `compute`, or both `parameters` and `tokens`")
    return training_flops(parameters, tokens)
