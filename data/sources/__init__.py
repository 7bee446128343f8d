"""Find drives in files and folders. Each module reads one layout of files.

A folder may mix layouts: videos with or without a CSV beside them, series of pictures, and
recordings of simulators and data sets. `search.py` lists the layouts.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

from driving_sim.data.actions.alignment import check_coverage
from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.drive import Drive, DriveSet, Skipped
from driving_sim.data.inner_name import is_inner_name
from driving_sim.data.sources.search import Candidate, Search
from driving_sim.data.split import MIRROR_SUFFIX
from driving_sim.engine.errors import DriveSimError

# Read several files at once, because reading mostly waits for the disk or the network. Use one more
# decoder process for every 16 files, because starting a process takes as long as reading 16 files.
_FILES_AT_ONCE = 8
_FILES_FOR_A_DECODER = 16
_NOTHING = (
    "holds no videos (such as .mp4, .mov or .mkv), no series of pictures, and no recordings of the "
    "Udacity simulator, comma2k19, donkeycar, KITTI or nuScenes"
)


def _unique_ids(candidates: list[Candidate]) -> list[str]:
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
            f"{path}: the drive's name would be {drive_id!r}, but names that end in "
            f"{MIRROR_SUFFIX} are reserved for mirrored drives; rename the file or folder"
        )
    if not is_inner_name(drive_id):
        raise DriveSimError(
            f"{str(path)!r}: the drive's name would be {drive_id!r}, which contains control "
            "characters, begins with a backslash or is not Unicode; rename the file or folder"
        )


def find_drives(
    paths: Sequence[Path], reading: Reading = AS_NAMED, *, actions: bool = True
) -> DriveSet:
    """Find the drives of all known layouts in files and folders.

    With `actions=False` no log is read. Drives that cannot be used are in `.skipped`, with the
    reason. What else was left out is in `.passed_over`. The id of a drive is its path below the
    folder in `paths`, without suffix; if such ids are not unique, the suffix or the name of the
    folder is added. Drives are sorted by id.

    Raises DriveSimError if a path does not exist, if nothing looks like a drive, if two drives
    cannot get different ids, or if the name of a drive cannot be an id.
    """
    search = Search(reading)
    for path in paths:
        search.add(path)
    by_path = {
        (candidate.found.path.resolve(), candidate.found.part): candidate
        for candidate in search.candidates
        if actions or candidate.found.has_frames
    }
    candidates = [*by_path.values()]
    if not candidates:
        raise DriveSimError(
            "; ".join(search.lines)
            if search.notices
            else "; ".join([f"{', '.join(map(str, paths))}: {_NOTHING}", *search.counts])
        )
    named = sorted(zip(_unique_ids(candidates), candidates, strict=True), key=lambda pair: pair[0])
    for drive_id, candidate in named:
        _check_name(drive_id, candidate.found.path)

    def load(pair: tuple[str, Candidate]) -> Drive | Skipped:
        drive_id, candidate = pair
        try:
            drive = candidate.found.load(candidate.found.path, drive_id, reading, actions)
            if drive.log is not None:
                lines = check_coverage(drive.log, drive.timestamps)
                drive = replace(drive, assumptions=(*drive.assumptions, *lines))
        except DriveSimError as error:
            return Skipped(id=drive_id, reason=str(error))
        return replace(drive, wheelbase_m=reading.wheelbase_of(candidate.found.path))

    at_once = min(_FILES_AT_ONCE, 1 + len(named) // _FILES_FOR_A_DECODER)
    with ThreadPoolExecutor(at_once) as pool:
        loaded = list(pool.map(load, named))
    return DriveSet(
        drives=[drive for drive in loaded if isinstance(drive, Drive)],
        skipped=[skipped for skipped in loaded if isinstance(skipped, Skipped)],
        passed_over=search.lines,
    )
