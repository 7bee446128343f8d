"""Read recordings of the Udacity self-driving-car simulator: `driving_log.csv` and `IMG/`.

The log has seven columns: three for the image paths of the centre, left and right camera (as they
were on the computer that recorded them), then steering (1 is 25 degrees to the right, -1 is 25
degrees to the left), throttle, brake and speed (mph). The images of the centre camera are the
frames of the drive, and their file names contain their times.
https://github.com/udacity/self-driving-car-sim
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from driving_sim.data.actions.action_log import ActionLog
from driving_sim.data.actions.csv_table import read_rows
from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.drive import Drive
from driving_sim.data.inner_name import inside
from driving_sim.data.reading import Reading
from driving_sim.data.video.file import check_picture
from driving_sim.data.video.frame_size import FrameSize, fit
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.engine.parsing import one_line

LOG_NAME = "driving_log.csv"
_IMAGES = "IMG"
_FORMATS = ("JPEG", "PNG", "BMP")
FULL_LOCK_RAD = math.radians(25)
_MPS_PER_MPH = 0.44704
_COLUMNS = 7
_STAMP = re.compile(r"_(\d{4}(?:_\d{2}){5})_(\d{3})\.\w+$")


def is_recording(folder: Path) -> bool:
    """Return whether a folder contains a recording of the simulator."""
    return (folder / LOG_NAME).is_file()


def _picture(path: Path, size: FrameSize | None) -> Pixels:
    """Read an image, then scale and crop it as the video readers do."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            check_picture(path, file.height, file.width)
            image = file.convert("RGB")
    except DriveSimError:
        raise
    # Catch everything, because a damaged image can raise any kind of error. Pillow only warns about
    # very large images. If the user turns warnings into errors, this warning is caught here too,
    # which is right: `check_picture` would refuse such an image anyway.
    except Exception as error:
        reason = one_line(error)
        raise BadDriveError(f"{path}: cannot be read as an image ({reason})") from None
    geometry = fit(image.height, image.width, size)
    check_picture(path, geometry.height, geometry.width)
    scaled = image.resize((geometry.width, geometry.height), Image.Resampling.BILINEAR)
    return np.array(scaled)[geometry.rows, geometry.columns]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFrames:
    """Frames stored as image files, one image for each frame."""

    paths: tuple[Path, ...]

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order."""
        return np.stack([_picture(self.paths[index], size) for index in indices])

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield frames [H, W, 3] at ascending `indices`, or all frames if it is None."""
        numbers = range(len(self.paths)) if indices is None else indices
        return (_picture(self.paths[index], size) for index in numbers)

    def files(self, indices: Ints) -> list[Path]:
        """Return the image files of the frames at `indices`."""
        return [self.paths[index] for index in indices]


class _Row(NamedTuple):
    image: Path
    moment: datetime
    speed_mps: float
    road_wheel_rad: float


def _moment(name: str) -> datetime:
    match = _STAMP.search(name)
    if match is None:
        raise ValueError(
            f"the name {name!r} contains no time, unlike center_2018_07_16_17_12_55_715.jpg"
        )
    second = datetime.strptime(match[1], "%Y_%m_%d_%H_%M_%S")
    return second + timedelta(milliseconds=int(match[2]))


def _row(cells: list[str], recording: Path) -> _Row:
    if len(cells) != _COLUMNS:
        raise ValueError(f"has {len(cells)} cells instead of {_COLUMNS}")
    # The path may come from any operating system. PureWindowsPath accepts both separators.
    name = PureWindowsPath(cells[0].strip()).name
    steering, speed = float(cells[3]), float(cells[6])
    if not (abs(steering) <= 1 and -100 < speed < 300):
        raise ValueError(
            f"steering {steering:g} must be from -1 to 1, and speed {speed:g} mph from -100 to 300"
        )
    image = inside(recording, f"{_IMAGES}/{name}")
    if not image.is_file():
        raise ValueError(f"image {name!r} is not in {recording / _IMAGES}")
    return _Row(image, _moment(name), speed * _MPS_PER_MPH, -steering * FULL_LOCK_RAD)


def _read_log(log: Path) -> list[_Row]:
    rows: list[_Row] = []
    for number, (line, cells) in enumerate(read_rows(log)):
        if number == 0 and cells[0].strip().lower() == "center":
            continue
        try:
            rows.append(_row(cells, log.parent))
            if len(rows) > 1 and rows[-1].moment <= rows[-2].moment:
                raise ValueError("the time of the image is not later than in the line above")
        except (ValueError, OSError) as error:  # `is_file` raises OSError for very long names.
            raise DriveSimError(
                f"{log}, line {line}: {one_line(error)}; correct it or remove the row"
            ) from None
    if len(rows) < 2:
        raise DriveSimError(f"{log}: has {len(rows)} rows; at least 2 are needed")
    return rows


def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Load a recording: its image files and, if `actions` is set, its actions.

    Raises DriveSimError, with the line number, if a row of the log cannot be used.
    """
    rows = _read_log(path / LOG_NAME)
    times = np.array([(row.moment - rows[0].moment).total_seconds() for row in rows])
    log = None
    if actions:
        reading.check_kind(f"{path / LOG_NAME}: a simulator's steering", "road_wheel")
        values = np.array([(row.speed_mps, row.road_wheel_rad) for row in rows])
        clock = times + reading.time_offset
        log = ActionLog.on_one_clock(clock, values, "road_wheel", origin=str(path / LOG_NAME))
    reader = ImageFrames(tuple(row.image for row in rows))
    return Drive(id=drive_id, source="udacity", timestamps=times, reader=reader, log=log)
