"""Write the page of a report, one HTML file that also contains its plots, pictures and videos."""

import base64
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from driving_sim.evaluate.report.cell import NOT_MEASURED, Cell, cell_texts
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.section import Media, Section, Table

_NUMERIC = re.compile(rf"[-+]?[\d,]+(\.\d+)?(e[-+]\d+)?( \[.*\])?|{NOT_MEASURED}|yes|no")

Tile = tuple[str, Cell, Mapping[str, Cell]]
"""A key figure: its label, its value, and reference values by their labels."""


def write_page(
    path: Path,
    *,
    title: str,
    description: Mapping[str, Cell],
    headline: Sequence[Tile] = (),
    sections: Sequence[Section],
    protocol: Protocol,
    seconds: float | None = None,
) -> None:
    """Write the page to `path`.

    HTML in texts is escaped. Bytes of a file name that are not UTF-8 are written as backslash
    escapes.
    """
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    filters: dict[str, Callable[..., Any]] = {
        "base64": lambda data: base64.b64encode(data).decode(),
        "cells": _cells,
        "paragraphs": lambda text: [part for part in re.split(r"\n\s*\n", text.strip()) if part],
        "runs": lambda parts: [
            (kind is Media, list(run)) for kind, run in groupby(parts, key=type)
        ],
    }
    environment.filters |= filters
    template = importlib.resources.files(__package__).joinpath("report.html").read_text("utf-8")
    page = environment.from_string(template).render(
        title=title,
        about=[(name, cell_texts([cell])[0]) for name, cell in description.items()],
        headline=[_tile(*tile) for tile in headline],
        sections=sections,
        protocol=protocol,
        duration=None if seconds is None else _duration(seconds),
        content=json.dumps(protocol.content, indent=2, ensure_ascii=False),
    )
    path.write_text(page, "utf-8", errors="backslashreplace")


def _tile(label: str, cell: Cell, beside: Mapping[str, Cell]) -> tuple[str, str, dict[str, str]]:
    value, *references = map(_typeset, cell_texts([cell, *beside.values()]))
    return label, value, dict(zip(beside, references, strict=True))


def _cells(table: Table) -> list[list[tuple[str, bool]]]:
    """Return the headings and the rows of a table.

    A cell is a pair: its text, and whether its column is numeric.
    """
    columns = [cell_texts([row[i] for row in table.rows]) for i in range(len(table.columns))]
    numeric = [all(map(_NUMERIC.fullmatch, column)) for column in columns]
    typeset = [
        list(map(_typeset, column)) if is_number else column
        for column, is_number in zip(columns, numeric, strict=True)
    ]
    rows = (table.columns, *zip(*typeset, strict=True))
    return [list(zip(row, numeric, strict=True)) for row in rows]


def _typeset(number: str) -> str:
    """Replace hyphens with minus signs, which are as wide as a digit."""
    return number.replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.2g} s"
