"""Find the videos in a folder. The action file of a video is the CSV beside it with its stem."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from driving_sim.data.actions.action_file import LogOptions, is_action_file, read_action_file
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.video.decoder_pool import read_facts
from driving_sim.engine.errors import DriveSimError

Load = Callable[[Path, str, LogOptions | None], Drive]
"""Function that loads a drive, given its path, its id and how to read actions (None: do not)."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".mpg", ".mpeg", ".h264", ".hevc"}
)


def _action_file(video: Path) -> Path | None:
    """Return the CSV beside a video, or None. Prefer .csv to .CSV and other spellings."""
    # Try all spellings: to list a large folder for each of its videos would take quadratic time.
    beside = (video.with_suffix("." + "".join(letters)) for letters in product("cC", "sS", "vV"))
    return next((path for path in beside if path.is_file()), None)


def load(path: Path, drive_id: str, options: LogOptions | None) -> Drive:
    """Read the facts of a video, and its action file if there is one and `options` is not None.

    Raises DriveSimError if either cannot be used.
    """
    facts = read_facts(path)
    log = None
    action_file = _action_file(path)
    if options is not None and action_file is not None:
        log = read_action_file(action_file, options, frame_times=facts.timestamps)
    return Drive(
        id=drive_id,
        source="video",
        timestamps=facts.timestamps,
        reader=VideoFrames(facts),
        log=log,
        video=facts,
    )


def load_orphan(path: Path, drive_id: str, options: LogOptions | None) -> Drive:
    """Raise DriveSimError, because an action file without a video is not a drive."""
    raise DriveSimError(
        f"{path}: there is no video beside it; add {path.stem}.mp4 (or another video format) or "
        "remove this file"
    )


def found_in(folder: Path) -> Iterator[tuple[Path, Load]]:
    """Yield the videos in a folder, and its action files without a video, each with its loader."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    videos = {path.stem for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield path, load
        elif path.suffix.lower() == ".csv" and path.stem not in videos and is_action_file(path):
            yield path, load_orphan
