"""The report of an evaluation: a page for people, numbers for machines, and the protocol of both.

REPORT/report.html      self-contained: plots, pictures and videos are inside; asks for no file
REPORT/metrics.json     every section's metrics; null is what could not be measured
REPORT/protocol.json    what was measured, and its hash
"""

import base64
import importlib.resources
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from driving_sim.engine.config import save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.section import Cell, Media, Section, Table

PAGE, METRICS, PROTOCOL = "report.html", "metrics.json", "protocol.json"
NOT_SECTIONS = frozenset(("protocol", "model", "seconds", "headline"))
"""What `metrics.json` holds beside the sections' metrics."""

_NOT_MEASURED = "–"
_DIGITS = 4
_SIMILAR = 30
"""Numbers whose sizes differ less than this many times are shown with the same decimals."""
_MOST_DECIMALS = 6
_NUMERIC = re.compile(rf"[-+]?[\d,]+(\.\d+)?(e[-+]\d+)?( \[.*\])?|{_NOT_MEASURED}|yes|no")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFigure:
    """A metric that stands at a report's head, and what to read it beside: floors, baselines."""

    label: str
    """With its unit."""
    metric: str
    """Its place below the sections, `likelihood.bits_per_token`: a number or a mean with its
    interval."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Label to place."""


def refuse_existing(out: Path) -> None:
    """Raise `DriveSimError` unless a report may be written to `out`; call it before measuring."""
    if (out / METRICS).is_file():
        raise DriveSimError(f"{out} already holds a report: choose another --out or remove it")
    if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise DriveSimError(f"{out} exists and is not a report: choose another --out")


def write_report(
    out: Path,
    *,
    title: str,
    description: Mapping[str, Cell],
    sections: Sequence[Section],
    protocol: Protocol,
    model: Mapping[str, Any],
    seconds: float,
    headline: Sequence[KeyFigure] = (),
    attachments: Mapping[str, bytes] | None = None,
) -> dict[str, str]:
    """Write the folder, whole or not at all, and return the key figures as text by their labels.

    `description` stands under the title: which model, which data. `model` is what was measured,
    for `metrics.json`: its path and fingerprints; a world model's `tokenizer_fingerprint` decides
    which metrics compare. A mapping of metrics with `"per_tokenizer": True` in it counts tokens
    and has no meaning beside another tokenizer's. A key figure that is not among the metrics is
    left out. `attachments` are further files by their names.
    """
    refuse_existing(out)
    _check_names([section.name for section in sections])
    measured = {section.name: _json(section.metrics) for section in sections}
    headline = [figure for figure in headline if _at(measured, figure.metric)]
    metrics = {
        "protocol": protocol.hash,
        "model": _json(model),
        "seconds": seconds,
        "headline": {figure.label: figure.metric for figure in headline},
        **measured,
    }
    page = render(
        title=title,
        description=description,
        headline=_headline(headline, measured),
        sections=sections,
        protocol=protocol,
        seconds=seconds,
    )
    with atomic_folder(out) as folder:
        protocol.save(folder / PROTOCOL)
        save_json(folder / METRICS, metrics)
        write_page(folder / PAGE, page)
        for name, content in (attachments or {}).items():
            (folder / name).write_bytes(content)
    return {figure.label: cell_texts(_at(measured, figure.metric))[0] for figure in headline}


def render(
    *,
    title: str,
    description: Mapping[str, Cell],
    headline: str = "",
    sections: Sequence[Section],
    protocol: Protocol,
    seconds: float | None = None,
) -> str:
    """Return the page; everything but `headline`, which is HTML, is text that gets escaped."""
    template = importlib.resources.files(__package__).joinpath(PAGE).read_text("utf-8")
    links = (
        f'<li><a href="#{escape(section.name)}">{escape(section.title)}</a></li>'
        for section in sections
    )
    return Template(template).substitute(
        title=escape(title),
        about="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(cell_texts([cell])[0])}</dd>"
            for name, cell in description.items()
        ),
        headline=headline,
        contents="\n".join(links),
        sections="\n".join(map(_section, sections)),
        hash=protocol.hash,
        seconds="" if seconds is None else f"Measured in {_duration(seconds)}.",
        protocol=escape(json.dumps(protocol.content, indent=2, ensure_ascii=False)),
    )


def _check_names(names: Sequence[str]) -> None:
    taken = set(NOT_SECTIONS)
    for name in names:
        if name in taken or not name.isidentifier():
            raise ValueError(f"section {name!r}: expected an identifier not used yet")
        taken.add(name)


def write_page(path: Path, page: str) -> None:
    """Write a page; a file name that is not UTF-8 is shown with escapes."""
    path.write_text(page, "utf-8", errors="backslashreplace")


def is_estimate(value: object) -> bool:
    """Whether a metric is a mean with its interval."""
    return isinstance(value, Mapping) and value.keys() >= {"mean", "low", "high"}


def cell_texts(cells: Sequence[Cell]) -> list[str]:
    """Return what is shown for cells that are read together: numbers with four digits."""
    decimals = _common_decimals([cell for cell in cells if isinstance(cell, float) and cell])
    return [_cell_text(cell, decimals) for cell in cells]


