"""Read recordings of the Udacity self-driving-car simulator: `driving_log.csv` and `IMG/`.

The log has seven columns: three for the image paths of the centre, left and right camera (as they
were on the computer that recorded them), then steering (1 is 25 degrees to the right, -1 is 25
degrees to the left), throttle, brake and speed (mph). The images of the centre camera are the
frames of the drive, and their file names contain their times.
https://github.com/udacity/self-driving-car-sim
"""

from functools import partial
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import ActionLog
from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.sources.pictures.files import about_sizes, find_pictures, unused_rate
from driving_sim.data.sources.source import Contents, Folder, Found, refused
from driving_sim.data.sources.udacity.log import LOG_NAME, Row, Take, bad_row, read_log
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError

_IMAGES = "IMG"
_OWN = frozenset((LOG_NAME, _IMAGES))

# In a real take that ends with a reset, pictures of this size differ by 34 grey levels between the
# last two rows, by 1 between the two rows before, and by 3 between the first row and the last.
_COMPARED = FrameSize(height=16, width=32)
_RESET_JUMP = 3


def detect(folder: Folder) -> bool:
    """Return whether a folder contains a recording of the simulator."""
    return LOG_NAME in folder.files


def drives(folder: Folder) -> Contents:
    """Return a drive for each take of a recording."""
    try:
        log = read_log(folder.path / LOG_NAME)
    except DriveSimError as error:
        found = [Found(path=folder.path, load=refused(error))]
    else:
        found = [
            Found(path=folder.path, load=partial(_load, take, log.notices), part=take.name)
            for take in log.takes
        ]
    return Contents(drives=tuple(found), own=_OWN)


def _load(
    take: Take,
    notices: tuple[str, ...],
    path: Path,
    drive_id: str,
    reading: Reading,
    actions: bool,
) -> Drive:
    """Load a take: its image files and, if `actions` is set, its actions.

    Raises DriveSimError if fewer than 2 of its images are there, or if a name leads elsewhere.
    """
    rows, pictures, lines = _with_pictures(path, take.rows)
    own = [*about_sizes(pictures), *lines, *unused_rate(reading)]
    if _ends_with_reset(pictures):
        own.append("the last picture is the first one again (a reset); it is left out")
        rows, pictures = rows[:-1], ImageFrames(pictures.paths[:-1])
    times = np.array([(row.moment - rows[0].moment).total_seconds() for row in rows])
    log = None
    if actions:
        reading.check_kind(f"{path / LOG_NAME}: a simulator's steering", "road_wheel")
        values = np.array([(row.speed_mps, row.road_wheel_rad) for row in rows])
        clock = times + reading.time_offset
        log = ActionLog.on_one_clock(clock, values, "road_wheel", origin=str(path / LOG_NAME))
    return Drive(
        id=drive_id,
        source="udacity",
        timestamps=times,
        reader=pictures,
        log=log,
        assumptions=(*notices, *own),
    )


def _with_pictures(
    recording: Path, rows: tuple[Row, ...]
) -> tuple[list[Row], ImageFrames, list[str]]:
    """Return the rows whose picture is there, these pictures, and a line about other rows."""
    kept, pictures, lines = find_pictures(
        recording,
        [f"{_IMAGES}/{row.image}" for row in rows],
        lambda index, error: bad_row(recording / LOG_NAME, rows[index].line, error),
    )
    if len(kept) < 2:
        raise DriveSimError(
            f"{recording / LOG_NAME}: only {len(kept)} of its {len(rows)} pictures are in "
            f"{recording / _IMAGES} (the first is {rows[0].image!r}); copy the pictures there"
        )
    return [rows[index] for index in kept], pictures, lines


def _ends_with_reset(pictures: ImageFrames) -> bool:
    """Return whether the last picture jumps back to where the first one was taken.

    The simulator puts the car back there after a take, and sometimes before it takes the last
    picture. The picture is not exactly the first one.
    """
    count = len(pictures.paths)
    if count < 4:
        return False
    try:
        chosen = pictures.read(np.array([0, count - 3, count - 2, count - 1]), _COMPARED)
    except DriveSimError:  # A damaged picture is reported when its frame is read.
        return False
    first, earlier, before, last = chosen.astype(np.float64)
    jump = np.abs(last - before).mean()
    step, back = np.abs(before - earlier).mean(), np.abs(last - first).mean()
    return bool(jump > _RESET_JUMP * max(step, back))
