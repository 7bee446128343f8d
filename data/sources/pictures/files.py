"""Find the picture files of a drive, and check their times and sizes."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path, PurePath

import numpy as np

from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats
from driving_sim.data.image_frames import ImageFrames, picture_size
from driving_sim.data.inner_name import inside
from driving_sim.data.video.file import MAX_DURATION_S
from driving_sim.data.video.timing import FALLBACK_RATE
from driving_sim.engine.errors import DriveSimError

PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp"))
"""Suffixes, in lower case, of the pictures that drivesim reads."""
_SIZES_COMPARED = 8


def is_picture(name: str) -> bool:
    """Return whether a file has the suffix of a picture, in any case."""
    return PurePath(name).suffix.lower() in PICTURE_SUFFIXES


def find_pictures(
    folder: Path, names: Sequence[str], bad_name: Callable[[int, object], DriveSimError]
) -> tuple[list[int], ImageFrames, list[str]]:
    """Return the indices of the `names` whose files are in `folder`, these pictures, and a line
    about the others, if there are any.

    Raises the error that `bad_name` returns for the index of a name and a reason, if the name leads
    outside `folder` or cannot be the name of a file.
    """
    kept, paths, home = [], [], folder.resolve()
    for index, name in enumerate(names):
        try:
            path = inside(folder, name, home)
            if not path.is_file():
                continue
        except (ValueError, OSError) as error:  # `is_file` raises OSError for very long names.
            raise bad_name(index, error) from None
        kept.append(index)
        paths.append(path)
    missing = len(names) - len(kept)
    line = f"{missing} of {len(names)} pictures are missing; they are left out, which leaves gaps"
    return kept, ImageFrames(tuple(paths)), [line] if missing else []


def at_rate(reading: Reading) -> str:
    """Return the line about pictures without times, which have the rate that is set, or a usual
    one."""
    nothing = "nothing says when the pictures were taken"
    if reading.video_fps is None:
        return f"{nothing}; {FALLBACK_RATE:g} frames/s are assumed (set it with `video_fps`)"
    return f"{nothing}; {reading.video_fps:g} frames/s are taken, as `video_fps` says"


def unused_rate(reading: Reading) -> list[str]:
    """Return a line about the rate if it is set although the pictures have times."""
    if reading.video_fps is None:
        return []
    return ["`video_fps` is not used, because the pictures have times"]


def about_sizes(pictures: ImageFrames) -> list[str]:
    """Return a line about pictures of different sizes, if there are any among a few of them."""
    count = min(_SIZES_COMPARED, len(pictures.paths))
    chosen = np.linspace(0, len(pictures.paths) - 1, count).astype(np.int64)
    sizes = [size for size in map(picture_size, pictures.files(chosen)) if size]
    for (width, height), other in pairwise(sizes):
        if (width, height) != other:
            return [
                f"its pictures have different sizes, such as {width}×{height} and "
                f"{other[0]}×{other[1]} pixels; each is scaled and cropped for itself"
            ]
    return []


def check_picture_times(where: object, times: Floats) -> Floats:
    """Return the times of pictures in seconds from the first one.

    Raises DriveSimError, which begins with `where`, unless there are at least 2, they increase and
    they span at most seven days.
    """
    if len(times) < 2:
        raise DriveSimError(
            f"{where}: has {len(times)} pictures with a time; at least 2 are needed"
        )
    from_first: Floats = times - times[0]
    if not (np.diff(from_first) > 0).all():
        number = int(np.flatnonzero(~(np.diff(from_first) > 0))[0]) + 2
        raise DriveSimError(
            f"{where}: the time of picture {number} is not later than that of the one before; sort "
            "the pictures and remove duplicates"
        )
    if not from_first[-1] <= MAX_DURATION_S:
        raise DriveSimError(
            f"{where}: its pictures span more than {MAX_DURATION_S / 86400:.0f} days; check the "
            "unit of their times"
        )
    return from_first
