"""Read CSV files as tables of text. Rows keep their line numbers for error messages."""

import csv
import math
import re
from dataclasses import dataclass, replace
from io import StringIO
from itertools import islice
from pathlib import Path

import numpy as np

from driving_sim.data.arrays import Floats, Mask
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown

_MOST_NAMED, _LONGEST_NAME = 12, 80
_LONGEST_HEADER = 2**16  # characters
_DELIMITERS = (",", ";", "\t")
_SEP = re.compile(r"\s*sep=([^\r\n\"])\s*", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class CsvTable:
    """The cells of a CSV file with a header."""

    path: Path
    names: tuple[str, ...]
    """Column names in lower case."""
    rows: list[list[str]]
    lines: list[int]
    """Line number of each row in the file."""
    notices: tuple[str, ...] = ()
    """Assumptions made while reading the file, one line each."""

    def fail(self, message: str, row: int | None = None) -> DriveSimError:
        """Return an error whose message begins with the file and, if `row` is given, its line."""
        where = f"{self.path}" if row is None else f"{self.path}, line {self.lines[row]}"
        return DriveSimError(f"{where}: {message}")

    def only(self, chosen: Mask) -> "CsvTable":
        """Return a table of the rows that are `chosen` [rows]."""
        at = np.flatnonzero(chosen)
        return replace(
            self, rows=[self.rows[row] for row in at], lines=[self.lines[row] for row in at]
        )

    @property
    def columns(self) -> str:
        """The column names as text for a message. Only the first 12 are listed."""
        more = ", ..." if len(self.names) > _MOST_NAMED else ""
        return ", ".join(map(plain, self.names[:_MOST_NAMED])) + more

    def cell(self, row: int, name: str) -> str:
        """Return the text of one cell for a message; long or unprintable text is abbreviated."""
        return plain(self.rows[row][self.names.index(name)].strip())

    def numbers(self, name: str, *, may_be_blank: bool = False) -> Floats:
        """Return a column as numbers. Blank cells become NaN if they are allowed.

        Raises DriveSimError if another cell is not a finite number.
        """
        column = [cells[self.names.index(name)].strip() for cells in self.rows]
        values = np.array([*map(_number, column)])
        blank = np.array([may_be_blank and not cell for cell in column])
        for row in np.flatnonzero(~np.isfinite(values) & ~blank)[:1]:
            raise self.fail(
                f"{name} is {shown(column[row])}, not a finite number; correct it or remove "
                "the row",
                row,
            )
        return values


def plain(name: str) -> str:
    """Return text of a file for a message; long or unprintable text is abbreviated."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else shown(name)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _dialect(first: str) -> tuple[str, bool]:
    """Return the delimiter of a file, given its first line, and whether this line only names the
    delimiter (`sep=;`, as spreadsheets write it)."""
    if match := _SEP.fullmatch(first.rstrip("\r\n")):
        return match[1], True
    return max(_DELIMITERS, key=first.count), False


def read_start(path: Path) -> tuple[tuple[str, ...], list[str]]:
    """Return the column names in lower case and the cells of the first row below them.

    They are empty if the file is not a CSV of UTF-8 text.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Limit the length: a file that is not a CSV may be a single, very long line.
            lines = [file.readline(_LONGEST_HEADER) for _ in range(3)]
        delimiter, is_named = _dialect(lines[0])
        header, first = csv.reader(lines[1:] if is_named else lines[:2], delimiter=delimiter)
        return _names(header), first
    except (OSError, ValueError, TypeError, csv.Error):
        return (), []


def read_header(path: Path) -> tuple[str, ...]:
    """Return the column names in lower case, or no names if the file is not a CSV of UTF-8 text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Limit the length: a file that is not a CSV may be a single, very long line.
            header = file.readline(_LONGEST_HEADER)
            delimiter, is_named = _dialect(header)
            if is_named:
                header = file.readline(_LONGEST_HEADER)
            return _names(next(csv.reader([header], delimiter=delimiter), []))
    except (OSError, ValueError, TypeError, csv.Error):
        return ()


def _names(cells: list[str]) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in cells)


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV, each with the number of its last line. Empty lines are skipped.

    Raises DriveSimError if the file is missing or is not UTF-8 text.
    """
    rows, _ = _read_rows(path)
    return rows


def _read_rows(path: Path) -> tuple[list[tuple[int, list[str]]], tuple[str, bool]]:
    """Return the rows as `read_rows` does, the delimiter, and whether the last line has an end."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        lines = StringIO(text, newline="")
        delimiter, is_named = _dialect(lines.readline())
        skipped = 1 if is_named else 0
        lines.seek(0)
        reader = csv.reader(islice(lines, skipped, None), delimiter=delimiter)
        rows = [
            (reader.line_num + skipped, cells) for cells in reader if any(map(str.strip, cells))
        ]
    except FileNotFoundError:
        raise DriveSimError(f"{path}: no such file") from None
    # ValueError: the text is not UTF-8, or the path contains a zero byte.
    except (OSError, ValueError, csv.Error, TypeError) as error:
        raise DriveSimError(
            f"{path}: cannot be read as a CSV of UTF-8 text ({one_line(error)})"
        ) from None
    return rows, (delimiter, text.endswith(("\n", "\r")))


def read_csv(path: Path) -> CsvTable:
    """Read a CSV with a header and at least two more rows. Empty lines are skipped.

    Cells may be separated by commas, semicolons or tabs. Unless commas separate them, numbers may
    have decimal commas. A last line that was cut off is left out. Raises DriveSimError if the file
    is missing, is not UTF-8 text or is too short, or if a row has more or fewer cells than the
    header.
    """
    numbered, (delimiter, has_end) = _read_rows(path)
    if not numbered:
        raise DriveSimError(
            f"{path}: is empty; its first line must name the columns, such as "
            "timestamp_s,speed_mps,road_wheel_rad"
        )
    (_, header), *rows = numbered
    names = _names(header)
    notices = []
    if rows and not has_end and _is_cut(rows[-1][1], names):
        notices.append(f"the last line of {path.name} was cut off and is left out")
        rows.pop()
    if delimiter != ",":
        decimal = [_with_points(cells) for _, cells in rows]
        if any(changed for _, changed in decimal):
            notices.append(f"{path.name}: numbers such as 1,5 are taken to have decimal commas")
            rows = [(line, cells) for (line, _), (cells, _) in zip(rows, decimal, strict=True)]
    table = CsvTable(
        path, names, [cells for _, cells in rows], [line for line, _ in rows], tuple(notices)
    )
    for row, cells in enumerate(table.rows):
        if len(cells) != len(names):
            raise table.fail(f"has {len(cells)} cells, but the header has {len(names)}", row)
    if len(rows) < 2:
        raise table.fail(f"has {len(rows)} rows of values; at least 2 are needed")
    return table


def _is_cut(cells: list[str], names: tuple[str, ...]) -> bool:
    """Return whether the last line, which has no line end, lacks cells or the end of a number."""
    return len(cells) < len(names) or cells[-1].strip()[-1:] in ("", "-", "+", ".", "e", "E")


def _with_points(cells: list[str]) -> tuple[list[str], bool]:
    """Replace decimal commas with points. Return the cells, and whether any cell changed."""
    points = [
        cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell.strip()) else cell for cell in cells
    ]
    return points, points != cells
