"""A report on disk: its page for people, its numbers for machines, and the protocol of both.

REPORT/report.html      self-contained: plots, pictures and videos are inside; asks for no file
REPORT/metrics.json     every section's metrics; null is what could not be measured
REPORT/protocol.json    what was measured, and its hash
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np

from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.evaluate.report.cell import Cell, cell_texts, is_estimate
from driving_sim.evaluate.report.page import Tile, write_page
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.section import Section

_PAGE, _METRICS, _PROTOCOL = "report.html", "metrics.json", "protocol.json"
_NOT_SECTIONS = frozenset(("protocol", "model", "seconds", "headline"))
"""What `metrics.json` holds beside the sections' metrics."""
_PER_TOKENIZER = "per_tokenizer"
_ESTIMATE = ("mean", "low", "high")

Metric = Cell | list[float | None]
"""A number, an estimate or a curve."""


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A metric that stands at a report's head, and what to read it beside: floors, baselines."""

    label: str
    """With its unit."""
    metric: str
    """Its place below the sections, `likelihood.bits_per_token`: a number or a mean with its
    interval."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Label to place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A report that was written before."""

    path: Path
    metrics: Mapping[str, Any]
    protocol: Protocol

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report's folder; `DriveSimError` where its files do not belong together."""
        protocol, metrics = Protocol.load(path / _PROTOCOL), load_json(path / _METRICS)
        if metrics.get("protocol") != protocol.hash or not isinstance(metrics.get("model"), dict):
            raise DriveSimError(
                f"{path}: {_METRICS} and {_PROTOCOL} are not of one measurement; evaluate again"
            )
        return cls(path=path, metrics=metrics, protocol=protocol)

    @property
    def sections(self) -> dict[str, Any]:
        """Metrics by section."""
        return {key: item for key, item in self.metrics.items() if key not in _NOT_SECTIONS}


def refuse_existing(out: Path) -> None:
    """Raise `DriveSimError` unless a report may be written to `out`; call it before measuring."""
    if (out / _METRICS).is_file():
        raise DriveSimError(f"{out} already holds a report: choose another `out` or remove it")
    if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise DriveSimError(f"{out} exists and is not a report: choose another `out`")


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
    measured = {section.name: _json(section.metrics) for section in sections}
    cells: dict[str, Any] = dict(leaves(measured))
    figures = [figure for figure in headline if figure.metric in cells]
    tiles: list[Tile] = []
    for figure in figures:
        beside = {name: cells[place] for name, place in figure.beside.items() if place in cells}
        tiles.append((figure.label, cells[figure.metric], beside))
    metrics = {
        "protocol": protocol.hash,
        "model": _json(model),
        "seconds": seconds,
        "headline": {figure.label: figure.metric for figure in figures},
        **measured,
    }
    with atomic_folder(out) as folder:
        protocol.save(folder / _PROTOCOL)
        save_json(folder / _METRICS, metrics)
        write_page(
            folder / _PAGE,
            title=title,
            description=description,
            headline=tiles,
            sections=sections,
            protocol=protocol,
            seconds=seconds,
        )
        for name, content in (attachments or {}).items():
            (folder / name).write_bytes(content)
    return {label: cell_texts([value])[0] for label, value, _ in tiles}


def leaves(
    value: Any, left_out: dict[str, None] | None = None, place: str = ""
) -> Iterator[tuple[str, Metric]]:
    """Numbers, estimates and curves below a mapping, by their places: `likelihood.accuracy.model`.

    What counts the tokens of one tokenizer is left out, and noted, where `left_out` is given.
    """
    if is_curve(value) or value is None or isinstance(value, int | float):
        yield place, value
    elif isinstance(value, Mapping):
        inner = dict(value)
        if inner.pop(_PER_TOKENIZER, False) is True and left_out is not None:
            left_out[place] = None
            return
        if is_estimate(inner):
            yield place, {name: inner.pop(name) for name in _ESTIMATE}
        for name, item in inner.items():
            yield from leaves(item, left_out, f"{place}.{name}" if place else name)


def is_curve(value: object) -> TypeGuard[list[float | None]]:
    """Whether a metric is a list of two or more numbers, None where there is none."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(item is None or isinstance(item, int | float) for item in value)


def _json(value: Any) -> Any:
    """What JSON holds: its own numbers for NumPy's, null for NaN and infinities."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
