"""Read the log of a recording of the Udacity simulator, and find the takes in it.

The simulator appends every take to the same log: `driving_log.csv`, with one row for each picture.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from driving_sim.data.actions.csv_table import read_rows
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

LOG_NAME = "driving_log.csv"
FULL_LOCK_RAD = math.radians(25)
_MPS_PER_MPH = 0.44704
_COLUMNS = 7
_STAMP = re.compile(r"_(\d{4}(?:_\d{2}){5})_(\d{3})\.\w+$")

# Within a take, the rows of real recordings are at most 0.16 s apart, and two takes are minutes
# apart. Shorter pauses come from rows that somebody removed, so they only cut the drive.
_PAUSE_S = 10.0
# If more rows than this share are earlier than the row before, the log is not in order of time.
_MOST_BACKWARD = 0.1


class Row(NamedTuple):
    """One row of the log."""

    line: int
    """Line number in the file."""
    image: str
    """File name of the picture of the centre camera."""
    moment: datetime
    speed_mps: float
    road_wheel_rad: float
    """Angle of the front wheels, left positive."""


class Take(NamedTuple):
    """The rows of one take."""

    name: str
    """take_1, take_2 and so on, or empty if the log has only one take."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """The takes of a log, and what was left out or guessed, one line each."""

    takes: tuple[Take, ...]
    notices: tuple[str, ...]


class _CutError(ValueError):
    """A row lacks cells, or has something else than a number."""


def _moment(name: str) -> datetime:
    match = _STAMP.search(name)
    if match is None:
        raise ValueError(
            f"the name {name!r} contains no time, unlike center_2018_07_16_17_12_55_715.jpg"
        )
    second = datetime.strptime(match[1], "%Y_%m_%d_%H_%M_%S")
    return second + timedelta(milliseconds=int(match[2]))


def _row(line: int, cells: list[str]) -> Row:
    if len(cells) < _COLUMNS:
        raise _CutError(f"has {len(cells)} cells instead of {_COLUMNS}")
    # The path may come from any operating system. PureWindowsPath accepts both separators.
    name = PureWindowsPath(cells[0].strip()).name
    try:
        steering, speed = float(cells[3]), float(cells[6])
    except ValueError as error:
        raise _CutError(str(error)) from None
    if not (abs(steering) <= 1 and -100 < speed < 300):
        raise ValueError(
            f"steering {steering:g} must be from -1 to 1, and speed {speed:g} mph from -100 to 300"
        )
    return Row(line, name, _moment(name), speed * _MPS_PER_MPH, -steering * FULL_LOCK_RAD)


def _check_points(log: Path, numbered: Sequence[tuple[int, list[str]]]) -> None:
    """Raise DriveSimError if the numbers have decimal commas, which look like further cells."""
    whole = [
        line for line, cells in numbered if cells[_COLUMNS:][:1] and cells[7].strip().isdigit()
    ]
    if whole and not any("." in cell for _, cells in numbered for cell in cells[3:_COLUMNS]):
        raise DriveSimError(
            f"{log}, line {whole[0]}: its numbers seem to have decimal commas, which also separate "
            "the cells; write them with points"
        )


def read_log(log: Path) -> Log:
    """Read a log, which may begin with a header.

    Only the first seven cells of a row count. A last row that was cut off is left out. Raises
    DriveSimError, with the line number, for any other row that cannot be used, and if there is no
    take with at least 2 rows.
    """
    numbered = read_rows(log)
    if numbered and numbered[0][1][0].strip().lower() == "center":
        del numbered[0]
    _check_points(log, numbered)
    notices, rows = [], []
    for line, cells in numbered:
        try:
            rows.append(_row(line, cells))
            if len(rows) > 1 and rows[-1].moment == rows[-2].moment:
                raise ValueError("the time of the image is the same as in the row above")
        except ValueError as error:
            if isinstance(error, _CutError) and line == numbered[-1][0]:
                notices.append(f"the last row of {log.name} was cut off and is left out")
                break
            raise bad_row(log, line, error) from None
    longer = sum(len(cells) > _COLUMNS for _, cells in numbered)
    if longer:
        notices.append(
            f"{longer} of the {len(numbered)} rows of {log.name} have more than {_COLUMNS} cells; "
            f"only the first {_COLUMNS} count"
        )
    takes = _takes(log, rows)
    if len(takes) > 1:
        notices.append(
            f"{log.name} contains {len(takes)} takes, because the times of its rows go back or "
            f"jump by more than {_PAUSE_S:g} s; each take is a drive"
        )
    usable = tuple(take for take in takes if len(take.rows) > 1)
    if not usable:
        raise DriveSimError(
            f"{log}: has {len(rows)} rows in {len(takes)} takes; at least 2 in one take are needed"
        )
    if len(usable) < len(takes):
        notices.append(
            f"{len(takes) - len(usable)} of the takes have a single row and are left out"
        )
    return Log(usable, tuple(notices))


def bad_row(log: Path, line: int, error: object) -> DriveSimError:
    """Return the error for a row that cannot be used."""
    return DriveSimError(f"{log}, line {line}: {one_line(error)}; correct it or remove the row")


def _takes(log: Path, rows: Sequence[Row]) -> list[Take]:
    """Split the rows where their times go back or pause."""
    steps = [(later.moment - earlier.moment).total_seconds() for earlier, later in pairwise(rows)]
    backward = [number for number, step in enumerate(steps, 1) if step < 0]
    if len(backward) > _MOST_BACKWARD * len(rows):
        raise bad_row(
            log,
            rows[backward[0]].line,
            f"the time of the image is not later than in the row above ({len(backward)} rows are "
            "like that), so the rows are not in order of time",
        )
    starts = [number for number, step in enumerate(steps, 1) if not 0 < step <= _PAUSE_S]
    bounds = [0, *starts, len(rows)]
    width = len(str(len(bounds) - 1))
    return [
        Take(f"take_{number:0{width}}" if starts else "", tuple(rows[start:stop]))
        for number, (start, stop) in enumerate(pairwise(bounds), 1)
    ]
