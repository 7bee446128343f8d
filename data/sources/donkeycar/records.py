"""Read the records of donkeycar tubs, of version 1 and 2.

Version 2 has `manifest.json`, whose last line lists the catalogs and the deleted records, catalogs
with a JSON object in each line, and `images/`. Version 1 has `meta.json`, a file `record_N.json`
for each record, and the pictures beside them. Deleted records of version 1 are just missing.
https://docs.donkeycar.com
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from driving_sim.data.inner_name import inside
from driving_sim.data.sources.source import Folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, parse_json, shown

RECORD_V1 = re.compile(r"record_(\d{1,12})\.json", re.ASCII)
_MOST_BYTES = 2**20  # of a record
_MOST_MANIFEST_BYTES = 2**26
_MOST_RECORDS = 1_000_000  # 14 hours at 20 records/s
_MOST_CATALOG_BYTES = 2**28  # donkeycar starts a new catalog after 1,000 records.
_MOST_NORMALISED = 10.0  # Larger values are no steering or throttle from -1 to 1.
_PAUSE_S = 10.0


class Record(NamedTuple):
    """One record: a picture, and what the car was told to do."""

    where: str
    """File and line of the record, for messages."""
    number: int
    image: str
    """Name of the picture below the tub."""
    seconds: float
    """Time on any clock, or NaN if it is not stored."""
    session: str
    """Id of the session, or empty if it is not stored."""
    angle: float
    """Steering from -1 to 1, right positive, or NaN if it was not recorded."""
    throttle: float
    """Throttle from -1 to 1, or NaN if it was not recorded."""


@dataclass(slots=True)
class Tub:
    """The records of a tub in the order of recording, and what was left out, one line each."""

    records: list[Record] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)


def read_tub_v1(folder: Folder) -> Tub:
    """Read a tub of version 1. Raises DriveSimError, with the file, for a bad record."""
    matches = filter(None, map(RECORD_V1.fullmatch, folder.files))
    files = sorted((int(match[1]), match[0]) for match in matches)
    tub = Tub()
    for index, name in files:
        path = folder.path / name
        where = str(path)
        try:
            with path.open("rb") as file:
                values = _object(file.read(_MOST_BYTES + 1))
        except (OSError, ValueError) as error:
            raise _bad(where, error) from None
        _add(tub, values, where, index, "")
    _finish(tub)
    return tub


def read_tub_v2(folder: Folder) -> Tub:
    """Read a tub of version 2.

    A last line of the last catalog that was cut off is left out. Raises DriveSimError, with file
    and line, for another bad record, and for a bad manifest.
    """
    paths, deleted = _read_manifest(folder.path / "manifest.json")
    tub = Tub(deleted=deleted)
    for number, path in enumerate(paths, 1):
        lines = list(_lines(path))
        for line, text in enumerate(lines, 1):
            where = f"{path}, line {line}"
            try:
                values = _object(text)
            except ValueError as error:
                is_end = number == len(paths) and line == len(lines)
                if is_end and not text.endswith(b"\n"):
                    tub.notices.append(
                        f"the last line of {one_line(path.name)} was cut off and is left out"
                    )
                    break
                raise _bad(where, error) from None
            index = values.get("_index", len(tub.records))
            if type(index) is not int or not 0 <= index < 2**40:
                raise _bad(where, f"_index is {shown(index)}, not the number of a record")
            _add(tub, values, where, index, "images/")
    _finish(tub)
    return tub


def sessions(tub: Tub) -> list[list[Record]]:
    """Split the records where the id of the session changes, or where their times go back or jump
    by more than 10 s. Deleted records count too."""
    starts = [
        number
        for number, (earlier, later) in enumerate(pairwise(tub.records), 1)
        if later.session != earlier.session
        or later.seconds < earlier.seconds
        or later.seconds - earlier.seconds > _PAUSE_S
    ]
    bounds = pairwise([0, *starts, len(tub.records)])
    return [tub.records[start:stop] for start, stop in bounds]


def _bad(where: str, error: object) -> DriveSimError:
    return DriveSimError(f"{where}: {one_line(error)}; correct it or remove the record")


def _object(text: bytes) -> dict[str, Any]:
    if len(text) > _MOST_BYTES:
        raise ValueError(f"has more than {_MOST_BYTES:,} bytes")
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    return values


def _lines(path: Path) -> Iterator[bytes]:
    try:
        if path.stat().st_size > _MOST_CATALOG_BYTES:
            raise OSError(f"it has more than {_MOST_CATALOG_BYTES:,} bytes")
        with path.open("rb") as file:
            while line := file.readline(_MOST_BYTES + 1):
                if line.strip():
                    yield line
    except OSError as error:
        raise DriveSimError(
            f"{path}: cannot be read ({one_line(error)}); copy the tub again"
        ) from None


def _read_manifest(path: Path) -> tuple[list[Path], set[int]]:
    """Return the catalogs of a tub and the indices of its deleted records."""
    try:
        with path.open("rb") as file:
            lines = file.read(_MOST_MANIFEST_BYTES).splitlines()
        values = parse_json(next(line for line in reversed(lines) if line.strip()))
        names, deleted = values["paths"], values.get("deleted_indexes", [])
        catalogs = [inside(path.parent, name) for name in names]
        if not catalogs or any(type(index) is not int for index in deleted):
            raise ValueError("it lists no catalogs, or its deleted records are not whole numbers")
        if len({*catalogs}) < len(catalogs):
            raise ValueError("it lists a catalog twice")
        return catalogs, set(deleted)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise DriveSimError(
            f"{path}: its last line must list the catalogs and the deleted records "
            f"({one_line(error)}); copy the tub again"
        ) from None


def _add(tub: Tub, values: dict[str, Any], where: str, index: int, images: str) -> None:
    if len(tub.records) == _MOST_RECORDS:
        raise DriveSimError(
            f"{where}: the tub has more than {_MOST_RECORDS:,} records; split it into several tubs"
        )
    image = values.get("cam/image_array")
    if not isinstance(image, str):
        raise _bad(where, f"cam/image_array is {shown(image)}, not the name of a picture")
    by_pilot = {"local_angle": ("angle",), "local": ("angle", "throttle")}
    mode = values.get("user/mode")
    driven_by_pilot = by_pilot.get(mode, ()) if isinstance(mode, str) else ()
    angle, throttle = (
        _normalised(values, f"{'pilot' if name in driven_by_pilot else 'user'}/{name}", where)
        for name in ("angle", "throttle")
    )
    session = values.get("_session_id")
    name = PureWindowsPath(image).name  # Some versions store the whole path.
    tub.records.append(
        Record(
            where=where,
            number=index,
            image=images + name,
            seconds=_seconds(values, where),
            session=session if isinstance(session, str) else "",
            angle=angle,
            throttle=throttle,
        )
    )


def _normalised(values: dict[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not abs(value) <= _MOST_NORMALISED:
        raise _bad(where, f"{name} is {shown(value)}, not a number from -1 to 1")
    return float(value)


def _seconds(values: dict[str, Any], where: str) -> float:
    for name in ("_timestamp_ms", "milliseconds"):
        value = values.get(name)
        if value is not None:
            if type(value) not in (int, float) or not abs(value) < 1e15:
                raise _bad(where, f"{name} is {shown(value)}, not a time in ms")
            return float(value) / 1000
    text = values.get("timestamp")
    if not isinstance(text, str):
        return math.nan
    try:
        moment = datetime.fromisoformat(text)
        return (moment.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
    except ValueError:
        raise _bad(where, f"timestamp is {shown(text)}, not a date and time") from None


def _finish(tub: Tub) -> None:
    """Drop the times if not all records have one."""
    untimed = sum(math.isnan(record.seconds) for record in tub.records)
    if 0 < untimed < len(tub.records):
        tub.notices.append(
            f"{untimed} of {len(tub.records)} records have no time, so no stored time is used"
        )
        tub.records = [record._replace(seconds=math.nan) for record in tub.records]
