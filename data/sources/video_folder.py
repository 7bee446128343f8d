"""Videos, each with or without an action file: a CSV with the video's stem beside it."""

from itertools import product
from pathlib import Path

from driving_sim.data.actions.action_file import LogOptions, is_action_file, read_action_file
from driving_sim.data.drive import Drive, VideoFrames
from driving_sim.data.video.decoder_pool import probe
from driving_sim.engine.errors import DriveSimError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".mpg", ".mpeg", ".h264", ".hevc"}
)
_CSV_LETTERS = ("cC", "sS", "vV")


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )


def videos(folder: Path) -> list[Path]:
    """The video files right in a folder, sorted."""
    return [path for path in _files(folder) if path.suffix.lower() in VIDEO_SUFFIXES]


def orphan_action_files(folder: Path) -> list[Path]:
    """The action files right in a folder that have no video beside them, sorted."""
    stems = {path.stem for path in videos(folder)}
    return [
        path
        for path in _files(folder)
        if path.suffix.lower() == ".csv" and path.stem not in stems and is_action_file(path)
    ]


def _action_file(video: Path) -> Path | None:
    """The CSV beside a video, in upper or lower case; .csv of several."""
    # Tried one by one: to list a large folder for each of its videos takes quadratic time.
    beside = (video.with_suffix("." + "".join(letters)) for letters in product(*_CSV_LETTERS))
    return next((path for path in beside if path.is_file()), None)


def load(path: Path, drive_id: str, options: LogOptions | None) -> Drive:
    """Probe a video and read its action file, if there is one and `options` say how.

    Raises DriveSimError where either cannot be used, or the CSV does not belong to the video.
    """
    info = probe(path)
    log = None
    action_file = _action_file(path)
    if options is not None and action_file is not None:
        log = read_action_file(action_file, options, frame_times=info.timestamps)
    return Drive(
        id=drive_id,
        source="video",
        timestamps=info.timestamps,
        reader=VideoFrames(info),
        log=log,
        video=info,
    )


def load_orphan(path: Path, drive_id: str, options: LogOptions | None) -> Drive:
    """Raise the DriveSimError that says what an action file without a video lacks."""
    raise DriveSimError(
        f"{path}: there is no video beside it; expected {path.stem}.mp4 or another video suffix"
    )