def _cell_text(cell: Cell, decimals: int | None) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Mapping):
        return _estimate_text(cell)
    if cell is None or not math.isfinite(cell):
        return _NOT_MEASURED
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int) or abs(cell) >= 10 ** (_DIGITS - 1):
        return f"{cell:,.0f}"
    return f"{cell:.{_DIGITS}g}" if decimals is None else f"{cell:,.{decimals}f}"


def _common_decimals(values: Sequence[float]) -> int | None:
    """Decimals that show the largest with four digits; None where the sizes differ much."""
    sizes = [abs(value) for value in values if math.isfinite(value)]
    if not sizes or max(sizes) >= _SIMILAR * min(sizes):
        return None
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(max(sizes))))
    # A setting of 0.5 is no 0.5000.
    while decimals and all(round(x, decimals - 1) == round(x, decimals) for x in sizes):
        decimals -= 1
    return decimals if decimals <= _MOST_DECIMALS else None


def _estimate_text(estimate: Mapping[str, float | None]) -> str:
    """`mean [low, high]`, with the digits that the interval's width supports; alone without one."""
    values = [estimate[name] for name in ("mean", "low", "high")]
    if values[1] is None and values[2] is None:
        return _cell_text(values[0], None)
    known = [value for value in values if value is not None and math.isfinite(value)]
    width = max(known) - min(known) if len(known) == len(values) else 0
    if width > 10**-_MOST_DECIMALS:
        decimals = max(0, 1 - math.floor(math.log10(width)))
        mean, low, high = (f"{value:,.{decimals}f}" for value in known)
    else:
        mean, low, high = (_cell_text(value, None) for value in values)
    return f"{mean} [{low}, {high}]"


def _headline(figures: Sequence[KeyFigure], metrics: Mapping[str, Any]) -> str:
    tiles = []
    for figure in figures:
        found = {label: _at(metrics, place) for label, place in figure.beside.items()}
        beside = {label: cells[0] for label, cells in found.items() if cells}
        value, *others = map(_typeset, cell_texts([*_at(metrics, figure.metric), *beside.values()]))
        tiles.append(f'<div><dt>{escape(figure.label)}</dt><dd class="value">{value}</dd>')
        tiles += (
            f'<dd class="beside">{escape(label)} {other}</dd>'
            for label, other in zip(beside, others, strict=True)
        )
        tiles.append("</div>")
    return "\n".join(['<dl class="headline">', *tiles, "</dl>"]) if tiles else ""


def _at(metrics: Mapping[str, Any], place: str) -> list[Cell]:
    """The number or the estimate at `section.name`, if there is one."""
    value: Any = metrics
    for name in place.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return []
        value = value[name]
    if isinstance(value, list) or (isinstance(value, Mapping) and not is_estimate(value)):
        raise ValueError(f"headline: {place} is not one number")
    return [value]


def _section(section: Section) -> str:
    paragraphs = [part for part in re.split(r"\n\s*\n", section.text.strip()) if part]
    body = [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]
    for kind, parts in itertools.groupby(section.parts, type):
        if kind is Table:
            body += (_table(part) for part in parts if isinstance(part, Table))
        else:
            figures = (_figure(part) for part in parts if isinstance(part, Media))
            body += ['<div class="gallery">', *figures, "</div>"]
    title = f'<h2 id="{escape(section.name)}">{escape(section.title)}</h2>'
    return "\n".join(["<section>", title, *body, "</section>"])


def _table(table: Table) -> str:
    columns = [cell_texts([row[i] for row in table.rows]) for i in range(len(table.columns))]
    numeric = [all(map(_NUMERIC.fullmatch, column)) for column in columns]
    head = "".join(map(_heading, table.columns, numeric))
    rows = (
        "<tr>" + "".join(map(_data, row, numeric)) + "</tr>" for row in zip(*columns, strict=True)
    )
    return "\n".join(
        [
            f'<figure class="table"><figcaption>{escape(table.caption)}</figcaption>',
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>',
            "<tbody>",
            *rows,
            "</tbody></table></div></figure>",
        ]
    )


def _heading(text: str, numeric: bool) -> str:
    return f'<th scope="col"{_align(numeric)}>{escape(text)}</th>'


def _data(text: str, numeric: bool) -> str:
    return f"<td{_align(numeric)}>{_typeset(text) if numeric else escape(text)}</td>"


def _align(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _typeset(number: str) -> str:
    """A minus sign is as wide as a digit; a hyphen is not."""
    return escape(number.replace("-", "−"))


def _figure(media: Media) -> str:
    source = f"data:{media.type};base64,{base64.b64encode(media.data).decode()}"
    caption = escape(media.caption)
    if media.type == "video/mp4":
        shown = f'<video controls loop muted playsinline src="{source}"></video>'
    else:
        shown = f'<img alt="{caption}" src="{source}">'
    kind = "plot" if media.type == "image/png" else "scene"
    return f'<figure class="{kind}">{shown}<figcaption>{caption}</figcaption></figure>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.2g} s"


def _json(value: Any) -> Any:
    """What JSON holds: its own numbers for NumPy's, null for NaN and infinities."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
