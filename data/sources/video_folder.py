"""Find the videos in a folder. `a.csv` is the action file of a video `a.mp4` beside it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path, PurePath

import numpy as np

from driving_sim.data.actions.action_file import is_action_file, read_action_file
from driving_sim.data.actions.columns import TIMES, find_time
from driving_sim.data.actions.csv_table import read_csv, read_header
from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.sources.source import Contents, Folder, Found
from driving_sim.data.video.decoder_pool import read_facts
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.timing import RESTART_GAP_S
from driving_sim.engine.errors import DriveSimError

VIDEO_SUFFIXES = frozenset(
    suffix
    for suffixes in (
        (".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".f4v", ".flv", ".mkv", ".webm", ".avi"),
        (".ts", ".mts", ".m2ts", ".m2t", ".tod", ".mpg", ".mpeg", ".mod", ".vob", ".m2v"),
        (".wmv", ".asf", ".ogv", ".mxf", ".dv", ".dav", ".ivf", ".mjpg", ".mjpeg"),
        (".264", ".h264", ".265", ".h265", ".hevc"),
    )
    for suffix in suffixes
)
"""Suffixes, in lower case, that cameras, recorders and common programs give to videos."""
BESIDE = frozenset({".csv", ".json"})
"""Suffixes of the files that belong to the video of the same stem. drivesim writes the JSON."""
_PLAN_OF_SYNTH = "synthetic.json"


def is_video(name: str) -> bool:
    """Return whether a file has the suffix of a video, in any case."""
    return PurePath(name).suffix.lower() in VIDEO_SUFFIXES


def _action_file(video: Path) -> Path | None:
    """Return the CSV beside a video, or None. Its suffix may be upper-case or lower-case."""
    # Try all spellings of the suffix. Listing the folder for each video would take quadratic time.
    beside = (video.with_suffix("." + "".join(letters)) for letters in product("cC", "sS", "vV"))
    return next((path for path in beside if path.is_file()), None)


def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Read the facts of a video, and its action file if it has one and `actions` is set.

    Raises DriveSimError if the video or its action file cannot be used.
    """
    facts = read_facts(path, stream=reading.stream, video_fps=reading.video_fps)
    log = None
    action_file = _action_file(path)
    if actions and action_file is not None:
        _check_clock(facts, action_file)
        facts, reading = _on_csv_clock(facts, action_file, reading)
        log = read_action_file(action_file, reading, frame_times=facts.timestamps)
    return Drive(
        id=drive_id,
        source="video",
        timestamps=facts.timestamps,
        reader=VideoFrames(facts),
        log=log,
        video=facts,
    )


def _on_csv_clock(
    facts: VideoFacts, action_file: Path, reading: Reading
) -> tuple[VideoFacts, Reading]:
    """Take the times of frames from the CSV if the video has none and the CSV has a row for each.

    Returns the facts with these times, and the settings for reading the CSV on the same clock.
    """
    if facts.has_own_times or reading.video_fps is not None:
        return facts, reading
    table = read_csv(action_file)
    column = find_time(table)
    if column is None or len(table.rows) != len(facts.timestamps):
        return facts, reading
    times = table.numbers(column.name) * column.scale
    if not (np.diff(times) > 0).all():
        return facts, reading  # `read_action_file` names the row.
    notice = (
        "the video does not store its frame rate; the times of its frames are those of "
        f"{action_file.name}, which has a row for each"
    )
    facts = facts.timed(times - times[0], notice)
    return facts, replace(reading, time_offset=reading.time_offset - float(times[0]))


def _check_clock(facts: VideoFacts, action_file: Path) -> None:
    """Raise DriveSimError if the times of a CSV cannot be matched, because the video's clock starts
    again. Numbers of frames can be matched."""
    if len(facts.restarts) and not TIMES.keys().isdisjoint(read_header(action_file)):
        raise DriveSimError(
            f"{action_file}: its times cannot be matched, because the clock of {facts.path.name} "
            f"starts again after {facts.restarts[0] - RESTART_GAP_S:.1f} s; number the rows by a "
            "column frame instead, split the video there, or remove the CSV"
        )


def _load_orphan(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Raise DriveSimError, because an action file without a video is not a drive."""
    raise DriveSimError(
        f"{path}: there is no video beside it; add {path.stem}.mp4 (or another video format) or "
        "remove this file"
    )


def contents_of(folder: Folder, files: Sequence[str]) -> Contents:
    """Return the videos among some files of a folder, and the action files without a video."""
    videos = {PurePath(name).stem for name in files if is_video(name)}
    found, own = [], set()
    for name in files:
        path, suffix = folder.path / name, PurePath(name).suffix.lower()
        if is_video(name):
            found.append(Found(path=path, load=load))
        elif suffix == ".csv" and path.stem not in videos and is_action_file(path):
            found.append(Found(path=path, load=_load_orphan, has_frames=False))
        elif not (suffix in BESIDE and path.stem in videos) and name != _PLAN_OF_SYNTH:
            continue
        own.add(name)
    return Contents(drives=tuple(found), own=frozenset(own), has_more=True)
