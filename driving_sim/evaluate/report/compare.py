"""Two reports side by side, where they measured the same thing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np
from matplotlib.figure import Figure

from driving_sim.engine.config import load_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.evaluate.report.page import (
    METRICS,
    NOT_SECTIONS,
    PROTOCOL,
    cell_texts,
    is_estimate,
    render,
    write_page,
)
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.section import Cell, Media, Section, Table, plot

_PER_TOKENIZER = "per_tokenizer"
_ESTIMATE = ("mean", "low", "high")
_DIFFERENCES_SHOWN = 3
_COLUMNS = ("A", "B", "B − A")

Metric = Cell | list[float | None]
Pairs = dict[str, tuple[Metric, Metric]]


def compare_reports(a: Path, b: Path, out: Path) -> str:
    """Write a page, `out` (.html), with the metrics of reports A and B side by side, curves drawn.

    Returns the key figures as text for a terminal. What counts the tokens of different tokenizers
    is left out, and it is said. Raises `DriveSimError` where the two were not measured under one
    protocol, or `out` exists.
    """
    if out.suffix != ".html":
        raise DriveSimError(f"--out {out}: a comparison is an .html file; name it so")
    if out.exists():
        raise DriveSimError(f"{out} exists already: choose another --out or remove it")
    comparison = Comparison(a=Report.load(a), b=Report.load(b))
    with atomic_file(out) as temporary:
        write_page(temporary, comparison.page())
    return comparison.text()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A report that was written before."""

    path: Path
    metrics: Mapping[str, Any]
    protocol: Protocol

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report's folder; `DriveSimError` where its files do not belong together."""
        protocol, metrics = Protocol.load(path / PROTOCOL), load_json(path / METRICS)
        if metrics.get("protocol") != protocol.hash or not isinstance(metrics.get("model"), dict):
            raise DriveSimError(
                f"{path}: {METRICS} and {PROTOCOL} are not of one measurement; evaluate again"
            )
        return cls(path=path, metrics=metrics, protocol=protocol)

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer whose tokens a world model predicts."""
        found: str | None = self.metrics["model"].get("tokenizer_fingerprint")
        return found

    @property
    def sections(self) -> dict[str, Any]:
        """Metrics by section."""
        return {key: item for key, item in self.metrics.items() if key not in NOT_SECTIONS}

    @property
    def described(self) -> str:
        """Where it is, and of what model."""
        model = (f"{name} {value}" for name, value in self.metrics["model"].items())
        return "; ".join([str(self.path), *model])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two reports of one protocol; `DriveSimError` where they are not."""

    a: Report
    b: Report

    def __post_init__(self) -> None:
        a, b = self.a, self.b
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

    @cached_property
    def left_out(self) -> list[str]:
        """Places of the metrics that have no meaning beside another tokenizer's."""
        if self.a.tokenizer == self.b.tokenizer:
            return []
        places = (*_counts_tokens(self.a.sections), *_counts_tokens(self.b.sections))
        return list(dict.fromkeys(places))

    @cached_property
    def pairs(self) -> Pairs:
        """What can be compared, by its place, `section.name`; None is what one of them lacks."""
        a, b = (dict(_leaves(report.sections, self.left_out)) for report in (self.a, self.b))
        return {place: (a.get(place), b.get(place)) for place in {**a, **b}}

    @property
    def headline(self) -> Pairs:
        """The key figures, by their labels."""
        headline = self.a.metrics.get("headline", {})
        return {
            label: self.pairs[place] for label, place in headline.items() if place in self.pairs
        }

    @property
    def notes(self) -> list[str]:
        """What to know before reading the numbers."""
        notes = ["A and B were measured under the same protocol."]
        if self.left_out:
            notes.append(
                "Their tokenizers differ, so what counts tokens is not compared: "
                f"{', '.join(self.left_out)}."
            )
        return notes

    def text(self) -> str:
        """Key figures for a terminal."""
        rows = [("", *_COLUMNS), *_rows(self.headline)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        paths = [f"A: {self.a.path}", f"B: {self.b.path}"]
        return "\n".join([*paths, *self.notes, *(["", *lines] if self.headline else [])])

    def page(self) -> str:
        """HTML with a section for each section of the reports."""
        names = dict.fromkeys(place.partition(".")[0] for place in self.pairs)
        return render(
            title="Two reports compared",
            description={"A": self.a.described, "B": self.b.described},
            sections=[self._key_figures(), *map(self._section, names)],
            protocol=self.a.protocol,
        )

    def _key_figures(self) -> Section:
        table = _table("Key figures", self.headline)
        return Section(
            name="key-figures",
            title="Key figures",
            text="\n\n".join(self.notes),
            metrics={},
            parts=(table,) if self.headline else (),
        )

    def _section(self, name: str) -> Section:
        pairs = {
            place.partition(".")[2]: pair
            for place, pair in self.pairs.items()
            if place.partition(".")[0] == name
        }
        curves = {place: pair for place, pair in pairs.items() if any(map(_is_curve, pair))}
        numbers = {place: pair for place, pair in pairs.items() if place not in curves}
        tables = [_table("Every number", numbers)] if numbers else []
        plots = [_draw(place, pair) for place, pair in curves.items()]
        return Section(
            name=name,
            title=name.replace("_", " ").capitalize(),
            text="",
            metrics={},
            parts=(*tables, *plots),
        )


def _leaves(value: Any, left_out: list[str], place: str = "") -> Iterator[tuple[str, Metric]]:
    """Numbers, estimates and curves below a mapping."""
    if place in left_out:
        return
    if _is_curve(value) or value is None or isinstance(value, int | float):
        yield place, value
    elif isinstance(value, Mapping):
        names = value.keys() - {_PER_TOKENIZER}
        if is_estimate(value):
            yield place, {name: value[name] for name in _ESTIMATE}
            names -= set(_ESTIMATE)
        for name in (name for name in value if name in names):
            yield from _leaves(value[name], left_out, f"{place}.{name}" if place else name)


def _counts_tokens(value: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for name, item in value.items():
        below = f"{place}.{name}" if place else name
        if isinstance(item, Mapping):
            if item.get(_PER_TOKENIZER) is True:
                yield below
            else:
                yield from _counts_tokens(item, below)


def _is_curve(value: object) -> TypeGuard[list[float | None]]:
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(item is None or isinstance(item, int | float) for item in value)


def _rows(pairs: Pairs) -> list[tuple[str, ...]]:
    """Label, A, B and their difference, as text."""
    cells = {
        label: [None if isinstance(value, list) else value for value in pair]
        for label, pair in pairs.items()
    }
    return [
        (label, *cell_texts([a, b]), _difference(_middle(a), _middle(b)))
        for label, (a, b) in cells.items()
    ]


def _middle(value: Cell) -> float | None:
    if isinstance(value, Mapping):
        return value["mean"]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _difference(a: float | None, b: float | None) -> str:
    difference = None if a is None or b is None else b - a
    (text,) = cell_texts([difference])
    return f"+{text}" if difference is not None and difference > 0 else text


def _table(caption: str, pairs: Pairs) -> Table:
    return Table(caption=caption, columns=("", *_COLUMNS), rows=tuple(_rows(pairs)))


def _draw(place: str, pair: tuple[Metric, Metric]) -> Media:
    """Overlay the curves of one place; B is dashed: where they agree, both are to be seen."""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, style, curve in zip("AB", ("-", "--"), pair, strict=True):
        if _is_curve(curve):
            axes.plot(np.arange(len(curve)), np.array(curve, float), style, label=name)
    axes.set_xlabel("index")
    axes.legend(frameon=False)
    return plot(figure, place)
