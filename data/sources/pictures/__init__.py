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
from driving_sim.data.actions.columns import find_time, look_alike
from driving_sim.data.actions.csv_table import CsvTable, plain, read_csv
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.drive import Drive
from driving_sim.data.image_frames import ImageFrames, picture_size
from driving_sim.data.sources import video_folder
from driving_sim.data.sources.pictures.files import (
    about_sizes,
    at_rate,
    check_picture_times,
    find_pictures,
    is_picture,
    unused_rate,
)
from driving_sim.data.sources.pictures.names import Series, find_series
from driving_sim.data.sources.pictures.table import (
    PictureTable,
    find_tables,
    has_actions,
    read_table,
)
from driving_sim.data.sources.source import Contents, Folder, Found, refused
from driving_sim.data.video.timing import FALLBACK_RATE
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_INSPECTION = "inspection.json"


def _csvs(folder: Folder) -> list[str]:
    """Return the CSVs in a folder that belong to no video."""
    videos = {PurePath(name).stem for name in folder.files if video_folder.is_video(name)}
    csvs = [name for name in folder.files if PurePath(name).suffix.lower() == ".csv"]
    return [name for name in csvs if PurePath(name).stem not in videos]


def _has_videos(folder: Folder) -> bool:
    return any(map(video_folder.is_video, folder.files))


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


def _paired(folder: Folder, csvs: Sequence[str]) -> tuple[list[_Paired], list[Found]]:
    """Return the pairs `NAME.csv` and `NAME/`, or the only CSV and the only folder with series.

    Other action files are drives that cannot be used if there are other folders that they may
    belong to. Beside videos, only names count.
    """
    actions = [name for name in csvs if is_action_file(folder.path / name)]
    if not actions:
        return [], []
    below = [Folder.of(folder.path / name) for name in folder.folders]
    series = {one.path.name: _series(one) for one in below if not _csvs(one)}
    series = {name: found for name, found in series.items() if found}
    if len(actions) == len(series) == 1 and not _has_videos(folder):
        return [_Paired(actions[0], name, found) for name, found in series.items()], []
    stems = {PurePath(name).stem: name for name in actions}
    pairs = [_Paired(stems[name], name, found) for name, found in series.items() if name in stems]
    rest = [name for name in series if name not in stems]
    unclear = [name for name in actions if PurePath(name).stem not in series]
    if not rest or _has_videos(folder):
        return pairs, []
    return pairs, [_unclear(folder.path / name, rest) for name in unclear]


def _unclear(csv: Path, folders: Sequence[str]) -> Found:
    listed = ", ".join(map(plain, folders[:3])) + ", ..." * (len(folders) > 3)
    error = DriveSimError(
        f"{one_line(csv)}: may belong to the pictures in {listed}; give it the name of the folder "
        f"that it belongs to, such as {plain(folders[0])}.csv, or remove it"
    )
    return Found(path=csv, load=refused(error), has_frames=False)


def drives(folder: Folder, reading: Reading) -> Contents:
    """Return the drives of pictures in a folder, and its videos."""
    csvs = _csvs(folder)
    usable = [name for name in csvs if has_actions(folder.path / name, reading)]
    # Without a CSV, pictures beside videos are thumbnails of them.
    series = _series(folder) if usable or not _has_videos(folder) else []
    notices: tuple[str, ...] = ()
    if tables := find_tables(folder, csvs, reading):
        found = _of_tables(tables, folder.path)
        own = {name for table in tables for name in (table.path.name, *table.pictures)}
        notices = _about_unnamed(tables)
    elif series:
        used = usable or csvs
        found = _of_series(folder.path, series, tuple(folder.path / name for name in used))
        own = {*used, *(name for one in series for name in one.names)}
    else:
        pairs, unclear = _paired(folder, csvs)
        found = [
            one
            for pair in pairs
            for one in _of_series(folder.path / pair.folder, pair.series, (folder.path / pair.csv,))
        ]
        own = {name for pair in pairs for name in (pair.csv, *_own(pair))}
        found += unclear
        own |= {one.path.name for one in unclear}
    rest = [name for name in folder.files if name not in own]
    videos = video_folder.contents_of(folder, rest)
    return replace(videos, drives=(*found, *videos.drives), own=videos.own | own, notices=notices)


def _own(pair: _Paired) -> list[str]:
    return [f"{pair.folder}/{name}" for one in pair.series for name in one.names]


