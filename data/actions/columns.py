"""The names of columns in action files: which quantity and unit each name means.

A column whose name drivesim does not know is never guessed. If a quantity is missing while a column
looks like it, a notice names that column, and the options that say what it means.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from driving_sim.data.actions.action_log import SPEED, STEERING, UNITS, SteeringKind
from driving_sim.data.actions.csv_table import CsvTable, plain
from driving_sim.data.actions.reading import SPEED_UNITS, STEERING_UNITS, Reading
from driving_sim.engine.parsing import shown


class Column(NamedTuple):
    """What a column means: its name, the factor to SI units, and the kind of steering, if any."""

    name: str
    scale: float
    kind: SteeringKind | None = None


_DEG = math.pi / 180
TIMES = {
    column.name: column
    for column in (
        Column("timestamp_s", 1.0),
        Column("timestamp_ms", 1e-3),
        Column("timestamp_us", 1e-6),
        Column("timestamp_ns", 1e-9),
        Column("timestamp", 1.0),
        Column("time", 1.0),
        Column("t", 1.0),
    )
}
SPEEDS = {
    column.name: column
    for column in (
        Column("speed_mps", SPEED_UNITS["mps"]),
        Column("speed_kmh", SPEED_UNITS["kmh"]),
        Column("speed_mph", SPEED_UNITS["mph"]),
        Column("speed", 1.0),
    )
}
STEERINGS = {
    column.name: column
    for column in (
        Column("steering_deg", _DEG, "steering_wheel"),
        Column("steering_rad", 1.0, "steering_wheel"),
        Column("road_wheel_deg", _DEG, "road_wheel"),
        Column("road_wheel_rad", 1.0, "road_wheel"),
        Column("curvature", 1.0, "curvature"),
        Column("steering_norm", 1.0, "normalised"),
        Column("steering", 1.0),
    )
}

_LOOKS_LIKE = (
    re.compile(r"speed|velocity|v_?ego|knots|km_?/?h\b|\bmph\b|\bm/s\b"),
    re.compile(r"steer|angle|wheel|curvature|yaw_?rate"),
)
# Columns with these words in their names are about the car, but are neither its speed nor its
# steering.
_OTHER = re.compile(
    r"\b(limit|max|min|target|desired|cruise|set|wind|fan|engine|motor|rpm|torque|force|pressed|"
    r"override|fault|status|valid|temp|accel|latitude|longitude|heading)\b"
)
_OPTIONS = (
    "if it is the speed, pass `speed='{name}'` and `speed_unit` (mps, kmh or mph)",
    "if it is the steering, pass `steering='{name}'`, `steering_kind`, and `steering_unit=deg` for "
    "degrees",
)


def find_time(table: CsvTable) -> Column | None:
    """Return the time column, or None. Raises DriveSimError if it is not unique, or if it is
    missing while the name of a column begins with `timestamp_` or `time_`."""
    column = _known(table, TIMES)
    unknown = [name for name in table.names if name.startswith(("timestamp_", "time_"))]
    if column is None and "frame" not in table.names and unknown:
        raise table.fail(f"column {shown(unknown[0])} is not known; use one of {', '.join(TIMES)}")
    return column


def find_speed(table: CsvTable, reading: Reading, notices: list[str]) -> Column | None:
    """Return the column of the speed, or None.

    Raises DriveSimError if it is not unique, or if its name has another unit than `reading`.
    """
    own = _named(table, reading.speed, notices)
    if own in SPEEDS and own != "speed":  # a bare name says no unit
        return _in_unit(table, SPEEDS[own], SPEED_UNITS, reading.speed_unit)
    if own:
        unit = reading.speed_unit or "mps"
        notices.append(f"the column {plain(own)} is taken to be the speed in {unit}")
        return Column(own, SPEED_UNITS[unit])
    column = _known(table, SPEEDS)
    if column is not None and column.name == "speed":
        notices.append(
            "speed is taken to be in m/s (otherwise rename the column to speed_kmh or speed_mph)"
        )
    return column


def find_steering(table: CsvTable, reading: Reading, notices: list[str]) -> Column | None:
    """Return the column of the steering, or None.

    If there are several, the one of the kind that `reading` asks for is chosen. Raises
    DriveSimError if the choice is not unique, if the kind is unknown, or if the kind or the unit in
    its name is another one than in `reading`.
    """
    own = _named(table, reading.steering, notices)
    column = STEERINGS.get(own, Column(own, 1.0)) if own else None
    column = column or _known(table, STEERINGS, reading.steering_kind)
    if column is None:
        return None
    kind = column.kind or reading.steering_kind
    if kind is None:
        raise table.fail(
            f"the name of column {plain(column.name)!r} does not say what it measures; name it "
            "road_wheel_rad, for example, or pass `steering_kind` (steering_wheel, road_wheel, "
            "curvature, normalised)"
        )
    if own and reading.steering_unit and UNITS[kind] != "rad":
        raise table.fail(
            f"column {plain(own)!r} is {kind} steering, which is no angle; leave out "
            "`steering_unit`"
        )
    if own and column.kind:
        column = _in_unit(table, column, STEERING_UNITS, reading.steering_unit)
    elif own and reading.steering_unit:
        column = column._replace(scale=STEERING_UNITS[reading.steering_unit])
    if column.kind is None:
        name = f"the column {plain(own)}" if own else column.name
        unit = (reading.steering_unit if own else None) or UNITS[kind]
        notices.append(f"{name} is taken to be {kind} steering ({unit}), left positive")
    reading.check_kind(f"{table.path}: column {column.name!r}", kind)
    return column._replace(kind=kind)


def _in_unit(
    table: CsvTable, column: Column, units: Mapping[str, float], unit: str | None
) -> Column:
    """Return a column whose name has a unit. Raises DriveSimError if the user says another one."""
    if unit is not None and units[unit] != column.scale:
        raise table.fail(f"the name of column {column.name} has another unit than {unit}")
    return column


def look_alike(table: CsvTable, channel: int) -> str | None:
    """Return a line about a column that may be the missing channel (0 speed, 1 steering)."""
    quantity = "steering" if channel == STEERING else "speed"
    alike = [
        name
        for name in table.names
        if _LOOKS_LIKE[channel].search(name)
        and not (channel == STEERING and _LOOKS_LIKE[SPEED].search(name))
        and not _OTHER.search(name.replace("_", " "))
        and name not in {*TIMES, *SPEEDS, *STEERINGS}
    ]
    if not alike:
        return None
    name = plain(alike[0])
    text = f"no {quantity} was found: the column {name} is not known; "
    return text + _OPTIONS[channel].format(name=name)


def _named(table: CsvTable, name: str | None, notices: list[str]) -> str | None:
    """Return the column that the user named, as it is spelled in the table."""
    if name is None or name.strip().lower() in table.names:
        return name and name.strip().lower()
    notices.append(f"there is no column {plain(name)}, so the known names are searched")
    return None


def _known(
    table: CsvTable, known: dict[str, Column], kind: SteeringKind | None = None
) -> Column | None:
    """Return the table's column that is in `known`, or None if there is no such column.

    If there are several such columns, choose the one whose steering is of this `kind`. Raises
    DriveSimError if the choice is not unique.
    """
    matches = [known[name] for name in table.names if name in known]
    of_kind = [column for column in matches if column.kind == kind]
    if kind is not None and len(of_kind) == 1:
        return of_kind[0]
    if len(matches) > 1:
        names = " and ".join(column.name for column in matches)
        raise table.fail(
            f"has the columns {names} for the same quantity; keep one of them, or name one with "
            "`speed` or `steering`"
        )
    return matches[0] if matches else None
