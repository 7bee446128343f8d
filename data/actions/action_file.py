"""Read and write action files: CSV files with the car's speed and steering over time.

Legend: M samples; channel 0 is speed in m/s, channel 1 is steering, left positive.
"""

import math
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import (
    SPEED,
    SPEED_RANGE_MPS,
    STEERING,
    STEERING_LIMIT,
    UNITS,
    ActionLog,
    Channel,
    SteeringKind,
)
from driving_sim.data.actions.alignment import GAP_S, LONGEST_GAP_S, gap_limit
from driving_sim.data.actions.columns import (
    SPEEDS,
    STEERINGS,
    TIMES,
    Column,
    find_speed,
    find_steering,
    find_time,
    look_alike,
)
from driving_sim.data.actions.csv_table import CsvTable, read_csv, read_header
from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.arrays import Floats, Floats32
from driving_sim.engine.files import atomic_file

_WRITTEN = {column.kind: column.name for column in STEERINGS.values() if column.scale == 1.0}
_LATEST_S = 1e12
_EPOCH_S = 1e8  # Times beyond three years are not counted from the start of a recording.
_FULL_TURN = 2 * math.pi


def _check_increasing(table: CsvTable, name: str, values: Floats) -> None:
    for row in np.flatnonzero(np.diff(values) <= 0)[:1] + 1:
        what = "the same as" if values[row] == values[row - 1] else "before"
        raise table.fail(
            f"{name} {table.cell(row, name)} is {what} the one in the row above; times must "
            "increase: sort the rows and remove duplicates",
            row,
        )


def _scaled(table: CsvTable, column: Column, low: float, high: float, hint: str) -> Floats:
    """Return a column in SI units; blank cells are NaN. Raises DriveSimError for values outside
    `low` to `high`."""
    values = table.numbers(column.name, may_be_blank=True) * column.scale
    for row in np.flatnonzero((values < low) | (values > high))[:1]:
        raise table.fail(
            f"{column.name} {table.cell(row, column.name)} is out of range ({hint}); check the "
            "column's unit",
            row,
        )
    return values


def _times(table: CsvTable, frame_times: Floats | None, row_times: Floats | None) -> Floats:
    if row_times is not None:
        return row_times
    column = find_time(table)
    if column is not None:
        times = table.numbers(column.name) * column.scale
        for row in np.flatnonzero(abs(times) > _LATEST_S)[:1]:
            raise table.fail(
                f"{column.name} {table.cell(row, column.name)} is out of range (at most 30,000 "
                "years); check the column's unit",
                row,
            )
        _check_increasing(table, column.name, times)
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


def _on_video_clock(
    times: Floats, frame_times: Floats | None, reading: Reading, notices: list[str]
) -> Floats:
    """Add the time offset. A clock that counts from 1970 begins with the video instead."""
    shifted = times + reading.time_offset
    if frame_times is None or shifted[0] < _EPOCH_S:
        return shifted
    notices.append(
        f"the clock of the actions begins at {times[0]:.2f} s; this moment is taken to be the "
        "start of the video (otherwise shift it with `time_offset`)"
    )
    aligned: Floats = shifted - times[0]
    return aligned


def _channel(name: str, times: Floats, values: Floats, notices: list[str]) -> Channel | None:
    """Return the samples of a column, which are the rows where its cell is not blank."""
    known = np.isfinite(values)
    if known.sum() < 2:
        notices.append(f"the column {name} has {known.sum()} values, so it is left out")
        return None
    channel = Channel(times=times[known], values=values[known].astype(np.float32))
    period = float(np.median(np.diff(channel.times)))
    if period > LONGEST_GAP_S:
        notices.append(
            f"{name} has a value every {period:.2g} s, which is too rarely to interpolate"
        )
    elif not known.all():
        notices.append(
            f"{name} has values in {known.sum()} of {len(values)} rows; it is interpolated between "
            f"values up to {gap_limit(channel.times):.2g} s apart"
        )
    elif gap_limit(channel.times) > GAP_S + 0.01:
        notices.append(f"{name} has a value every {period:.2g} s; it is interpolated between them")
    return channel