def _of_tables(tables: Sequence[PictureTable], folder: Path) -> list[Found]:
    """Return a drive for each CSV that names pictures."""
    return [
        Found(
            path=folder,
            load=partial(_load_table, table),
            part=table.path.stem if len(tables) > 1 else "",
        )
        for table in tables
    ]


def _about_unnamed(tables: Sequence[PictureTable]) -> tuple[str, ...]:
    named = {name for table in tables for name in table.named}
    pictures = {name for table in tables for name in table.pictures}
    others = sorted(name for name in pictures if PurePath(name).name not in named)
    if not others:
        return ()
    return (
        f"{len(others)} pictures that no CSV names are left out (the first is {plain(others[0])})",
    )


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


def _load_table(
    found: PictureTable, path: Path, drive_id: str, reading: Reading, actions: bool
) -> Drive:
    """Load the pictures that a CSV names, with the actions in its rows."""
    named = read_table(found)
    clock, lines = named.clock(reading)
    notices = [*named.notices, *lines]
    _check_rows(named.table, clock)
    timed = np.isfinite(clock[named.rows])
    pictures = ImageFrames(tuple(named.pictures.files(np.flatnonzero(timed))))
    stamps = clock[named.rows][timed]
    times = check_picture_times(one_line(found.path), stamps)
    log = None
    if actions and has_actions(found.path, reading):
        log = read_action_file(found.path, reading, row_times=clock - stamps[0])
    elif actions:
        alike = [look_alike(named.table, channel) for channel in (SPEED, STEERING)]
        notices += [line for line in alike if line] or [
            f"{plain(found.path.name)} has neither speed nor steering"
        ]
    return _drive(drive_id, times, pictures, log, notices)


def _check_rows(table: CsvTable, clock: Floats) -> None:
    """Raise DriveSimError, with the line, unless the times of the rows that have one increase."""
    timed = np.flatnonzero(np.isfinite(clock))
    for row in timed[1:][np.diff(clock[timed]) <= 0][:1]:
        raise table.fail(
            "its time is not later than that of the row above; if a clock starts again there, "
            "split the CSV there; otherwise sort the rows and remove duplicates",
            int(row),
        )


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

    kept, pictures, lines = find_pictures(path, series.names, bad_name)
    if len(kept) < 2:
        raise DriveSimError(f"{one_line(path)}: its pictures are no longer there")
    # The CSV may also give the times of numbered pictures.
    is_needed = actions or not series.times
    action_file = _action_file(path, csvs, reading) if is_needed else None
    table = read_csv(action_file) if action_file is not None else None
    notices = [
        *lines,
        *(
            f"{plain(csv.name)} has neither speed nor steering and is left out"
            for csv in csvs
            if action_file is None and actions
        ),
    ]
    start = 0.0
    if series.times:
        stamps = np.array(series.times)[kept]
        times, start = check_picture_times(one_line(path), stamps), float(stamps[0])
        notices += unused_rate(reading)
    elif table is not None and (rows := _row_times(table, len(kept))) is not None:
        times, start = check_picture_times(one_line(table.path), rows), float(rows[0])
        notices.append(
            f"the times of the pictures are those of {plain(table.path.name)}, which has a row for "
            "each"
        )
        notices += unused_rate(reading)
    else:
        numbers = np.array(series.numbers, np.int64)[kept] - series.numbers[0]
        notices.append(at_rate(reading))
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
    usable = [path for path in csvs if has_actions(path, reading)]
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
    first, last = series.numbers[kept[0]], series.numbers[kept[-1]]
    file, name = plain(table.path.name), plain(series.names[kept[0]])
    steps = (frames - first) / series.step
    if not ((frames >= first) & (frames <= last) & (steps == np.floor(steps))).all():
        if len(kept) != (last - first) // series.step + 1:
            raise table.fail(
                "its column frame does not count as the names of the pictures do, some of which "
                f"are missing; let it count from {first} to {last}, as they do"
            )
        if first:
            notices.append(
                f"frame 0 of {file} is {name}: the column frame does not count as the names do"
            )
        return read_action_file(table.path, reading, frame_times=times)
    if first:
        notices.append(
            f"the column frame of {file} counts as the names of the pictures do: {first} is {name}"
        )
    rows = steps / (reading.video_fps or FALLBACK_RATE)
    _check_rows(table, rows)
    return read_action_file(table.path, reading, row_times=rows)
