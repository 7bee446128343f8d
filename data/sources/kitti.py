"""Read recordings of KITTI (raw data): folders of pictures, and the navigation system `oxts`.

Each of `image_00` ... `image_03` and `oxts` has `timestamps.txt`, with a line for each sample, and
`data/`, with a file for each sample, whose name is the number of the line from 0. The files of
`oxts` contain 30 numbers: the 9th is the forward speed in m/s, and the 23rd the yaw rate in rad/s,
left positive. https://www.cvlibs.net/datasets/kitti/raw_data.php
"""

import re
from datetime import datetime
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import ActionLog
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats
from driving_sim.data.drive import Drive
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.inner_name import inside
from driving_sim.data.sources.path_curvature import path_log
from driving_sim.data.sources.pictures.files import (
    about_sizes,
    check_picture_times,
    find_pictures,
    unused_rate,
)
from driving_sim.data.sources.source import Contents, Folder, Found
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown

CAMERAS = ("image_02", "image_03", "image_00", "image_01")
"""The colour cameras, then the grey ones. The first one that is there is read."""
_TIMES = "timestamps.txt"
_OXTS = "oxts"
_OWN = frozenset((*CAMERAS, _OXTS, "velodyne_points"))
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d{1,9})?", re.ASCII)
_FORWARD_SPEED, _YAW_RATE = 8, 22
_VALUES = 30
_MOST_BYTES = 2**16  # of a file of `oxts`
_MOST_TIMES_BYTES = 2**26
_MOST_BACKWARD = 0.1


def detect(folder: Folder) -> bool:
    """Return whether a folder is a recording of KITTI."""
    cameras = [name for name in CAMERAS if name in folder.folders]
    return bool(cameras) and (
        _OXTS in folder.folders
        or any((folder.path / camera / _TIMES).is_file() for camera in cameras)
    )


def drives(folder: Folder) -> Contents:
    """Return the drive of a recording."""
    return Contents(drives=(Found(path=folder.path, load=load),), own=_OWN)


def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Load a recording: the pictures of its best camera and, if `actions` is set, its `oxts`.

    Raises DriveSimError if there are fewer than 2 pictures with a time, or if a file is bad.
    """
    camera = next(name for name in CAMERAS if (path / name).is_dir())
    notices = []
    others = [name for name in CAMERAS if (path / name).is_dir() and name != camera]
    if others:
        notices.append(f"of its cameras, {camera} is read, and not {', '.join(others)}")
    stamps = _timestamps(path, f"{camera}/{_TIMES}")
    kept, pictures, lines = _pictures(path / camera, len(stamps))
    notices += [*lines, *unused_rate(reading)]
    stamps = stamps[kept]
    times = check_picture_times(one_line(path / camera), stamps)
    log = None
    if actions and (path / _OXTS).is_dir():
        log = _read_oxts(path, float(stamps[0]) - reading.time_offset, reading)
    elif actions:
        notices.append(f"there is no {_OXTS}, so there are no actions")
    return Drive(
        id=drive_id,
        source="kitti",
        timestamps=times,
        reader=pictures,
        log=log,
        assumptions=(*notices, *about_sizes(pictures)),
    )


def _pictures(camera: Path, count: int) -> tuple[list[int], ImageFrames, list[str]]:
    def bad_name(index: int, error: object) -> DriveSimError:
        return DriveSimError(f"{one_line(camera)}: {one_line(error)}; remove it")

    for suffix in (".png", ".jpg"):
        names = [f"data/{number:010}{suffix}" for number in range(count)]
        kept, pictures, lines = find_pictures(camera, names, bad_name)
        if kept:
            break
    if len(kept) < 2:
        raise DriveSimError(
            f"{one_line(camera)}: has {len(kept)} of the {count} pictures data/0000000000.png and "
            f"so on that {_TIMES} lists; at least 2 are needed"
        )
    return kept, pictures, lines


def _read(recording: Path, name: str, most: int) -> bytes | None:
    """Return the content of a file below a recording, or None if it is missing.

    Raises DriveSimError if it has more than `most` bytes, or if the name leads outside.
    """
    try:
        path = inside(recording, name)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return content
    except (OSError, ValueError) as error:
        raise DriveSimError(
            f"{one_line(recording / name)}: cannot be read ({one_line(error)})"
        ) from None


def _timestamps(recording: Path, name: str) -> Floats:
    """Return the time in each line of a file in seconds. Raises DriveSimError, with the line."""
    path, content = recording / name, _read(recording, name, _MOST_TIMES_BYTES)
    if content is None:
        raise DriveSimError(f"{one_line(path)}: is no file; download the recording again")
    lines = [line.strip() for line in content.decode("utf-8", "replace").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return np.array([_seconds(line, path, number) for number, line in enumerate(lines, 1)])


def _seconds(text: str, path: Path, line: int) -> float:
    match = _STAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError("no time")
        second = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise DriveSimError(
            f"{one_line(path)}, line {line}: {shown(text)} is not a time such as 2011-09-26 "
            "13:02:25.964389445; download the recording again"
        ) from None
    return (second - datetime(1970, 1, 1)).total_seconds() + float(match[2] or 0)


def _read_oxts(recording: Path, start: float, reading: Reading) -> ActionLog:
    """Return the speed and the curvature of the path, timed from `start`."""
    oxts = recording / _OXTS
    reading.check_kind(f"{one_line(oxts)}: the steering of KITTI", "curvature")
    times, values, notices = _timestamps(recording, f"{_OXTS}/{_TIMES}") - start, [], []
    kept = []
    for number in range(len(times)):
        found = _sample(recording, f"{_OXTS}/data/{number:010}.txt")
        if found is not None:
            kept.append(number)
            values.append(found)
    if missing := len(times) - len(kept):
        notices.append(f"{missing} of {len(times)} samples of oxts are missing")
    times = times[kept]
    later = np.append(True, times[1:] > np.maximum.accumulate(times)[:-1]) if kept else kept
    if len(kept) < 2 or np.mean(later) < 1 - _MOST_BACKWARD:
        raise DriveSimError(
            f"{one_line(oxts)}: has {len(kept)} samples, {int(np.sum(later))} of which are later "
            "than all before; download the recording again"
        )
    if early := int((~np.array(later)).sum()):
        notices.append(f"{early} samples of oxts are not later than those before and are left out")
    speed, yaw_rate = np.array(values)[later].T
    log = path_log(times[later], speed, yaw_rate, one_line(oxts))
    return ActionLog(
        speed=log.speed,
        steering=log.steering,
        steering_kind=log.steering_kind,
        origin=log.origin,
        notices=(*notices, *log.notices),
    )


def _sample(recording: Path, name: str) -> tuple[float, float] | None:
    """Return the forward speed and the yaw rate in a file, or None if the file is missing."""
    content = _read(recording, name, _MOST_BYTES)
    if content is None:
        return None
    cells = content.split()
    try:
        if len(cells) != _VALUES:
            raise ValueError(f"it has {len(cells)}")
        return float(cells[_FORWARD_SPEED]), float(cells[_YAW_RATE])
    except ValueError as error:
        raise DriveSimError(
            f"{one_line(recording / name)}: must contain {_VALUES} numbers ({one_line(error)}); "
            "download the recording again"
        ) from None
