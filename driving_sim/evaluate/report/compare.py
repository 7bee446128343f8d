"""Two reports side by side, where they measured the same thing."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.evaluate.report.cell import Cell, cell_texts
from driving_sim.evaluate.report.page import write_page
from driving_sim.evaluate.report.report import Metric, Report, is_curve, leaves
from driving_sim.evaluate.report.section import Media, Section, Table, plot

_DIFFERENCES_SHOWN = 3
_COLUMNS = ("", "A", "B", "B − A")

Pairs = dict[str, tuple[Metric, Metric]]
"""What two reports say, by its place, `section.name`; None is what one of them lacks."""


def compare_reports(a: Path, b: Path, out: Path) -> str:
    """Write a page, `out` (.html), with the metrics of reports A and B side by side, curves drawn.

    Returns the key figures as text for a terminal. What counts the tokens of different tokenizers
    is left out, and it is said. Raises `DriveSimError` where the two were not measured under one
    protocol, or `out` exists.
    """
    if out.suffix != ".html":
        raise DriveSimError(f"`out` {out}: a comparison is an .html file; name it so")
    if out.exists():
        raise DriveSimError(f"{out} exists already: choose another `out` or remove it")
    reports = Report.load(a), Report.load(b)
    _refuse_different(*reports)
    pairs, left_out = _pairs(*reports)
    notes = ["A and B were measured under the same protocol."]
    if left_out:
        notes.append(
            "Their tokenizers differ, so what counts tokens is not compared: "
            f"{', '.join(left_out)}."
        )
    headline = reports[0].metrics.get("headline", {})
    figures = {label: pairs[place] for label, place in headline.items() if place in pairs}
    parts = (Table("Key figures", _COLUMNS, _rows(figures)),) if figures else ()
    sections = [Section("key-figures", "Key figures", "\n\n".join(notes), {}, parts)]
    by_section: dict[str, Pairs] = {}
    for place, pair in pairs.items():
        name, _, below = place.partition(".")
        by_section.setdefault(name, {})[below] = pair
    with atomic_file(out) as temporary:
        write_page(
            temporary,
            title="Two reports compared",
            description=dict(zip("AB", map(_described, reports), strict=True)),
            sections=[*sections, *(_section(*each) for each in by_section.items())],
            protocol=reports[0].protocol,
        )
    return "\n".join([f"A: {a}", f"B: {b}", *notes, *(["", _text(figures)] if figures else [])])


def _refuse_different(a: Report, b: Report) -> None:
    """Raise `DriveSimError` where two reports are not of one protocol."""
    if a.protocol.kind_named != b.protocol.kind_named:
        raise DriveSimError(
            f"{a.path} is {a.protocol.kind_named} and {b.path} is {b.protocol.kind_named}: "
            "compare two of a kind"
        )
    differences = a.protocol.differences(b.protocol)
    if differences:
        more = len(differences) - _DIFFERENCES_SHOWN
        raise DriveSimError(
            f"{a.path} and {b.path} were measured differently and do not compare: "
            + "; ".join(differences[:_DIFFERENCES_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
            + "; evaluate both alike"
        )


def _described(report: Report) -> str:
    """Where a report is, and of what model."""
    model = (f"{name} {value}" for name, value in report.metrics["model"].items())
    return "; ".join([str(report.path), *model])


def _pairs(a: Report, b: Report) -> tuple[Pairs, list[str]]:
    """What compares, and the places of what has no meaning beside another tokenizer's."""
    one, other = (report.metrics["model"].get("tokenizer_fingerprint") for report in (a, b))
    left_out: dict[str, None] | None = None if one == other else {}
    in_a, in_b = (dict(leaves(report.sections, left_out)) for report in (a, b))
    pairs = {place: (in_a.get(place), in_b.get(place)) for place in in_a | in_b}
    return pairs, list(left_out or ())


def _section(name: str, pairs: Pairs) -> Section:
    curves = {place: pair for place, pair in pairs.items() if any(map(is_curve, pair))}
    numbers = {place: pair for place, pair in pairs.items() if place not in curves}
    table = [Table("Every number", _COLUMNS, _rows(numbers))] if numbers else []
    drawn = [_draw(place, pair) for place, pair in curves.items()]
    return Section(name, name.replace("_", " ").capitalize(), "", {}, (*table, *drawn))


def _text(pairs: Pairs) -> str:
    """The rows in columns, for a terminal."""
    rows = [_COLUMNS, *_rows(pairs)]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([label.ljust(first), *map(str.rjust, texts, others)]).rstrip()
        for label, *texts in rows
    )


def _rows(pairs: Pairs) -> list[tuple[str, ...]]:
    """Label, A, B and their difference, as text."""
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
    if isinstance(value, Mapping):
        return value["mean"]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw(place: str, pair: tuple[Metric, Metric]) -> Media:
    """Overlay the curves of one place; B is dashed: where they agree, both are to be seen."""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, style, curve in zip("AB", ("-", "--"), pair, strict=True):
        if is_curve(curve):
            axes.plot(np.arange(len(curve)), np.array(curve, float), style, label=name)
    axes.set_xlabel("index")
    axes.legend(frameon=False)
    return plot(figure, place)
