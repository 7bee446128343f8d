"""Find the pictures that a CSV names, one in each row.

name,timestamp_s,speed_mps,steering_deg
images/0001.jpg,0.00,8.1,-3.5
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from driving_sim.data.actions.columns import find_time
from driving_sim.data.actions.csv_table import CsvTable, plain, read_csv, read_start
from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.sources.pictures.files import find_pictures, is_picture
from driving_sim.data.sources.pictures.names import moment
from driving_sim.data.sources.source import Folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_AHEAD = ("center", "centre", "front")
_OTHER_COMPUTER = re.compile(r"/|[A-Za-z]:")


class PictureTable(NamedTuple):
    """A CSV with a column that names pictures."""

    path: Path
    column: str
    """Name of the column, in lower case."""
    base: Path
    """Folder in which the names are looked for."""
    is_foreign: bool
    """Whether the names are paths on another computer, so that only their ends count."""
    notices: tuple[str, ...] = ()

    def own(self, folder: Folder) -> set[str]:
        """Return the names of the CSV and of the subfolder with the pictures, if there is one."""
        if self.base != folder.path:
            return {self.path.name, self.base.relative_to(folder.path).parts[0]}
        _, first = read_start(self.path)
        below = {_clean(cell).split("/")[0] for cell in first if is_picture(cell)}
        return {self.path.name, *(below & {*folder.folders})}


class NamedPictures(NamedTuple):
    """The rows of a `PictureTable` whose pictures are there."""

    table: CsvTable
    pictures: ImageFrames
    rows: Ints
    """Row of each picture: the first one that names it."""
    notices: tuple[str, ...]

    def clock(self) -> Floats | None:
        """Return the time of each row of the table in seconds, or None if nothing says it."""
        if (column := find_time(self.table)) is not None:
            return self.table.numbers(column.name) * column.scale
        taken = [moment(path.name) for path in self.pictures.paths]
        times = np.full(len(self.table.rows), np.nan)
        if None in taken or len({*self.rows.tolist()}) < len(times):
            return None
        times[self.rows] = [time for time in taken if time is not None]
        return times


def find_tables(folder: Folder, csvs: Iterable[str]) -> list[PictureTable]:
    """Return those of the CSVs in a folder that name pictures."""
    found = []
    for name in csvs:
        header, first = read_start(folder.path / name)
        columns = [
            column for column, cell in zip(header, first, strict=False) if is_picture(cell.strip())
        ]
        if not columns:
            continue
        ahead = [column for column in columns if any(word in column for word in _AHEAD)]
        chosen = (ahead or columns)[0]
        notices = []
        if len(columns) > 1:
            listed = ", ".join(map(plain, columns))
            notices.append(
                f"of the columns {listed} of {plain(name)}, which name pictures, {plain(chosen)} "
                "is read"
            )
        cell = first[header.index(chosen)]
        is_foreign = bool(_OTHER_COMPUTER.match(cell.strip()))
        base = _base(folder, _ends(cell) if is_foreign else (_clean(cell),))
        if is_foreign:
            notices.append(
                f"the paths in column {plain(chosen)} of {plain(name)} are those of another "
                "computer; only the names of the pictures count"
            )
        path = folder.path / name
        found.append(PictureTable(path, chosen, base, is_foreign, tuple(notices)))
    return found


def _clean(cell: str) -> str:
    return cell.strip().replace("\\", "/").removeprefix("./")


def _ends(cell: str) -> tuple[str, ...]:
    return (_clean(cell).rsplit("/", 1)[-1],)


def _base(folder: Folder, names: tuple[str, ...]) -> Path:
    """Return the folder that contains the first picture: the CSV's own, or one below it."""
    for place in (folder.path, *(folder.path / below for below in folder.folders)):
        try:
            if any((place / name).is_file() for name in names if not name.startswith("..")):
                return place
        except (OSError, ValueError):  # The name is too long, or contains a zero byte.
            break
    return folder.path


def read_table(found: PictureTable, *, is_only: bool) -> NamedPictures:
    """Read a CSV that names pictures.

    If several rows in a row name the same picture, it is taken at the first. Rows without a name or
    without a picture only count for the actions. If the CSV is the only one that names pictures in
    its folder, those that it does not name are counted in a notice. Raises DriveSimError if fewer
    than 2 pictures are there, or if a name leads outside the folder.
    """
    table = read_csv(found.path)
    number = table.names.index(found.column)
    cells = [row[number] for row in table.rows]
    names = [(_ends(cell)[0] if found.is_foreign else _clean(cell)) for cell in cells]
    rows = [n for n, cell in enumerate(names) if cell and (n == 0 or cell != names[n - 1])]
    notices, name = [*found.notices], plain(found.path.name)
    if repeated := sum(map(bool, names)) - len(rows):
        notices.append(
            f"{repeated} rows of {name} name the same picture as the row above; it is "
            "taken at the first"
        )

    def bad_name(index: int, error: object) -> DriveSimError:
        return table.fail(f"{one_line(error)}; correct it or remove the row", rows[index])

    kept, pictures = find_pictures(found.base, [names[row] for row in rows], bad_name)
    if len(kept) < 2:
        raise table.fail(
            f"only {len(kept)} of the {len(rows)} pictures in its column {plain(found.column)} are "
            f"in {one_line(found.base)} (the first is {plain(names[rows[0]] if rows else '')}); "
            "copy them there"
        )
    if missing := len(rows) - len(kept):
        notices.append(
            f"{missing} of {len(rows)} pictures that {name} names are missing; they are "
            "left out, which leaves gaps"
        )
    if is_only and (others := _unnamed(found.base, table)):
        notices.append(
            f"{others} pictures in {plain(found.base.name)} are not named by {name} and "
            "are left out"
        )
    numbers = np.array([rows[index] for index in kept], np.int64)
    return NamedPictures(table, pictures, numbers, tuple(notices))


def _unnamed(folder: Path, table: CsvTable) -> int:
    """Return how many pictures in a folder no cell of a table names."""
    named = {_ends(cell)[0] for row in table.rows for cell in row if is_picture(cell.strip())}
    return sum(is_picture(name) and name not in named for name in Folder.of(folder).files)
