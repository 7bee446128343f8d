"""Read and write action files: CSV files with the car's speed and steering over time.

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
    """The speed and steering of a drive over time, on the clock of its video."""

    times: Floats
    """[M] Time of each sample in seconds from the video's first frame, strictly increasing."""
    values: Floats32
    """[M, 2] Speed in m/s, and steering in the unit that `UNITS` lists for its kind."""
    has: Mask
    """[2] Whether the log has speed, and whether it has steering. Missing channels are 0."""
    steering_kind: SteeringKind | None
    """Kind of steering in `values`, or None if the log has no steering."""
    pauses: tuple[tuple[int, float, float], ...] = ()
    """Times during which one channel is unknown, as (channel, start in s, stop in s)."""
    notices: tuple[str, ...] = ()
    """Assumptions made while reading the file, one line each."""
    origin: str = "the actions"
    """File or folder that the samples come from, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """The user's settings for reading action logs.

    Raises DriveSimError if `steering_kind` is unknown.
    """

    steering_kind: SteeringKind | None = None
    """Kind of steering in a column named just `steering`. Columns with other names must be of this
    kind too. If None, a column named just `steering` is an error."""
    time_offset: float = 0.0
    """Seconds that are added to the times of every log."""

    def __post_init__(self) -> None:
        kinds = get_args(SteeringKind)
        if self.steering_kind is not None and self.steering_kind not in kinds:
            raise DriveSimError(
                f"`steering_kind` {self.steering_kind}: unknown; kinds are {', '.join(kinds)}"
            )

    def check_kind(self, steering: str, kind: SteeringKind) -> None:
        """Raise DriveSimError if `steering_kind` is set and differs from the `kind` of a log.

        `steering` says in the message which file or column is meant.
        """
        if self.steering_kind not in (None, kind):
            raise DriveSimError(
                f"{steering} is {kind}, but `steering_kind` is {self.steering_kind}; correct "
                "`steering_kind` or leave it out"
            )


class _Column(NamedTuple):
    """What the name of a column says: the factor to SI units and the kind of steering, if any."""

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
"""Unit in which an `ActionLog` contains each kind of steering."""

_AS_NAMED = LogOptions()
_LONGEST_HEADER = 2**16  # characters
_LATEST_S = 1e12
# No car reaches values outside these limits (360 km/h, three turns of the steering wheel, ...), so
# the unit of such a value must be wrong.
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
    kind: SteeringKind | None = None,
) -> str | None:
    """Return the name of the table's column that is in `known`, or None if there is no such column.

    If there are several such columns, choose the one whose steering is of this `kind`.

    Raises DriveSimError if the choice is not unique. Also raises it if no column is in `known`, but
    a column seems to have an unknown unit, such as `speed_knots`. The name of such a column begins
    with one of the words in `family`.
    """
    matches = [name for name in table.names if name in known]
    of_kind = [name for name in matches if known[name].kind == kind]
    if kind is not None and len(of_kind) == 1:
        return of_kind[0]
    if len(matches) > 1:
        raise table.fail(
            f"has the columns {' and '.join(matches)} for the same quantity; keep one of them"
        )
    if matches:
        return matches[0]
    unknown = [name for name in table.names if name.startswith(family)]
    if unknown:
        raise table.fail(f"column {shown(unknown[0])} is not known; use one of {', '.join(known)}")
    return None


def _check_increasing(table: CsvTable, name: str, values: Floats) -> None:
    for row in np.flatnonzero(np.diff(values) <= 0)[:1] + 1:
        what = "the same as" if values[row] == values[row - 1] else "before"
        raise table.fail(
            f"{name} {table.cell(row, name)} is {what} the one in the row above; times must "
            "increase: sort the rows and remove duplicates",
            row,
        )


def _scaled(table: CsvTable, name: str, scale: float, low: float, high: float, hint: str) -> Floats:
    """Return a column times `scale`. Raises DriveSimError for values outside `low` to `high`."""
    values = table.numbers(name) * scale
    for row in np.flatnonzero((values < low) | (values > high))[:1]:
        raise table.fail(
            f"{name} {table.cell(row, name)} is out of range ({hint}); check the column's unit", row
        )
    return values


def _times(table: CsvTable, frame_times: Floats | None) -> Floats:
    name = _find(table, _TIMES, ("timestamp_", "time_"))
    if name is not None:
        scale, hint = _TIMES[name].scale, "at most 30,000 years"
        times = _scaled(table, name, scale, -_LATEST_S, _LATEST_S, hint)
        _check_increasing(table, name, times)
        return times
    if "frame" not in table.names:
        raise table.fail(
            f"has no time column among {table.columns}; name one of them timestamp_s or frame"
        )
    if frame_times is None:
        raise table.fail(
            "has frame numbers as times, but there is no video; add a column timestamp_s"
        )
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
        notices.append(
            "speed is taken to be in m/s (otherwise rename the column to speed_kmh or speed_mph)"
        )
    low, high = SPEED_RANGE_MPS
    hint = f"{low:g} to {high:g} m/s; rename it to speed_kmh or speed_mph if it is in km/h or mph"
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
            "the name of column 'steering' does not say what it measures; name it road_wheel_rad, "
            f"for example, or pass `steering_kind` ({', '.join(get_args(SteeringKind))})"
        )
    if own is None:
        notices.append(f"steering is taken to be {kind}, in {UNITS[kind]}, left positive")
    options.check_kind(f"{table.path}: column {name!r}", kind)
    limit = STEERING_LIMIT[kind]
    hint = f"-{limit:g} to {limit:g} {UNITS[kind]}"
    return _scaled(table, name, _STEERINGS[name].scale, -limit, limit, hint), kind


def read_action_file(
    path: Path, options: LogOptions = _AS_NAMED, *, frame_times: Floats | None = None
) -> ActionLog:
    """Read a CSV of speed and steering over time.

    The time column is `timestamp_s|ms|us|ns`; `timestamp`, `time` or `t` in seconds; or `frame`, a
    frame number from 0. A `frame` column needs `frame_times` [N], the times of the video's frames
    in seconds. The speed column is `speed_mps|kmh|mph`, or `speed` in m/s. The steering column is
    `steering_deg|rad` (steering wheel), `road_wheel_deg|rad`, `curvature` (1/m), `steering_norm`
    (-1 to 1), or `steering`, whose kind must be set in `options`. Positive steering is to the left.
    Other columns are ignored.

    Raises DriveSimError, with file, line and remedy, if a cell is not a finite number, if times do
    not increase, if a unit is unknown, if a value is impossible for a car, if there are fewer than
    2 rows, or if there is neither speed nor steering.
    """
    table = read_csv(path)
    notices: list[str] = []
    times = _times(table, frame_times)
    speed = _speed(table, notices)
    steering, kind = _steering(table, options, notices)
    if speed is None and steering is None:
        raise table.fail(
            f"has neither speed nor steering among {table.columns}; known names are "
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
    """Return whether a CSV has a time column, and a speed column or a steering column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Limit the length: a file that is not a CSV may be a single, very long line.
            first = file.readline(_LONGEST_HEADER)
            names = {name.strip().lower() for name in next(csv.reader([first]), [])}
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return bool(names & {*_TIMES, "frame"}) and bool(names & {*_SPEEDS, *_STEERINGS})


def write_action_file(
    path: Path,
    times: Floats,
    actions: Floats32,
    kind: SteeringKind | None,
    *,
    hold_until: float | None = None,
) -> None:
    """Write actions [M, 2] at times [M] in seconds as a CSV that `read_action_file` can read.

    A channel that is NaN throughout is left out; `kind` may then be None.
    Readers interpolate linearly between rows. In a simulator, each action instead stays constant
    until the next one. In that case pass `hold_until`, the time in seconds at which the last action
    ends. Then two rows are written for each action: one at its start and one a microsecond before
    its end.
    """
    if hold_until is not None:
        ends = np.append(times[1:], hold_until) - 1e-6
        times, actions = np.stack([times, ends], axis=1).ravel(), actions.repeat(2, axis=0)
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        names = ["speed_mps", _WRITTEN[kind] if kind else ""]
        channels = np.flatnonzero(~np.isnan(actions).all(axis=0))
        file.write(",".join(["timestamp_s", *(names[channel] for channel in channels)]) + "\n")
        for time, values in zip(times, actions[:, channels], strict=True):
            file.write(",".join([f"{time:.6f}", *(f"{value:.9g}" for value in values)]) + "\n")
