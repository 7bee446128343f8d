"""What stands in a cell of a report's tables: text, a number, or a mean with its interval."""

import math
from collections.abc import Mapping, Sequence

Cell = str | float | int | None | Mapping[str, float | None]
"""Text, a number, None for what could not be measured, or `{"mean": ..., "low": ..., "high": ...}`:
a mean with its interval, low and high None where there is none (see `intervals.bootstrap`)."""

NOT_MEASURED = "–"
_DIGITS = 4
_SIMILAR = 30
"""Numbers whose sizes differ less than this many times are shown with the same decimals."""
_MOST_DECIMALS = 6


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
        return NOT_MEASURED
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
