"""Videos, each with or without an action file: a CSV with the video's stem beside it."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from driving_sim.data.actions.action_file import LogOptions, is_action_file, read_action_file
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.video.decoder_pool import read_facts
from driving_sim.engine.errors import DriveSimError

Load = Callable[[Path, str, LogOptions | None], Drive]
"""Makes the drive of a path, given its id and how to read its actions, where that is wanted."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".mpg", ".mpeg", ".h264", ".hevc"}
)


def _action_file(video: Path) -> Path | None:
    """The CSV beside a video, in upper or lower case; .csv of several."""
    # Tried one by one: to list a large folder for each of its videos takes quadratic time.
    beside = (video.with_suffix("." + "".join(letters)) for letters in product("cC", "sS", "vV"))
    return next((path for path in beside if path.is_file()), None)


def load(path: Path, drive_id: str, options: LogOptions | None) -> Drive:
    """Read the facts of a video and its action file, if there is one and `options` say how.

    Raises DriveSimError where either cannot be used, or the CSV does not belong to the video.
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
    """Raise the DriveSimError that says what an action file without a video lacks."""
    raise DriveSimError(
        f"{path}: there is no video beside it; expected {path.stem}.mp4 or another video suffix"
    )


def found_in(folder: Path) -> Iterator[tuple[Path, Load]]:
    """The videos right in a folder and its action files without one, with what loads each."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    videos = {path.stem for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield path, load
        elif path.suffix.lower() == ".csv" and path.stem not in videos and is_action_file(path):
            yield path, load_orphan
