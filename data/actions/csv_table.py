"""Read CSV files as tables of text. Rows keep their line numbers for error messages."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown

_MOST_NAMED, _LONGEST_NAME = 12, 80


@dataclass(frozen=True, slots=True)
class CsvTable:
    """The cells of a CSV file with a header."""

    path: Path
    names: tuple[str, ...]
    """Column names in lower case."""
    rows: list[list[str]]
    lines: list[int]
    """Line number of each row in the file."""

    def fail(self, message: str, row: int | None = None) -> DriveSimError:
        """Return an error whose message begins with the file and, if `row` is given, its line."""
        where = f"{self.path}" if row is None else f"{self.path}, line {self.lines[row]}"
        return DriveSimError(f"{where}: {message}")

    @property
    def columns(self) -> str:
        """The column names as text for a message. Only the first 12 are listed."""
        more = ", ..." if len(self.names) > _MOST_NAMED else ""
        return ", ".join(map(_plain, self.names[:_MOST_NAMED])) + more

    def cell(self, row: int, name: str) -> str:
        """Return the text of one cell for a message; long or unprintable text is abbreviated."""
        return _plain(self.rows[row][self.names.index(name)].strip())

    def numbers(self, name: str) -> Floats:
        """Return a column as numbers. Raises DriveSimError if a cell is not a finite number."""
        column = [cells[self.names.index(name)].strip() for cells in self.rows]
        values = np.array([*map(_number, column)])
        for row in np.flatnonzero(~np.isfinite(values))[:1]:
            raise self.fail(
                f"{name} is {shown(column[row])}, not a finite number; correct it or remove "
                "the row",
                row,
            )
        return values


def _plain(name: str) -> str:
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else shown(name)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV, each with the number of its last line. Empty lines are skipped.

    Raises DriveSimError if the file is missing or is not UTF-8 text.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            return [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except FileNotFoundError:
        raise DriveSimError(f"{path}: no such file") from None
    # ValueError: the text is not UTF-8, or the path contains a zero byte.
    except (OSError, ValueError, csv.Error) as error:
        raise DriveSimError(
            f"{path}: cannot be read as a CSV of UTF-8 text ({one_line(error)})"
        ) from None


def read_csv(path: Path) -> CsvTable:
    """Read a CSV with a header and at least two more rows. Empty lines are skipped.

    Raises DriveSimError if the file is missing, is not UTF-8 text or is too short, or if a row has
    more or fewer cells than the header.
    """
    numbered = read_rows(path)
    if not numbered:
        raise DriveSimError(
            f"{path}: is empty; its first line must name the columns, such as "
            "timestamp_s,speed_mps,road_wheel_rad"
        )
    (_, header), *rows = numbered
    names = tuple(name.strip().lower() for name in header)
    table = CsvTable(path, names, [cells for _, cells in rows], [line for line, _ in rows])
    for row, cells in enumerate(table.rows):
        if len(cells) != len(names):
            raise table.fail(f"has {len(cells)} cells, but the header has {len(names)}", row)
    if len(rows) < 2:
        raise table.fail(f"has {len(rows)} rows of values; at least 2 are needed")
    return table
