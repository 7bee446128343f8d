"""Write and read the folder of a report.

REPORT/report.html      page for people, with all plots, pictures and videos in it
REPORT/metrics.json     metrics of every section; a value that was not measured is null
REPORT/protocol.json    what was measured and how, with its hash
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
"""Keys of `metrics.json` that are not names of sections."""
_PER_TOKENIZER = "per_tokenizer"
"""Key that marks metrics which depend on the tokens. Compare them only for the same tokenizer."""
_ESTIMATE = ("mean", "low", "high")

Metric = Cell | list[float | None]
"""A metric: a number, an estimate or a curve."""


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A metric that is shown at the top of a report, with reference values such as baselines."""

    label: str
    """Label of the metric, with its unit."""
    metric: str
    """Path of the metric in the report, such as `likelihood.bits_per_token.model`."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Paths of the metrics that serve as reference values, by their labels."""
    total: str = ""
    """Path of the number of which the metric is a part. The figure then reads "3 of 4"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A report that was read from its folder."""

    path: Path
    metrics: Mapping[str, Any]
    protocol: Protocol

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report's folder. Raises `DriveSimError` if its files are from two evaluations."""
        protocol, metrics = Protocol.load(path / _PROTOCOL), load_json(path / _METRICS)
        if metrics.get("protocol") != protocol.hash or not isinstance(metrics.get("model"), dict):
            raise DriveSimError(
                f"{path}: {_METRICS} and {_PROTOCOL} are not from one evaluation; evaluate again"
            )
        return cls(path=path, metrics=metrics, protocol=protocol)

    @property
    def sections(self) -> dict[str, Any]:
        """Metrics of each section, by the section's name."""
        return {key: item for key, item in self.metrics.items() if key not in _NOT_SECTIONS}


def refuse_existing(out: Path) -> None:
    """Raise `DriveSimError` if `out` already exists, unless it is an empty folder.

    Call this before measuring, so that no work is lost.
    """
    if (out / _METRICS).is_file():
        raise DriveSimError(f"{out}: already holds a report; choose another `out`, or delete it")
    if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise DriveSimError(f"{out}: exists and is not a report; choose another `out`")


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
    """Write the folder of a report, and return the key figures as text, by their labels.

    If writing fails, no folder is left behind.

    Args:
        out: New folder.
        title: Title of the page.
        description: Facts about the model and the data, shown under the title.
        sections: Sections in the order of the page. Metrics that depend on the tokens are in a
            mapping with `"per_tokenizer": True`. Compare them only for the same tokenizer.
        protocol: What was measured and how.
        model: Path and fingerprints of the measured model, for `metrics.json`. A world model's
            `tokenizer_fingerprint` tells which reports have the same tokenizer.
        seconds: Duration of the evaluation.
        headline: Key figures. A key figure is left out if its metric does not exist.
        attachments: Contents of additional files for the folder, by file name.
    """
    refuse_existing(out)
    measured = {section.name: _json(section.metrics) for section in sections}
    cells: dict[str, Any] = dict(leaves(measured))
    figures = [figure for figure in headline if figure.metric in cells]
    tiles: list[Tile] = []
    for figure in figures:
        beside = {
            name: cell_of(cells, place) for name, place in figure.beside.items() if place in cells
        }
        value = cell_of(cells, figure.metric)
        text = f"{value} of {cells[figure.total]}" if figure.total in cells else value
        tiles.append((figure.label, text, beside))
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
    """Yield the numbers, estimates and curves in nested mappings, with their paths.

    A path looks like `likelihood.accuracy.model`. If `left_out` is given, metrics that depend on
    the tokens are skipped, and their paths are added to `left_out`.
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


def cell_of(cells: Mapping[str, Metric], place: str) -> Any:
    """Return the metric at a path of `leaves`. A number whose interval is known is an estimate.

    The interval of the number `NAME` is the mapping `NAME_interval`, with its ends `low` and
    `high`.
    """
    value = cells[place]
    ends = {end: cells.get(f"{place}_interval.{end}") for end in ("low", "high")}
    return value if None in ends.values() or is_curve(value) else {"mean": value, **ends}


def is_curve(value: object) -> TypeGuard[list[float | None]]:
    """Return whether a metric is a curve: a list of two or more items, each a number or None."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(item is None or isinstance(item, int | float) for item in value)


def _json(value: Any) -> Any:
    """Convert a value to JSON types. NumPy arrays become lists. NaN and infinity become None."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
