"""What the names of pictures say: their numbers, or the times at which they were taken."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from driving_sim.data.actions.alignment import LONGEST_GAP_S

FEWEST = 10
"""A series without a CSV needs at least this many pictures."""
_MOST_MISSING = 0.2
_LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)
_LONGEST_NUMBER = 12  # digits; longer ones are not numbers of frames

# Names that cameras and phones give to photos: IMG_0001, DSC00001, P1010001, 20180716_171255.
_PHOTO = re.compile(
    r"(?:(?:mv)?img|dsc[nf]?|_dsc|dji|gopr?|pxl|sam|wp|cimg|pict|photo|screenshot)[-_ ]?\d.*"
    r"|p\d{7}|\d{8}_\d{6}",
    re.IGNORECASE,
)
_LARGEST_STEP = 100
_SHORTEST_STEP_S = 0.002  # No camera in a car takes 500 frames/s.
_DATE = re.compile(
    r"(?<!\d)(\d{4})[-_]?(\d\d)[-_]?(\d\d)[-_T ]?(\d\d)[-_:]?(\d\d)[-_:]?(\d\d)[-_.](\d{1,6})$",
    re.ASCII,
)
# Times since 1970 in s, ms, µs and ns, by their number of digits, from 2001 to 2286.
_SINCE_1970 = re.compile(
    r"(?<!\d)(?:([1-9]\d{9}(?:[._]\d{1,9})?)|([1-9]\d{12})|([1-9]\d{15})|([1-9]\d{18}))$", re.ASCII
)
_SCALES = (1.0, 1e-3, 1e-6, 1e-9)


class Series(NamedTuple):
    """Pictures that belong together, in order of time."""

    name: str
    """What their names have in common, or empty if there is nothing but numbers."""
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    """Number of each picture; empty if the names contain times."""
    times: tuple[float, ...]
    """Time of each picture in seconds, on any clock; empty if the names contain numbers."""

    @property
    def step(self) -> int:
        """The usual difference between the numbers of two pictures."""
        return int(np.median(np.diff(self.numbers)))


class Moment(NamedTuple):
    """The time in the name of a picture."""

    seconds: float
    """Seconds since 1970."""
    start: int
    """Where the time begins in the name."""


def moment(name: str) -> Moment | None:
    """Return the time in a picture's name, or None if there is none.

    The name ends, before the suffix, with a date, a time of day and a fraction of a second, such as
    2018_07_16_17_12_55_715, or with a number of 10, 13, 16 or 19 digits: s, ms, µs or ns.
    """
    stem = PurePath(name).stem
    if match := _DATE.search(stem):
        *date, fraction = match.groups()
        try:
            second = datetime(*map(int, date))  # type: ignore[arg-type]
        except ValueError:
            return None
        seconds = (second - datetime(1970, 1, 1)) / timedelta(seconds=1)
        return Moment(seconds + float(f"0.{fraction}"), match.start())
    if match := _SINCE_1970.search(stem):
        text, scale = next((t, s) for t, s in zip(match.groups(), _SCALES, strict=True) if t)
        return Moment(float(text.replace("_", ".")) * scale, match.start())
    return None


def find_series(names: Iterable[str]) -> list[Series]:
    """Return the series among the names of pictures in a folder, sorted by name.

    A series has at least 10 pictures whose names differ only in a number or a time. Its numbers
    rise in equal steps, and at most a fifth of them is missing. Its times are at most 1.5 s apart,
    as the median. Photos with the names that cameras give them, such as IMG_0001, are none, nor
    are bursts of photos, whose names end in a count that looks like milliseconds.
    """
    groups: defaultdict[tuple[str, ...], list[tuple[float | int, str]]] = defaultdict(list)
    for name in names:
        path = PurePath(name)
        taken = moment(name)
        if taken is not None:
            before = path.stem[: taken.start]
            groups["time", before, "", path.suffix].append((taken.seconds, name))
        elif (match := _LAST_NUMBER.fullmatch(path.stem)) and len(match[2]) <= _LONGEST_NUMBER:
            groups["number", match[1], match[3], path.suffix].append((int(match[2]), name))
    series = (_series(key[0], key[1] + key[2], sorted(group)) for key, group in groups.items())
    return sorted(one for one in series if one is not None)


def _series(kind: str, name: str, group: Sequence[tuple[float | int, str]]) -> Series | None:
    values = [value for value, _ in group]
    names = tuple(picture for _, picture in group)
    if len(group) < FEWEST:
        return None
    steps = np.diff(np.array(values, np.float64))
    usual = float(np.median(steps))
    first = PurePath(names[0]).stem
    is_photo = _PHOTO.fullmatch(first) is not None
    if kind == "time":
        is_burst = usual < _SHORTEST_STEP_S or (is_photo and _DATE.search(first))
        if is_burst or usual > LONGEST_GAP_S:
            return None
        return Series(name.strip(" _-."), names, (), tuple(values))
    if not 1 <= usual <= _LARGEST_STEP or (steps <= 0).any() or (steps % usual).any():
        return None
    if is_photo:
        return None
    if (values[-1] - values[0]) / usual + 1 > len(values) / (1 - _MOST_MISSING):
        return None
    return Series(name.strip(" _-."), names, tuple(int(value) for value in values), ())
