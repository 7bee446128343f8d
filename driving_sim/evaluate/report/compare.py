"""Compare two reports that were measured under the same protocol."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.evaluate.report.cell import Cell, cell_texts
from driving_sim.evaluate.report.page import write_page
from driving_sim.evaluate.report.report import Metric, Report, cell_of, is_curve, leaves
from driving_sim.evaluate.report.section import Media, Section, Table, plot

_DIFFERENCES_SHOWN = 3
_COLUMNS = ("", "A", "B", "B − A")
_HOW_TO_READ = """Each row shows a metric of both reports, and B minus A. The reports explain each
metric and say whether a higher or a lower value is better. The difference has no interval of its
own. If it is small compared with the intervals of A and B, it may be chance. The plots show metrics
that are lists, such as one value for each frame of a rollout. A is the solid line, B the dashed
line."""

Pairs = dict[str, tuple[Metric, Metric]]
"""Value of each metric in reports A and B, by the metric's path (`quality.psnr_db.model`).

The value is None if a report does not have the metric.
"""


def compare_reports(a: Path, b: Path, out: Path) -> str:
    """Write an HTML page, `out`, that shows the metrics of reports A and B side by side.

    Returns the key figures as text for a terminal. If the two models have different tokenizers,
    metrics that depend on the tokens are left out, and the page and the text list them. Raises
    `DriveSimError` if the reports were not measured under the same protocol, or if `out` exists.
    """
    if out.suffix != ".html":
        raise DriveSimError(
            f"`out` {out}: not the name of an HTML file; choose a name that ends in .html"
        )
    if out.exists():
        raise DriveSimError(f"{out}: exists already; choose another `out`, or delete it")
    reports = Report.load(a), Report.load(b)
    _refuse_different(*reports)
    pairs, left_out = _pairs(*reports)
    notes = ["A and B were measured under the same protocol."]
    if left_out:
        notes.append(
            "Their tokenizers differ, so metrics that depend on the tokens are not compared: "
            f"{', '.join(left_out)}."
        )
    headline = reports[0].metrics.get("headline", {})
    cells_a, cells_b = ({place: pair[side] for place, pair in pairs.items()} for side in (0, 1))
    figures = {
        label: (cell_of(cells_a, place), cell_of(cells_b, place))
        for label, place in headline.items()
        if place in pairs
    }
    caption = "The brackets show the 95 % interval of each value. The difference has no interval"
    parts = (Table(caption, _COLUMNS, _rows(figures)),) if figures else ()
    text = "\n\n".join([*notes, _HOW_TO_READ])
    sections = [Section("key-figures", "Key figures", text, {}, parts)]
    by_section: dict[str, Pairs] = {}
    for place, pair in pairs.items():
        name, _, below = place.partition(".")
        by_section.setdefault(name, {})[below] = pair
    with atomic_file(out) as temporary:
        write_page(
            temporary,
            title="Two reports compared",
            description=dict(zip("AB", map(_described, reports), strict=True)),
            sections=[
                *sections,
                *(_section(name, metrics) for name, metrics in by_section.items()),
            ],
            protocol=reports[0].protocol,
        )
    return "\n".join([f"A: {a}", f"B: {b}", *notes, *(["", _text(figures)] if figures else [])])


def _refuse_different(a: Report, b: Report) -> None:
    """Raise `DriveSimError` if two reports were measured under different protocols."""
    if a.protocol.kind_named != b.protocol.kind_named:
        raise DriveSimError(
            f"{a.path} is {a.protocol.kind_named} and {b.path} is {b.protocol.kind_named}; "
            "compare two reports of the same kind"
        )
    differences = a.protocol.differences(b.protocol)
    if differences:
        more = len(differences) - _DIFFERENCES_SHOWN
        raise DriveSimError(
            f"{a.path} and {b.path} were measured differently and cannot be compared: "
            + "; ".join(differences[:_DIFFERENCES_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
            + "; evaluate both with the same settings"
        )


def _described(report: Report) -> str:
    """Return the report's path and the facts about its model, as one line."""
    model = (f"{name} {value}" for name, value in report.metrics["model"].items())
    return "; ".join([str(report.path), *model])


def _pairs(a: Report, b: Report) -> tuple[Pairs, list[str]]:
    """Return the metrics to compare, and the paths of the metrics that are left out.

    Metrics that depend on the tokens are left out if the tokenizers differ.
    """
    tokenizer_a, tokenizer_b = (
        report.metrics["model"].get("tokenizer_fingerprint") for report in (a, b)
    )
    left_out: dict[str, None] | None = None if tokenizer_a == tokenizer_b else {}
    in_a, in_b = (dict(leaves(report.sections, left_out)) for report in (a, b))
    pairs = {place: (in_a.get(place), in_b.get(place)) for place in in_a | in_b}
    return pairs, list(left_out or ())


def _section(name: str, pairs: Pairs) -> Section:
    curves = {place: pair for place, pair in pairs.items() if any(map(is_curve, pair))}
    numbers = {place: pair for place, pair in pairs.items() if place not in curves}
    table = [Table("All numbers of this section", _COLUMNS, _rows(numbers))] if numbers else []
    drawn = [_draw(place, pair) for place, pair in curves.items()]
    return Section(name, name.replace("_", " ").capitalize(), "", {}, (*table, *drawn))


def _text(pairs: Pairs) -> str:
    """Return a table of metrics as text with aligned columns, for a terminal."""
    rows = [_COLUMNS, *_rows(pairs)]
    label_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([label.ljust(label_width), *map(str.rjust, texts, widths)]).rstrip()
        for label, *texts in rows
    )


def _rows(pairs: Pairs) -> list[tuple[str, ...]]:
    """Return a row of texts for each metric: its path or label, A, B and their difference."""
    rows = []
    for label, pair in pairs.items():
        cells = [None if isinstance(value, list) else value for value in pair]
        a, b = map(_middle, cells)
        difference = None if a is None or b is None else b - a
        (text,) = cell_texts([difference])
        sign = "+" if difference is not None and difference > 0 else ""
        rows.append((label, *cell_texts(cells), sign + text))
    return rows


def _middle(value: Cell) -> float | None:
    """Return a number, or the mean of an estimate. Return None for texts and booleans."""
    if isinstance(value, Mapping):
        return value["mean"]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw(place: str, pair: tuple[Metric, Metric]) -> Media:
    """Plot the curves of A and B for one metric.

    B is dashed, so that A shows through where the two are equal.
    """
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, style, curve in zip("AB", ("-", "--"), pair, strict=True):
        if is_curve(curve):
            axes.plot(np.arange(len(curve)), np.array(curve, float), style, label=name)
    axes.set_xlabel("position in the list")
    axes.legend(frameon=False)
    return plot(figure, place)
