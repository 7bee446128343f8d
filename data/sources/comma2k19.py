"""Segments of comma2k19: a minute of raw HEVC, and the car's logs as NumPy arrays without suffix.

`video.hevc` has no times; `global_pose/frame_times` [N] holds them, on the clock of the logs in
`processed_log/CAN/{speed,steering_angle}/{t,value}`: m/s and degrees of the steering wheel, left
positive. https://github.com/commaai/comma2k19
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_file import (
    SPEED_RANGE_MPS,
    STEERING_LIMIT,
    ActionLog,
    LogOptions,
)
from driving_sim.data.actions.alignment import EXTRAPOLATION_S, GAP_S
from driving_sim.data.arrays import Floats
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.video.decoder_pool import read_facts
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_CAN = Path("processed_log", "CAN")
_TURN_DEG = math.degrees(STEERING_LIMIT["steering_wheel"])
_LIMITS = {"speed": SPEED_RANGE_MPS, "steering_angle": (-_TURN_DEG, _TURN_DEG)}


def is_segment(folder: Path) -> bool:
    """Whether a folder is a comma2k19 segment."""
    return (folder / _CAN).is_dir()


def _array(path: Path) -> Floats:
    if not path.is_file():
        raise DriveSimError(f"{path}: is missing from the comma2k19 segment")
    try:
        # Mapped: a shape that the file is too small for is an error, not memory. Never unpickled.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
            raise ValueError("it holds no plain numbers")
        flat = np.asarray(values, np.float64).ravel()
    # The header is a Python literal, whose parser fails in as many ways as there are mistakes.
    except Exception as error:
        reason = one_line(error)
        raise DriveSimError(f"{path}: cannot be read as a NumPy array ({reason})") from None
    if len(flat) < 2 or not np.isfinite(flat).all():
        raise DriveSimError(f"{path}: holds fewer than 2 values, or some that are not finite")
    return flat


def _channel(folder: Path, low: float, high: float) -> tuple[Floats, Floats]:
    """Times and values of one CAN signal, without the bus's repeated times."""
    times, values = _array(folder / "t"), _array(folder / "value")
    if len(times) != len(values):
        raise DriveSimError(f"{folder}: has {len(times)} times for {len(values)} values")
    if (np.diff(times) < 0).any():
        raise DriveSimError(f"{folder / 't'}: its times go backward; leave this segment out")
    if values.min() < low or values.max() > high:
        raise DriveSimError(
            f"{folder / 'value'}: goes from {values.min():g} to {values.max():g}, out of range "
            f"({low:g} to {high:g}); leave this segment out"
        )
    times, first = np.unique(times, return_index=True)
    if len(times) < 2:
        raise DriveSimError(f"{folder / 't'}: holds one time only; leave this segment out")
    return times, values[first]


def _pauses(times: Floats) -> list[tuple[float, float]]:
    """Where a signal with these times is not known: in its gaps, before it and after it."""
    before = np.flatnonzero(np.diff(times) > GAP_S)
    inner = [(float(times[k]), float(times[k + 1])) for k in before]
    first, last = float(times[0]) - EXTRAPOLATION_S, float(times[-1]) + EXTRAPOLATION_S
    return [(-math.inf, first), *inner, (last, math.inf)]


def _read_log(segment: Path, start: float, options: LogOptions) -> ActionLog:
    """Both signals on the union of their times: linear interpolation loses nothing there."""
    options.check_kind(f"{segment}: comma2k19's steering", "steering_wheel")
    channels = [_channel(segment / _CAN / name, *limits) for name, limits in _LIMITS.items()]
    times = np.union1d(channels[0][0], channels[1][0])
    clock = start - options.time_offset
    pauses = [
        (channel, begin - clock, end - clock)
        for channel, (own_times, _) in enumerate(channels)
        for begin, end in _pauses(own_times)
    ]
    speed, degrees = (np.interp(times, *channel) for channel in channels)
    return ActionLog(
        times=times - clock,
        values=np.stack([speed, np.radians(degrees)], axis=1).astype(np.float32),
        has=np.array([True, True]),
        steering_kind="steering_wheel",
        pauses=tuple(pauses),
        origin=str(segment / _CAN),
    )


def load(path: Path, drive_id: str, options: LogOptions | None) -> Drive:
    """Read the facts of a segment's video and its logs, where `options` say how.

    Raises DriveSimError where one does not fit.
    """
    facts = read_facts(path / "video.hevc")
    frame_times = _array(path / "global_pose" / "frame_times")
    if len(frame_times) != len(facts.timestamps) or (np.diff(frame_times) <= 0).any():
        raise DriveSimError(
            f"{path}: video.hevc has {len(facts.timestamps)} frames, and global_pose/frame_times "
            f"must list as many increasing times, but has {len(frame_times)}: download it again"
        )
    facts = replace(facts, timestamps=frame_times - frame_times[0])
    return Drive(
        id=drive_id,
        source="comma2k19",
        timestamps=facts.timestamps,
        reader=VideoFrames(facts),
        log=None if options is None else _read_log(path, float(frame_times[0]), options),
        video=facts,
    )
