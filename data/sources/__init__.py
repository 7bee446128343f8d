"""Find drives in files and folders. Each module reads one layout of files.

A folder may mix layouts: videos with or without a CSV beside them, recordings of the Udacity
simulator (`driving_log.csv` and `IMG/`) and comma2k19 segments (`video.hevc` and `processed_log/`).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from driving_sim.data.actions.alignment import check_coverage
from driving_sim.data.drive import Drive, DriveSet, Skipped
from driving_sim.data.inner_name import is_inner_name
from driving_sim.data.reading import AS_NAMED, Reading
from driving_sim.data.sources import comma2k19, udacity, video_folder
from driving_sim.data.split import MIRROR_SUFFIX
from driving_sim.engine.errors import DriveSimError

# Read several files at once, because reading mostly waits for the disk or the network. Use one more
# decoder process for every 16 files, because starting a process takes as long as reading 16 files.
_FILES_AT_ONCE = 8
_FILES_FOR_A_DECODER = 16


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A file or folder that looks like a drive."""

    root: Path
    path: Path
    load: video_folder.Load

    def id(self, *, with_suffix: bool, with_root: bool) -> str:
        path = self.path if with_suffix or self.path.is_dir() else self.path.with_suffix("")
        if self.path == self.root:
            return path.resolve().name
        name = path.relative_to(self.root).as_posix()
        return f"{self.root.resolve().name}/{name}" if with_root else name


def _in_folder(root: Path, folder: Path, visited: set[Path]) -> Iterator[_Candidate]:
    if folder.resolve() in visited:  # A link may point to a parent folder.
        return
    visited.add(folder.resolve())
    if udacity.is_recording(folder):
        yield _Candidate(root, folder, udacity.load)
        return
    if comma2k19.is_segment(folder):
        yield _Candidate(root, folder, comma2k19.load)
        return
    for path, load in video_folder.found_in(folder):
        yield _Candidate(root, path, load)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from _in_folder(root, path, visited)


def _candidates(path: Path) -> Iterator[_Candidate]:
    if not path.exists():
        raise DriveSimError(f"{path}: no such file or folder")
    if path.name == udacity.LOG_NAME:
        path = path.parent
    if path.is_dir():
        yield from _in_folder(path, path, set())
    elif path.suffix.lower() == ".csv":
        raise DriveSimError(f"{path}: is a CSV; pass the video that it belongs to, or their folder")
    else:
        yield _Candidate(path, path, video_folder.load)


def _unique_ids(candidates: list[_Candidate]) -> list[str]:
    """Return a different id for each candidate.

    An id is the path below the searched folder. The suffix, the folder's name or both are added to
    all ids if some would be equal otherwise.
    """
    for with_root, with_suffix in product((False, True), repeat=2):
        ids = [
            candidate.id(with_suffix=with_suffix, with_root=with_root) for candidate in candidates
        ]
        if len(set(ids)) == len(ids):
            return ids
    twice = next(name for name in ids if ids.count(name) > 1)
    raise DriveSimError(
        f"two drives would have the id {twice!r}; pass the folder that contains both instead"
    )


def _check_name(drive_id: str, path: Path) -> None:
    if drive_id.endswith(MIRROR_SUFFIX):
        raise DriveSimError(
            f"{path}: names that end in {MIRROR_SUFFIX} are reserved for mirrored drives; rename it"
        )
    if not is_inner_name(drive_id):
        raise DriveSimError(
            f"{str(path)!r}: its name contains control characters, begins with a backslash or is "
            "not Unicode; rename it"
        )


def find_drives(
    paths: Sequence[Path], reading: Reading = AS_NAMED, *, actions: bool = True
) -> DriveSet:
    """Find the drives of all known layouts in files and folders.

    With `actions=False` no log is read. Drives that cannot be used are in `.skipped`, with the
    reason. The id of a drive is its path below the folder in `paths`, without suffix; if such ids
    are not unique, the suffix or the name of the folder is added. Drives are sorted by id.

    Raises DriveSimError if a path does not exist, if nothing looks like a drive, if two drives
    cannot get different ids, or if the name of a drive cannot be an id.
    """
    by_path = {
        candidate.path.resolve(): candidate for path in paths for candidate in _candidates(path)
    }
    candidates = [
        candidate
        for candidate in by_path.values()
        if actions or candidate.load is not video_folder.load_orphan
    ]
    if not candidates:
        raise DriveSimError(
            f"{', '.join(map(str, paths))}: holds no videos "
            f"({', '.join(sorted(video_folder.VIDEO_SUFFIXES))}), no Udacity {udacity.LOG_NAME} "
            "and no comma2k19 segments"
        )
    named = sorted(zip(_unique_ids(candidates), candidates, strict=True), key=lambda pair: pair[0])
    for drive_id, candidate in named:
        _check_name(drive_id, candidate.path)

    def load(pair: tuple[str, _Candidate]) -> Drive | Skipped:
        drive_id, candidate = pair
        try:
            drive = candidate.load(candidate.path, drive_id, reading, actions)
            if drive.log is not None:
                check_coverage(drive.log, drive.timestamps)
        except DriveSimError as error:
            return Skipped(id=drive_id, reason=str(error))
        if reading.wheelbase is not None:
            drive = replace(drive, wheelbase_m=reading.wheelbase)
        return drive

    at_once = min(_FILES_AT_ONCE, 1 + len(named) // _FILES_FOR_A_DECODER)
    with ThreadPoolExecutor(at_once) as pool:
        loaded = list(pool.map(load, named))
    return DriveSet(
        drives=[drive for drive in loaded if isinstance(drive, Drive)],
        skipped=[skipped for skipped in loaded if isinstance(skipped, Skipped)],
    )
