"""Find drives in folders of pictures: those that a CSV names, and numbered or time-stamped ones.

The times of the pictures are those in the CSV that names them or counts with them, or else those in
their names, or else the setting `video_fps` gives their rate. `names.py` says what a series of
pictures is: a plain folder of photos is none.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from driving_sim.data.actions.action_file import is_action_file, read_action_file
from driving_sim.data.actions.action_log import SPEED, STEERING, ActionLog
from driving_sim.data.actions.columns import SPEEDS, STEERINGS, find_time, look_alike
from driving_sim.data.actions.csv_table import CsvTable, plain, read_csv, read_header
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.drive import Drive
from driving_sim.data.image_frames import ImageFrames, picture_size
from driving_sim.data.sources import video_folder
from driving_sim.data.sources.pictures.files import (
    about_sizes,
    check_picture_times,
    find_pictures,
    is_picture,
)
from driving_sim.data.sources.pictures.names import Series, find_series
from driving_sim.data.sources.pictures.table import PictureTable, find_tables, read_table
from driving_sim.data.sources.source import Contents, Folder, Found
from driving_sim.data.video.timing import FALLBACK_RATE, even_times
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_MOST_CSVS = 100
_MOST_FOLDERS = 1000
_INSPECTION = "inspection.json"


def _csvs(folder: Folder) -> list[str]:
    """Return the CSVs in a folder that belong to no video."""
    videos = {PurePath(name).stem for name in folder.files if video_folder.is_video(name)}
    csvs = [name for name in folder.files if PurePath(name).suffix.lower() == ".csv"]
    return [name for name in csvs if PurePath(name).stem not in videos][:_MOST_CSVS]


def _series(folder: Folder) -> list[Series]:
    """Return the series of pictures in a folder. Pictures of a series have one size.

    The pictures that `inspect` draws, one for each drive, are no series.
    """
    if _INSPECTION in folder.files:
        return []
    series = find_series(filter(is_picture, folder.files))
    return [one for one in series if len(_sizes(folder.path, one)) <= 1]


def _sizes(folder: Path, series: Series) -> set[tuple[int, int]]:
    last = len(series.names) - 1
    chosen = [folder / series.names[n] for n in (0, last // 2, last)]
    return {size for size in map(picture_size, chosen) if size}


class _Paired(NamedTuple):
    """A CSV beside a folder with series of pictures, whose actions it holds."""

    csv: str
    folder: str
    series: list[Series]


def _paired(folder: Folder, csvs: Sequence[str]) -> list[_Paired]:
    """Return the pairs `NAME.csv` and `NAME/`, or the only CSV and the only folder with series."""
    actions = [name for name in csvs if is_action_file(folder.path / name)]
    if not actions:
        return []
    below = [Folder.of(folder.path / name) for name in folder.folders[:_MOST_FOLDERS]]
    series = {one.path.name: _series(one) for one in below if not _csvs(one)}
    with_series = [name for name, found in series.items() if found]
    if len(actions) == len(with_series) == 1:
        return [_Paired(actions[0], with_series[0], series[with_series[0]])]
    stems = {PurePath(name).stem: name for name in actions}
    return [_Paired(stems[name], name, series[name]) for name in with_series if name in stems]


def detect(folder: Folder) -> bool:
    """Return whether a folder has a CSV that names pictures, or a series of pictures."""
    csvs = _csvs(folder)
    return bool(find_tables(folder, csvs) or _series(folder) or _paired(folder, csvs))


def drives(folder: Folder) -> Contents:
    """Return the drives of pictures in a folder, and its videos."""
    csvs = _csvs(folder)
    if tables := find_tables(folder, csvs):
        found, own = _of_tables(tables, folder)
    elif series := _series(folder):
        files = tuple(folder.path / name for name in csvs)
        found = _of_series(folder.path, series, files)
        own = {*csvs, *(name for one in series for name in one.names)}
    else:
        pairs = _paired(folder, csvs)
        found = [
            one
            for pair in pairs
            for one in _of_series(folder.path / pair.folder, pair.series, (folder.path / pair.csv,))
        ]
        own = {name for pair in pairs for name in (pair.csv, pair.folder)}
    rest = [name for name in folder.files if name not in own]
    videos = video_folder.contents_of(folder, rest)
    return replace(videos, drives=(*found, *videos.drives), own=videos.own | own)


def _of_tables(tables: list[PictureTable], folder: Folder) -> tuple[list[Found], set[str]]:
    """Return a drive for each CSV that names pictures, and the names of what belongs to them."""
    is_only = len(tables) == 1
    found = [
        Found(
            path=folder.path,
            load=partial(_load_table, table, is_only),
            part="" if is_only else table.path.stem,
        )
        for table in tables
    ]
    own = {name for table in tables for name in table.own(folder)}
    if own <= {*folder.files}:
        own |= {*filter(is_picture, folder.files)}
    return found, own


def _of_series(folder: Path, series: list[Series], csvs: tuple[Path, ...]) -> list[Found]:
    """Return a drive for each series in a folder."""
    parts = [_part(one, number) for number, one in enumerate(series, 1)]
    if len(series) == 1 or len({*parts}) < len(parts):
        parts = [""] if len(series) == 1 else [f"series_{n}" for n in range(1, 1 + len(parts))]
    return [
        Found(path=folder, load=partial(_load_series, one, csvs), part=part)
        for one, part in zip(series, parts, strict=True)
    ]


def _part(series: Series, number: int) -> str:
    return series.name if series.name.isascii() and series.name.isidentifier() else f"s{number}"


def _drive(
    drive_id: str,
    times: Floats,
    pictures: ImageFrames,
    log: ActionLog | None,
    notices: Sequence[str],
) -> Drive:
    return Drive(
        id=drive_id,
        source="pictures",
        timestamps=times,
        reader=pictures,
        log=log,
        assumptions=(*notices, *about_sizes(pictures)),
    )


def _at_rate(reading: Reading) -> str:
    rate = reading.video_fps
    if rate is None:
        return (
            f"nothing says when the pictures were taken; {FALLBACK_RATE:g} frames/s are assumed "
            "(set it with `video_fps`)"
        )
    return (
        f"nothing says when the pictures were taken; {rate:g} frames/s are taken, as `video_fps` "
        "says"
    )


def _load_table(
    found: PictureTable,
    is_only: bool,
    path: Path,
    drive_id: str,
    reading: Reading,
    actions: bool,
) -> Drive:
    """Load the pictures that a CSV names, with the actions in its rows."""
    named = read_table(found, is_only=is_only)
    notices = [*named.notices]
    clock = named.clock()
    if clock is None:
        notices.append(_at_rate(reading))
        clock = even_times(len(named.table.rows), reading.video_fps)
    _check_rows(named.table, clock)
    start = clock[named.rows[0]]
    times = check_picture_times(one_line(found.path), clock[named.rows])
    log = None
    if actions and _has_actions(found.path, reading):
        log = read_action_file(found.path, reading, row_times=clock - start)
    elif actions:
        alike = [look_alike(named.table, channel) for channel in (SPEED, STEERING)]
        notices += [line for line in alike if line] or [
            f"{plain(found.path.name)} has neither speed nor steering"
        ]
    return _drive(drive_id, times, named.pictures, log, notices)


def _check_rows(table: CsvTable, clock: Floats) -> None:
    for row in np.flatnonzero(~(np.diff(clock) > 0))[:1] + 1:
        raise table.fail(
            "its time is not later than that of the row above; sort the rows and remove duplicates",
            int(row),
        )


def _has_actions(path: Path, reading: Reading) -> bool:
    """Return whether a CSV has a column with actions, whose name is known or set by the user."""
    own = {name.strip().lower() for name in (reading.speed, reading.steering) if name}
    return not {*SPEEDS, *STEERINGS, *own}.isdisjoint(read_header(path))


def _load_series(
    series: Series,
    csvs: tuple[Path, ...],
    path: Path,
    drive_id: str,
    reading: Reading,
    actions: bool,
) -> Drive:
    """Load a series of pictures, with the actions in the only action file beside them."""

    def bad_name(index: int, error: object) -> DriveSimError:
        return DriveSimError(f"{one_line(path)}: {one_line(error)}; rename or remove it")

    kept, pictures = find_pictures(path, series.names, bad_name)
    if len(kept) < 2:
        raise DriveSimError(f"{one_line(path)}: its pictures are no longer there")
    # The CSV may also give the times of numbered pictures.
    is_needed = actions or not series.times
    action_file = _action_file(path, csvs, reading) if is_needed else None
    table = read_csv(action_file) if action_file is not None else None
    notices = [
        f"{plain(csv.name)} has neither speed nor steering and is left out"
        for csv in csvs
        if action_file is None and actions
    ]
    start = 0.0
    if series.times:
        stamps = np.array(series.times)[kept]
        times, start = check_picture_times(one_line(path), stamps), float(stamps[0])
        if reading.video_fps is not None:
            notices.append("`video_fps` is not used, because the names of the pictures are times")
    elif table is not None and (rows := _row_times(table, len(kept))) is not None:
        times, start = check_picture_times(one_line(table.path), rows), float(rows[0])
        notices.append(
            f"the times of the pictures are those of {plain(table.path.name)}, which has a row for "
            "each"
        )
    else:
        numbers = np.array(series.numbers, np.int64)[kept] - series.numbers[0]
        notices.append(_at_rate(reading))
        if missing := int(numbers[-1] // series.step) + 1 - len(numbers):
            notices.append(f"{missing} numbers have no picture, which leaves gaps")
        if series.step > 1:
            notices.append(f"the numbers of the pictures rise by {series.step}; each is one frame")
        at = numbers / series.step / (reading.video_fps or FALLBACK_RATE)
        times = check_picture_times(one_line(path), at)
    log = None
    if actions and table is not None:
        log = _log(table, series, np.array(kept), times, start, reading, notices)
    return _drive(drive_id, times, pictures, log, notices)


def _action_file(folder: Path, csvs: Sequence[Path], reading: Reading) -> Path | None:
    usable = [path for path in csvs if _has_actions(path, reading)]
    if len(usable) > 1:
        listed = ", ".join(plain(path.name) for path in usable[:3])
        raise DriveSimError(
            f"{one_line(folder)}: several CSVs may belong to its pictures ({listed}); keep "
            "one of them there"
        )
    return usable[0] if usable else None


def _row_times(table: CsvTable, pictures: int) -> Floats | None:
    """Return the times of the rows if there is one for each picture."""
    column = find_time(table)
    if column is None or len(table.rows) != pictures:
        return None
    return table.numbers(column.name) * column.scale


def _log(
    table: CsvTable,
    series: Series,
    kept: Ints,
    times: Floats,
    start: float,
    reading: Reading,
    notices: list[str],
) -> ActionLog:
    """Read the actions beside a series. Times since 1970 in names are on the clock of the CSV, if
    they overlap. A column `frame` counts as the pictures' names do, or else from 0."""
    column = find_time(table)
    if column is not None:
        clock = table.numbers(column.name) * column.scale
        if clock[0] <= start + times[-1] and start <= clock[-1]:
            reading = replace(reading, time_offset=reading.time_offset - start)
            _check_rows(table, clock)
            return read_action_file(table.path, reading, row_times=clock)
        return read_action_file(table.path, reading, frame_times=times)
    if "frame" not in table.names or not series.numbers:
        return read_action_file(table.path, reading, frame_times=times)
    frames = table.numbers("frame")
    numbers = np.array(series.numbers, np.float64)[kept]
    if not np.isin(frames, numbers).all():
        if series.numbers[0]:
            notices.append(
                f"frame 0 of {plain(table.path.name)} is {plain(series.names[kept[0]])}: the "
                "column frame does not count as the names do"
            )
        return read_action_file(table.path, reading, frame_times=times)
    if series.numbers[0]:
        notices.append(
            f"the column frame of {plain(table.path.name)} counts as the names of the pictures "
            f"do: {series.numbers[0]} is {plain(series.names[0])}"
        )
    rows = times[np.searchsorted(numbers, frames)]
    _check_rows(table, rows)
    return read_action_file(table.path, reading, row_times=rows)
