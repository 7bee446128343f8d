"""Action files: a CSV beside each video, with the car's speed and steering over time.

Legend: M samples; channel 0 is speed in m/s, channel 1 is steering, left positive.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from driving_sim.data.actions.csv_table import CsvTable, read_csv
from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.parsing import shown

SteeringKind = Literal["steering_wheel", "road_wheel", "curvature", "normalised"]
SPEED, STEERING = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActionLog:
    """Speed and steering samples on the video's clock."""

    times: Floats
    """[M] s, strictly increasing; 0 is the video's first frame."""
    values: Floats32
    """[M, 2] speed in m/s; steering in rad, 1/m (curvature) or -1..1 (normalised)."""
    has: Mask
    """[2] whether there is a speed, and a steering; a missing one's values are 0."""
    steering_kind: SteeringKind | None
    """What the steering measures; None where there is none."""
    pauses: tuple[tuple[int, float, float], ...] = ()
    """(channel, start s, stop s): where one channel is not known, though the other may be."""
    notices: tuple[str, ...] = ()
    """What was assumed, one line each."""
    origin: str = "the actions"
    """Where the samples come from, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """What a user says of the logs. Raises DriveSimError for a kind of steering there is not."""

    steering_kind: SteeringKind | None = None
    """What a bare `steering` column measures, and any other one must."""
    time_offset: float = 0.0
    """Added to the times of every log, in seconds."""

    def __post_init__(self) -> None:
        kinds = get_args(SteeringKind)
        if self.steering_kind is not None and self.steering_kind not in kinds:
            raise DriveSimError(
                f"`steering_kind` {self.steering_kind}: kinds are {', '.join(kinds)}"
            )

    def check_kind(self, steering: str, kind: SteeringKind) -> None:
        """Raise DriveSimError where a steering of this kind is not the one that is wanted."""
        if self.steering_kind not in (None, kind):
            raise DriveSimError(
                f"{steering} is {kind}, but `steering_kind` is {self.steering_kind}"
            )


class _Column(NamedTuple):
    """What a column name means: value in file * scale = value in SI units."""

    scale: float
    kind: SteeringKind | None = None


_TIMES = {
    "timestamp_s": _Column(1.0),
    "timestamp_ms": _Column(1e-3),
    "timestamp_us": _Column(1e-6),
    "timestamp_ns": _Column(1e-9),
    "timestamp": _Column(1.0),
    "time": _Column(1.0),
    "t": _Column(1.0),
}
_SPEEDS = {
    "speed_mps": _Column(1.0),
    "speed_kmh": _Column(1 / 3.6),
    "speed_mph": _Column(0.44704),
    "speed": _Column(1.0),
}
_STEERINGS = {
    "steering_deg": _Column(math.pi / 180, "steering_wheel"),
    "steering_rad": _Column(1.0, "steering_wheel"),
    "road_wheel_deg": _Column(math.pi / 180, "road_wheel"),
    "road_wheel_rad": _Column(1.0, "road_wheel"),
    "curvature": _Column(1.0, "curvature"),
    "steering_norm": _Column(1.0, "normalised"),
    "steering": _Column(1.0),
}
_WRITTEN = {column.kind: name for name, column in _STEERINGS.items() if column.scale == 1.0}
UNITS: dict[SteeringKind, str] = {
    "steering_wheel": "rad",
    "road_wheel": "rad",
    "curvature": "1/m",
    "normalised": "of full lock",
}
"""The unit of each kind of steering, as it is kept in memory."""

_AS_NAMED = LogOptions()
_LONGEST_HEADER = 2**16  # characters
_LATEST_S = 1e12
# Beyond these a value is a unit mistake, not driving: 360 km/h, three turns of the wheel, ...
SPEED_RANGE_MPS = (-30.0, 100.0)
STEERING_LIMIT: dict[SteeringKind, float] = {
    "steering_wheel": 20.0,
    "road_wheel": 1.3,
    "curvature": 1.0,
    "normalised": 1.001,
}


def _find(
    table: CsvTable,
    known: dict[str, _Column],
    family: tuple[str, ...],
    wanted: SteeringKind | None = None,
) -> str | None:
    """The one column of `known`, of several steerings the one whose kind is wanted.

    Raises DriveSimError for two, or for one in an unknown unit.
    """
    found = [name for name in table.names if name in known]
    of_kind = [name for name in found if known[name].kind == wanted]
    if wanted is not None and len(of_kind) == 1:
        return of_kind[0]
    if len(found) > 1:
        raise table.fail(
            f"has the columns {' and '.join(found)}, which say the same: keep one of them"
        )
    if found:
        return found[0]
    unknown = [name for name in table.names if name.startswith(family)]
    if unknown:
        raise table.fail(f"column {shown(unknown[0])} is not known; use one of {', '.join(known)}")
    return None


def _check_increasing(table: CsvTable, name: str, values: Floats) -> None:
    for row in np.flatnonzero(np.diff(values) <= 0)[:1] + 1:
        what = "the same as" if values[row] == values[row - 1] else "before"
        raise table.fail(
            f"{name} {table.cell(row, name)} is {what} the line above's; times must increase: "
            "sort the rows and remove duplicates",
            row,
        )


def _scaled(table: CsvTable, name: str, scale: float, low: float, high: float, hint: str) -> Floats:
    """A column in SI units. Raises DriveSimError at the first value out of range."""
    values = table.numbers(name) * scale
    for row in np.flatnonzero((values < low) | (values > high))[:1]:
        raise table.fail(
            f"{name} {table.cell(row, name)} is out of range ({hint}); check the column's unit", row
        )
    return values


def _times(table: CsvTable, frame_times: Floats | None) -> Floats:
    name = _find(table, _TIMES, ("timestamp_", "time_"))
    if name is not None:
        scale, hint = _TIMES[name].scale, "30,000 years of seconds"
        times = _scaled(table, name, scale, -_LATEST_S, _LATEST_S, hint)
        _check_increasing(table, name, times)
        return times
    if "frame" not in table.names:
        raise table.fail(
            f"has no time column among {table.columns}; name one timestamp_s, or frame"
        )
    if frame_times is None:
        raise table.fail("counts in frames, which needs a video; name a time column timestamp_s")
    frames = table.numbers("frame")
    _check_increasing(table, "frame", frames)
    outside = (frames != np.floor(frames)) | (frames < 0) | (frames >= len(frame_times))
    for row in np.flatnonzero(outside)[:1]:
        raise table.fail(
            f"frame {frames[row]:g} is not among the video's frames 0 to {len(frame_times) - 1}",
            row,
        )
    return frame_times[frames.astype(np.int64)]


def _speed(table: CsvTable, notices: list[str]) -> Floats | None:
    name = _find(table, _SPEEDS, ("speed_",))
    if name is None:
        return None
    if name == "speed":
        notices.append("speed is taken to be in m/s (else name it speed_kmh or speed_mph)")
    low, high = SPEED_RANGE_MPS
    hint = f"{low:g} to {high:g} m/s; km/h is speed_kmh, mph is speed_mph"
    return _scaled(table, name, _SPEEDS[name].scale, low, high, hint)


def _steering(
    table: CsvTable, options: LogOptions, notices: list[str]
) -> tuple[Floats | None, SteeringKind | None]:
    family = ("steering_", "road_wheel", "curvature_")
    name = _find(table, _STEERINGS, family, options.steering_kind)
    if name is None:
        return None, None
    own = _STEERINGS[name].kind
    kind = own or options.steering_kind
    if kind is None:
        raise table.fail(
            "column 'steering' does not say what it measures: name it by that, such as "
            f"road_wheel_rad, or pass `steering_kind` ({', '.join(get_args(SteeringKind))})"
        )
    if own is None:
        notices.append(f"steering is taken to be {kind}, in {UNITS[kind]}, left positive")
    options.check_kind(f"{table.path}: column {name!r}", kind)
    limit = STEERING_LIMIT[kind]
    hint = f"at most {limit:g} {UNITS[kind]} either way"
    return _scaled(table, name, _STEERINGS[name].scale, -limit, limit, hint), kind


def read_action_file(
    path: Path, options: LogOptions = _AS_NAMED, *, frame_times: Floats | None = None
) -> ActionLog:
    """Read a CSV of speed and steering over time.

    Time is `timestamp_s|ms|us|ns` (or `timestamp`, `time`, `t` in seconds) or `frame` (from 0; then
    `frame_times` [N] s are needed). Speed is `speed_mps|kmh|mph` or `speed` (m/s). Steering is
    `steering_deg|rad` (steering wheel), `road_wheel_deg|rad`, `curvature` (1/m), `steering_norm`
    (-1..1) or `steering` (rad, 1/m or -1..1 by the options' kind), left positive. Other columns are
    ignored.

    Raises DriveSimError naming file, line and remedy: cells that are no finite numbers, times that
    do not increase, unknown units, absurd values, neither speed nor steering, fewer than 2 rows.
    """
    table = read_csv(path)
    notices: list[str] = []
    times = _times(table, frame_times)
    speed = _speed(table, notices)
    steering, kind = _steering(table, options, notices)
    if speed is None and steering is None:
        raise table.fail(
            f"has neither speed nor steering among {table.columns}; name the columns "
            f"{', '.join(_SPEEDS)} and {', '.join(_STEERINGS)}"
        )
    values = np.zeros((len(times), 2), np.float32)
    for channel, column in enumerate((speed, steering)):
        if column is not None:
            values[:, channel] = column
    return ActionLog(
        times=times + options.time_offset,
        values=values,
        has=np.array([speed is not None, steering is not None]),
        steering_kind=kind,
        notices=tuple(notices),
        origin=str(path),
    )


def is_action_file(path: Path) -> bool:
    """Whether the CSV's header names a time and a speed or a steering."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Of a file that may be anything, and all one line.
            first = file.readline(_LONGEST_HEADER)
            names = {name.strip().lower() for name in next(csv.reader([first]), [])}
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return bool(names & {*_TIMES, "frame"}) and bool(names & {*_SPEEDS, *_STEERINGS})


def write_action_file(
    path: Path,
    times: Floats,
    actions: Floats32,
    kind: SteeringKind,
    *,
    hold_until: float | None = None,
) -> None:
    """Write actions [M, 2] at times [M] s as a CSV that `read_action_file` reads back.

    Readers interpolate linearly between rows. Where each action instead holds until the next one
    (exactly so in a simulator), pass `hold_until`, the time at which the last one ends: each action
    then has a row at its start and one a microsecond before its end.
    """
    if hold_until is not None:
        ends = np.append(times[1:], hold_until) - 1e-6
        times, actions = np.stack([times, ends], axis=1).ravel(), actions.repeat(2, axis=0)
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        file.write(f"timestamp_s,speed_mps,{_WRITTEN[kind]}\n")
        for time, (speed, steering) in zip(times, actions, strict=True):
            file.write(f"{time:.6f},{speed:.9g},{steering:.9g}\n")
