"""Read segments of comma2k19: one minute of raw HEVC, and the car's logs as NumPy arrays.

`video.hevc` has no timestamps. `global_pose/frame_times` [N] contains the times of its frames, on
the same clock as the logs in `processed_log/CAN/{speed,steering_angle}/{t,value}`. The logs are in
m/s and in degrees of the steering wheel, left positive. The array files have no suffix.
https://github.com/commaai/comma2k19
"""

import math
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import (
    SPEED_RANGE_MPS,
    STEERING_LIMIT,
    ActionLog,
    Channel,
)
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.sources.source import Contents, Folder, Found
from driving_sim.data.video.decoder_pool import read_facts
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_CAN = Path("processed_log", "CAN")
_OWN = frozenset(("video.hevc", "global_pose", "processed_log", "raw_log.bz2", "preview.png"))
_TURN_DEG = math.degrees(STEERING_LIMIT["steering_wheel"])
_LIMITS = {"speed": SPEED_RANGE_MPS, "steering_angle": (-_TURN_DEG, _TURN_DEG)}


def detect(folder: Folder) -> bool:
    """Return whether a folder is a comma2k19 segment."""
    return _CAN.parts[0] in folder.folders and (folder.path / _CAN).is_dir()


def drives(folder: Folder) -> Contents:
    """Return the drive of a segment."""
    return Contents(drives=(Found(path=folder.path, load=load),), own=_OWN)


def _array(path: Path) -> Floats:
    if not path.is_file():
        raise DriveSimError(
            f"{path}: is missing from the comma2k19 segment; download the segment again"
        )
    try:
        # Map the file into memory: a header that claims a huge shape then raises an error, and no
        # huge array is allocated.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
            raise ValueError("it does not contain plain numbers")
        flat = np.asarray(values, np.float64).ravel()
    # Catch everything: NumPy parses the header as a Python literal, which can raise any error.
    except Exception as error:
        reason = one_line(error)
        raise DriveSimError(
            f"{path}: cannot be read as a NumPy array ({reason}); download it again"
        ) from None
    if len(flat) < 2 or not np.isfinite(flat).all():
        raise DriveSimError(
            f"{path}: has fewer than 2 values, or one that is not finite; leave this segment out"
        )
    return flat


def _channel(folder: Path, low: float, high: float) -> tuple[Floats, Floats, int]:
    """Return the times and values of one CAN signal, and how many values were left out.

    Only the first value at each time is kept.
    """
    times, values = _array(folder / "t"), _array(folder / "value")
    if len(times) != len(values):
        raise DriveSimError(
            f"{folder}: has {len(times)} times for {len(values)} values; leave this segment out"
        )
    if (np.diff(times) < 0).any():
        raise DriveSimError(f"{folder / 't'}: its times go backward; leave this segment out")
    if values.min() < low or values.max() > high:
        raise DriveSimError(
            f"{folder / 'value'}: has values from {values.min():g} to {values.max():g}, but only "
            f"{low:g} to {high:g} is possible; leave this segment out"
        )
    count = len(times)
    times, first = np.unique(times, return_index=True)
    if len(times) < 2:
        raise DriveSimError(f"{folder / 't'}: has only one distinct time; leave this segment out")
    return times, values[first], count - len(times)


def _read_log(segment: Path, start: float, reading: Reading) -> ActionLog:
    reading.check_kind(f"{segment}: comma2k19's steering", "steering_wheel")
    (speed_times, speed, *_), (steering_times, degrees, *_) = channels = [
        _channel(segment / _CAN / name, *limits) for name, limits in _LIMITS.items()
    ]
    notices = tuple(
        f"left out of {name}: {repeated} value{'s' * (repeated > 1)} at the time of another one"
        for name, (_, _, repeated) in zip(_LIMITS, channels, strict=True)
        if repeated
    )
    clock = start - reading.time_offset
    return ActionLog(
        speed=Channel(times=speed_times - clock, values=speed.astype(np.float32)),
        steering=Channel(
            times=steering_times - clock, values=np.radians(degrees).astype(np.float32)
        ),
        steering_kind="steering_wheel",
        origin=str(segment / _CAN),
        notices=notices,
    )


def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Read the facts of a segment's video and, if `actions` is set, the segment's logs.

    Raises DriveSimError if a file cannot be used, or if the video and its frame times do not match.
    """
    video = path / "video.hevc"
    facts = read_facts(video, stream=reading.stream, video_fps=reading.video_fps)
    frame_times = _array(path / "global_pose" / "frame_times")
    if len(frame_times) != len(facts.timestamps) or (np.diff(frame_times) <= 0).any():
        raise DriveSimError(
            f"{path}: global_pose/frame_times must list increasing times, one for each of the "
            f"{len(facts.timestamps)} frames of video.hevc (it lists {len(frame_times)} times); "
            "download the segment again"
        )
    facts = facts.timed(frame_times - frame_times[0])
    return Drive(
        id=drive_id,
        source="comma2k19",
        timestamps=facts.timestamps,
        reader=VideoFrames(facts),
        log=_read_log(path, float(frame_times[0]), reading) if actions else None,
        video=facts,
    )
