"""Find the videos in a folder. `a.csv` is the action file of a video `a.mp4` beside it."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from driving_sim.data.actions.action_file import is_action_file, read_action_file
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.reading import Reading
from driving_sim.data.video.decoder_pool import read_facts
from driving_sim.engine.errors import DriveSimError

Load = Callable[[Path, str, Reading, bool], Drive]
"""Function that loads a drive, given its path, its id, how to read it, and whether to read its
actions."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".mpg", ".mpeg", ".h264", ".hevc"}
)


def _action_file(video: Path) -> Path | None:
    """Return the CSV beside a video, or None. Its suffix may be upper-case or lower-case."""
    # Try all spellings of the suffix. Listing the folder for each video would take quadratic time.
    beside = (video.with_suffix("." + "".join(letters)) for letters in product("cC", "sS", "vV"))
    return next((path for path in beside if path.is_file()), None)


def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Read the facts of a video, and its action file if it has one and `actions` is set.

    Raises DriveSimError if the video or its action file cannot be used.
    """
    facts = read_facts(path)
    log = None
    action_file = _action_file(path)
    if actions and action_file is not None:
        log = read_action_file(action_file, reading, frame_times=facts.timestamps)
    return Drive(
        id=drive_id,
        source="video",
        timestamps=facts.timestamps,
        reader=VideoFrames(facts),
        log=log,
        video=facts,
    )


def load_orphan(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
    """Raise DriveSimError, because an action file without a video is not a drive."""
    raise DriveSimError(
        f"{path}: there is no video beside it; add {path.stem}.mp4 (or another video format) or "
        "remove this file"
    )


def found_in(folder: Path) -> Iterator[tuple[Path, Load]]:
    """Yield the path and the loader of each video, and of each action file without a video."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    videos = {path.stem for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield path, load
        elif path.suffix.lower() == ".csv" and path.stem not in videos and is_action_file(path):
            yield path, load_orphan