def _unwrapped(column: Column, times: Floats, values: Floats, notices: list[str]) -> Floats:
    """Return the angles of a steering wheel without the jumps by a full turn that a logger made."""
    known = np.isfinite(values)
    angles, steps = values[known], np.diff(values[known])
    if column.kind != "steering_wheel" or not len(steps) or np.ptp(angles) > 1.02 * _FULL_TURN:
        return values
    close = np.diff(times[known]) <= gap_limit(times[known])
    jumps = np.where(close & (abs(steps) > 0.75 * _FULL_TURN), -np.sign(steps), 0.0)
    count = np.count_nonzero(jumps)
    if not count:
        return values
    turns = np.append(0.0, np.cumsum(jumps))
    # After a hole, nothing says how far the wheel has turned: take the nearest to straight on.
    runs = np.append(0, np.cumsum(~close))
    first = np.searchsorted(runs, runs)
    turns -= turns[first] + np.round(angles[first] / _FULL_TURN)
    unwrapped = values.copy()
    unwrapped[known] = angles + _FULL_TURN * turns
    often = "once" if count == 1 else f"{count} times"
    if abs(unwrapped[known]).max() > STEERING_LIMIT["steering_wheel"]:
        notices.append(
            f"{column.name} jumps by about a full turn {often}, but not as a steering wheel would "
            "whose logger wraps it; it is read as it is"
        )
        return values
    notices.append(
        f"{column.name} jumps by a full turn {often}, because its logger wraps it; the turns are "
        "added up again"
    )
    return unwrapped


def read_action_file(
    path: Path,
    reading: Reading = AS_NAMED,
    *,
    frame_times: Floats | None = None,
    row_times: Floats | None = None,
) -> ActionLog:
    """Read a CSV of speed and steering over time.

    The time column is `timestamp_s|ms|us|ns`; `timestamp`, `time` or `t` in seconds; or `frame`, a
    frame number from 0. A `frame` column needs `frame_times` [N], the times of the video's frames
    in seconds. The speed column is `speed_mps|kmh|mph`, or `speed` in m/s. The steering column is
    `steering_deg|rad` (steering wheel), `road_wheel_deg|rad`, `curvature` (1/m), `steering_norm`
    (-1 to 1), or `steering`, whose kind must be set in `reading`. `reading` may also name the
    columns. Positive steering is to the left. Other columns are ignored, and so are blank cells.
    If the caller knows the times of the rows, it passes `row_times`, strictly increasing seconds on
    the video's clock, one for each row; no time column is needed then. Rows whose time is NaN are
    left out.

    Raises DriveSimError, with file, line and remedy, if a cell is not a finite number, if times do
    not increase, if a value is impossible for a car, if there are fewer than 2 rows, or if there is
    neither speed nor steering.
    """
    table = read_csv(path)
    if row_times is not None:
        table = table.only(np.isfinite(row_times))
        row_times = row_times[np.isfinite(row_times)]
    notices = [*table.notices]
    times = _on_video_clock(_times(table, frame_times, row_times), frame_times, reading, notices)
    speed, steering = None, None
    if column := find_speed(table, reading, notices):
        low, high = SPEED_RANGE_MPS
        hint = (
            f"{low:g} to {high:g} m/s; if it is in km/h or mph, rename it to speed_kmh or "
            "speed_mph, or pass `speed` and `speed_unit`"
        )
        values = _scaled(table, column, low, high, hint)
        speed = _channel(column.name, times, values, notices)
    kind = None
    if column := find_steering(table, reading, notices):
        kind = column.kind
        assert kind is not None
        limit = STEERING_LIMIT[kind]
        hint = f"-{limit:g} to {limit:g} {UNITS[kind]}"
        values = _scaled(table, column, -limit, limit, hint)
        values = _unwrapped(column, times, values, notices)
        steering = _channel(column.name, times, values, notices)
    alike = [
        look_alike(table, channel)
        for channel, found in ((SPEED, speed), (STEERING, steering))
        if found is None
    ]
    notices += [line for line in alike if line]
    if speed is None and steering is None:
        raise table.fail(
            f"has neither speed nor steering among {table.columns}; known names are "
            f"{', '.join(SPEEDS)} and {', '.join(STEERINGS)}" + "".join(f"; {n}" for n in notices)
        )
    return ActionLog(
        speed=speed,
        steering=steering,
        steering_kind=kind if steering is not None else None,
        notices=tuple(notices),
        origin=str(path),
    )


def is_action_file(path: Path) -> bool:
    """Return whether a CSV has a time column, and a speed column or a steering column."""
    names = set(read_header(path))
    return bool(names & {*TIMES, "frame"}) and bool(names & {*SPEEDS, *STEERINGS})


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
