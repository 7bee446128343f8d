"""Format the texts, numbers and means with intervals in the cells of a report's tables."""

import math
from collections.abc import Mapping, Sequence

Cell = str | float | int | None | Mapping[str, float | None]
"""The content of a table cell.

It is a text, a number, None for a value that could not be measured, or an estimate. An estimate is
a mean with its interval: the mapping `{"mean": ..., "low": ..., "high": ...}`. If it has no
interval, `low` and `high` are None. See `intervals.bootstrap`.
"""

NOT_MEASURED = "–"
_DIGITS = 4
_SIMILAR = 30
"""Numbers are similar in size if the largest is less than this many times the smallest.

In cells that are read together, similar numbers get the same number of decimals.
"""
_MOST_DECIMALS = 6


def is_estimate(value: object) -> bool:
    """Return whether a metric is an estimate: a mean with its interval."""
    return isinstance(value, Mapping) and value.keys() >= {"mean", "low", "high"}


def cell_texts(cells: Sequence[Cell]) -> list[str]:
    """Return the texts of cells that are read together, such as the cells of a column.

    Numbers get four significant digits. Numbers of similar size get the same number of decimals.
    """
    decimals = _common_decimals([cell for cell in cells if isinstance(cell, float) and cell])
    return [_cell_text(cell, decimals) for cell in cells]


def _cell_text(cell: Cell, decimals: int | None) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Mapping):
        return _estimate_text(cell)
    if cell is None or not math.isfinite(cell):
        return NOT_MEASURED
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int) or abs(cell) >= 10 ** (_DIGITS - 1):
        return f"{cell:,.0f}"
    return f"{cell:.{_DIGITS}g}" if decimals is None else f"{cell:,.{decimals}f}"


def _common_decimals(values: Sequence[float]) -> int | None:
    """Return the number of decimals with which the largest value has four digits.

    Returns None if the values differ too much in size, or if they need too many decimals.
    """
    sizes = [abs(value) for value in values if math.isfinite(value)]
    if not sizes or max(sizes) >= _SIMILAR * min(sizes):
        return None
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(max(sizes))))
    # Drop zeros at the end, to write 0.5 rather than 0.5000.
    while decimals and all(round(x, decimals - 1) == round(x, decimals) for x in sizes):
        decimals -= 1
    return decimals if decimals <= _MOST_DECIMALS else None


def _estimate_text(estimate: Mapping[str, float | None]) -> str:
    """Return an estimate as text, `mean [low, high]`, or the mean alone if it has no interval.

    The decimals are chosen so that the width of the interval has two significant digits.
    """
    mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return _cell_text(mean, None)
    values, width = (mean, low, high), max(mean, high) - min(mean, low)
    if 10**-_MOST_DECIMALS < width < math.inf:
        decimals = max(0, 1 - math.floor(math.log10(width)))
        mean_text, *ends = (f"{value:,.{decimals}f}" for value in values)
    else:
        mean_text, *ends = (_cell_text(value, None) for value in values)
    return f"{mean_text} [{', '.join(ends)}]"
