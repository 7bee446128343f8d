"""Read the tables of nuScenes: JSON files, each an array of objects that refer to each other.

`sample_data.json` of the whole data set has 2.6 million rows in more than a gigabyte, so rows are
read one at a time, and only those of the front camera are kept.
https://www.nuscenes.org/nuscenes#data-format
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown

CAMERA = "CAM_FRONT"
_CHUNK = 2**20
_MOST_CHARACTERS = 2**20  # of a row
_LONGEST_TEXT = 1000
_BETWEEN = re.compile(r"[\s,]*")
_LATEST = 1e17  # µs


class Picture(NamedTuple):
    """A picture of the front camera."""

    seconds: float
    """Time in seconds since 1970."""
    name: str
    """Name of the file below the folder of the data set."""
    pose: str
    """Token of the pose of the car at this time."""


class Scene(NamedTuple):
    """A scene, which is 20 s of a drive."""

    token: str
    name: str
    pictures: tuple[Picture, ...]
    """The pictures in order of time, those between the samples included."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table. The memory that this takes does not depend on the table's size.

    Raises DriveSimError if the file is missing, cut off, or not an array of objects.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for row in _values(iter(lambda: file.read(_CHUNK), "")):
                if not isinstance(row, dict):
                    raise ValueError(f"{shown(row)} is not an object")
                yield row
    except (OSError, ValueError, RecursionError) as error:
        raise DriveSimError(
            f"{one_line(path)}: cannot be read as a table of nuScenes ({one_line(error)}); "
            "download it again"
        ) from None


def _values(chunks: Iterator[str]) -> Iterator[Any]:
    """Yield the values of a JSON array that comes in chunks of text."""
    decoder = json.JSONDecoder()
    text = next(chunks, "").lstrip()
    if not text.startswith("["):
        raise ValueError("it does not begin with [")
    at = 1
    while True:
        if match := _BETWEEN.match(text, at):
            at = match.end()
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            # The rest of the value may be in the next chunk.
            more = next(chunks, "")
            if not more:
                raise ValueError("it is cut off or damaged") from None
            if len(text) - at > _MOST_CHARACTERS:
                raise ValueError(f"a row has more than {_MOST_CHARACTERS:,} characters") from None
            text, at = text[at:] + more, 0
        else:
            yield value


def text_of(row: dict[str, Any], key: str, path: Path) -> str:
    """Return a text in a row. Raises DriveSimError if it is none."""
    value = row.get(key)
    if not isinstance(value, str) or not value or len(value) > _LONGEST_TEXT:
        raise bad_value(path, key, value)
    return value


def number_of(row: dict[str, Any], key: str, path: Path, most: float) -> float:
    """Return a number in a row. Raises DriveSimError unless it is from -`most` to `most`."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= most:
        raise bad_value(path, key, value)
    return float(value)


def numbers_of(
    row: dict[str, Any], key: str, path: Path, count: int, most: float
) -> tuple[float, ...]:
    """Return `count` numbers in a row. Raises DriveSimError unless all are up to ± `most`."""
    values = row.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise bad_value(path, key, values)
    return tuple(number_of({key: value}, key, path, most) for value in values)


def bad_value(path: Path, key: str, value: object) -> DriveSimError:
    """Return the error for a value that cannot be right."""
    return DriveSimError(
        f"{one_line(path)}: {key} is {one_line(shown(value))}, which cannot be; download it again"
    )


def read_scenes(tables: Path) -> list[Scene]:
    """Return the scenes in the tables in a folder, with the pictures of the front camera.

    Raises DriveSimError if a table is bad, or if there is no front camera.
    """
    names = {
        text_of(row, "token", tables / "scene.json"): text_of(row, "name", tables / "scene.json")
        for row in read_rows(tables / "scene.json")
    }
    scenes = {
        text_of(row, "token", tables / "sample.json"): row.get("scene_token")
        for row in read_rows(tables / "sample.json")
    }
    cameras = _front_cameras(tables)
    pictures: defaultdict[str, list[Picture]] = defaultdict(list)
    path = tables / "sample_data.json"
    for row in read_rows(path):
        if not _is_in(row.get("calibrated_sensor_token"), cameras):
            continue
        scene = scenes.get(text_of(row, "sample_token", path))
        if not isinstance(scene, str) or scene not in names:
            raise DriveSimError(
                f"{one_line(path)}: a picture belongs to no scene (its sample_token is "
                f"{one_line(shown(row.get('sample_token')))}); download the tables again"
            )
        picture = Picture(
            seconds=number_of(row, "timestamp", path, _LATEST) / 1e6,
            name=text_of(row, "filename", path),
            pose=text_of(row, "ego_pose_token", path),
        )
        pictures[scene].append(picture)
    return [
        Scene(token, name, tuple(sorted(pictures[token])))
        for token, name in names.items()
        if pictures[token]
    ]


def _is_in(token: object, tokens: Collection[str]) -> bool:
    return isinstance(token, str) and token in tokens


def _front_cameras(tables: Path) -> set[str]:
    """Return the tokens of the front camera, as it was calibrated at different times."""
    channels = {
        text_of(row, "token", tables / "sensor.json"): row.get("channel")
        for row in read_rows(tables / "sensor.json")
    }
    cameras = {
        text_of(row, "token", tables / "calibrated_sensor.json")
        for row in read_rows(tables / "calibrated_sensor.json")
        if channels.get(text_of(row, "sensor_token", tables / "calibrated_sensor.json")) == CAMERA
    }
    if not cameras:
        known = ", ".join(sorted(one_line(shown(channel)) for channel in channels.values())[:8])
        raise DriveSimError(
            f"{one_line(tables)}: has no {CAMERA}; its sensors are {known or 'none'}; only data "
            "sets with this camera are read"
        )
    return cameras


def heading(rotation: tuple[float, ...]) -> float:
    """Return the angle in rad by which a quaternion (w, x, y, z) turns the car to the left."""
    w, x, y, z = rotation
    return math.atan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)
