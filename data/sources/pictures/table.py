"""Find the pictures that a CSV names, one in each row.

name,timestamp_s,speed_mps,steering_deg
images/0001.jpg,0.00,8.1,-3.5
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from driving_sim.data.actions.columns import SPEEDS, STEERINGS, TIMES, find_time
from driving_sim.data.actions.csv_table import CsvTable, plain, read_csv, read_header, read_start
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.inner_name import is_inner_name
from driving_sim.data.sources import video_folder
from driving_sim.data.sources.pictures.files import (
    at_rate,
    find_pictures,
    is_picture,
    unused_rate,
)
from driving_sim.data.sources.pictures.names import find_series, moment
from driving_sim.data.sources.source import Folder
from driving_sim.data.video.timing import FALLBACK_RATE
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_AHEAD = ("center", "centre", "front")
_OTHER_COMPUTER = re.compile(r"/|[A-Za-z]:")
_MOST_LISTED = 4
_MOST_PARTS = 50


class PictureTable(NamedTuple):
    """A CSV with a column that names pictures."""

    path: Path
    column: str
    """Name of the column, in lower case."""
    base: Path
    """Folder in which the names are looked for."""
    depth: int
    """How many last parts of each name count: 0 for all. The names may be paths on another
    computer."""
    problem: str
    """Why the pictures cannot be used, or empty."""
    pictures: frozenset[str]
    """Names below the CSV's folder of all pictures in the folders that the CSV names, those of
    other cameras included."""
    named: frozenset[str]
    """Names, without folders, of all pictures that the CSV names."""
    notices: tuple[str, ...]


class NamedPictures(NamedTuple):
    """The rows of a `PictureTable` whose pictures are there."""

    table: CsvTable
    names: tuple[str, ...]
    """Name of the picture in each row, or empty."""
    pictures: ImageFrames
    rows: Ints
    """Row of each picture: the first one that names it."""
    notices: tuple[str, ...]

    def clock(self, reading: Reading) -> tuple[Floats, list[str]]:
        """Return the time of each row in seconds, or NaN, and lines about these times.

        The times are those in the time column, those in the names of the pictures, those of the
        frames that a column `frame` counts, or those of the rows, whichever is there.
        """
        table, file = self.table, plain(self.table.path.name)
        if (column := find_time(table)) is not None:
            return table.numbers(column.name) * column.scale, unused_rate(reading)
        taken = [moment(name) for name in self.names]
        if sum(time is not None for time in taken) > len(taken) / 2:
            times = np.array([np.nan if time is None else time.seconds for time in taken])
            repeated = [n for n in range(1, len(taken)) if self.names[n] == self.names[n - 1]]
            times[repeated] = np.nan
            lines = unused_rate(reading)
            if left_out := int(np.isnan(times).sum()):
                lines.append(
                    f"{left_out} rows of {file} have no time of their own in the picture's name "
                    "and are left out"
                )
            return times, lines
        rate = reading.video_fps or FALLBACK_RATE
        if "frame" in table.names:
            line = f"{at_rate(reading)}; the column frame of {file} counts the frames"
            return table.numbers("frame") / rate, [line]
        return np.arange(len(table.rows)) / rate, [at_rate(reading)]


def has_actions(path: Path, reading: Reading) -> bool:
    """Return whether a CSV has a column with actions, whose name is known or set by the user."""
    own = {name.strip().lower() for name in (reading.speed, reading.steering) if name}
    return not {*SPEEDS, *STEERINGS, *own}.isdisjoint(read_header(path))


def find_tables(folder: Folder, csvs: Iterable[str], reading: Reading) -> list[PictureTable]:
    """Return those of the CSVs in a folder that name pictures of a drive.

    Such a CSV has a column with times, frames or actions, or its pictures are a series, and not the
    thumbnails of videos.
    """
    found = [_find(folder, name, reading) for name in csvs]
    return [table for table in found if table is not None]


def _find(folder: Folder, name: str, reading: Reading) -> PictureTable | None:
    path = folder.path / name
    header, first = read_start(path)
    columns = [
        column for column, cell in zip(header, first, strict=False) if is_picture(cell.strip())
    ]
    if not columns:
        return None
    ahead = [column for column in columns if any(word in column for word in _AHEAD)]
    chosen = (ahead or columns)[0]
    rows = _rows(path, header, first)
    cells = [cell for cell in _column(header, rows, chosen) if cell]
    named = {cell for column in columns for cell in _column(header, rows, column)}
    has_videos = any(map(video_folder.is_video, folder.files))
    is_series = not has_videos and bool(find_series({*map(_last, cells)}))
    if not cells or not (_says_when(header) or has_actions(path, reading) or is_series):
        return None
    notices = []
    if len(columns) > 1:
        listed = ", ".join(map(plain, columns))
        notices.append(
            f"of the columns {listed} of {plain(name)}, which name pictures, {plain(chosen)} is "
            "read"
        )
    is_foreign = bool(_OTHER_COMPUTER.match(cells[0]))
    if is_foreign:
        notices.append(
            f"the paths in column {plain(chosen)} of {plain(name)} are those of another computer; "
            "only their ends count"
        )
    for cell in (cells[0], cells[len(cells) // 2], cells[-1]):  # Some pictures may be missing.
        base, depth, problem = _place(folder, cell, is_foreign=is_foreign)
        if problem or _is_file(base, _end(cell, depth)):
            break
    folders = sorted({cell.rpartition("/")[0] for cell in cells})
    if len(folders) > 1:
        problem = f"it names pictures in {_listed(folders)}; split the CSV by folder"
    pictures = _pictures_beside({_end(cell, depth) for cell in named}, base, folder.path)
    ends = frozenset(map(_last, named))
    return PictureTable(path, chosen, base, depth, problem, pictures, ends, tuple(notices))


def _rows(path: Path, header: tuple[str, ...], first: list[str]) -> list[list[str]]:
    """Return the rows of a CSV, or only the first one if others are bad."""
    try:
        table = read_csv(path)
    except DriveSimError:  # It is reported when the drive is loaded.
        return [first]
    return table.rows if table.names == header else []


def _says_when(header: Sequence[str]) -> bool:
    """Return whether a column has times or counts frames, even if its name is not a known one."""
    starts = ("timestamp_", "time_")
    return any(name in TIMES or name == "frame" or name.startswith(starts) for name in header)


def _column(header: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> list[str]:
    """Return the names of pictures in a column, with / between their parts."""
    number = header.index(name)
    return [cells[number].strip().replace("\\", "/").removeprefix("./") for cells in rows]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _end(name: str, depth: int) -> str:
    """Return the last `depth` parts of a name, or all parts if it is 0."""
    return "/".join(name.split("/")[-depth:])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more folders" if len(names) > _MOST_LISTED else ""
    shown = [plain(name) if name else "its own folder" for name in names[:_MOST_LISTED]]
    return ", ".join(shown) + more


def _place(folder: Folder, name: str, *, is_foreign: bool) -> tuple[Path, int, str]:
    """Return where a picture is: the folder, how many last parts of its name count, and why this is
    not clear, or empty.

    The folder is the CSV's own, or else the only one directly below it with this picture. Of a path
    on another computer, the longest end counts that leads to a file.
    """
    depth = 0
    if is_foreign:
        for depth in range(min(name.count("/"), _MOST_PARTS), 0, -1):
            if _is_file(folder.path, _end(name, depth)):
                return folder.path, depth, ""
    elif _is_file(folder.path, name):
        return folder.path, depth, ""
    end = _end(name, depth)
    places = [below for below in folder.folders if _is_file(folder.path / below, end)]
    if len(places) > 1:
        return (
            folder.path,
            depth,
            f"several folders have the picture {plain(end)}: {_listed(places)}; name the folder in "
            "the CSV",
        )
    return folder.path / (places[0] if places else ""), depth, ""


def _is_file(folder: Path, name: str) -> bool:
    try:
        return is_inner_name(name) and (folder / name).is_file()
    except OSError:  # The name is too long.
        return False


def _pictures_beside(names: Iterable[str], base: Path, root: Path) -> frozenset[str]:
    """Return the pictures in the folders of some pictures, with names below `root`."""
    found = []
    for folder in {name.rpartition("/")[0] for name in names}:
        path = base / folder
        try:
            if not (folder and not is_inner_name(folder)) and path.is_dir():
                below = path.relative_to(root)
                pictures = filter(is_picture, Folder.of(path).files)
                found += [(below / name).as_posix() for name in pictures]
        except OSError:  # The name is too long, or the folder may not be read.
            continue
    return frozenset(found)


def read_table(found: PictureTable) -> NamedPictures:
    """Read a CSV that names pictures.

    If several rows in a row name the same picture, it is taken at the first. Rows without a name or
    without a picture only count for the actions. Raises DriveSimError if the pictures are in
    several folders, if fewer than 2 are there, or if a name leads outside the folder.
    """
    table = read_csv(found.path)
    names = [_end(cell, found.depth) for cell in _column(table.names, table.rows, found.column)]
    rows = [n for n, cell in enumerate(names) if cell and (n == 0 or cell != names[n - 1])]
    notices, name = [*found.notices], plain(found.path.name)
    if repeated := sum(map(bool, names)) - len(rows):
        notices.append(
            f"{repeated} rows of {name} name the same picture as the row above; it is "
            "taken at the first"
        )

    def bad_name(index: int, error: object) -> DriveSimError:
        return table.fail(f"{one_line(error)}; correct it or remove the row", rows[index])

    kept, pictures, lines = find_pictures(found.base, [names[row] for row in rows], bad_name)
    if found.problem:
        raise table.fail(found.problem)
    if len(kept) < 2:
        raise table.fail(
            f"only {len(kept)} of the {len(rows)} pictures in its column {plain(found.column)} are "
            f"in {one_line(found.base)} (the first is {plain(names[rows[0]] if rows else '')}); "
            "copy them there"
        )
    numbers = np.array([rows[index] for index in kept], np.int64)
    return NamedPictures(table, tuple(names), pictures, numbers, (*notices, *lines))
