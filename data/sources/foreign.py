"""Name the layouts of files that drivesim does not read.

Without this, the videos in them would become drives of a strange kind, or the folders would seem to
be empty.
"""

from collections.abc import Callable

from driving_sim.data.sources.source import Contents, Folder

_MOST_INFO_BYTES = 2**20


def _is_lerobot(folder: Folder) -> bool:
    if "meta" not in folder.folders:
        return False
    try:
        with (folder.path / "meta" / "info.json").open("rb") as file:
            return b'"codebase_version"' in file.read(_MOST_INFO_BYTES)
    except OSError:
        return False


_LAYOUTS: tuple[tuple[str, Callable[[Folder], bool]], ...] = (("a LeRobot data set", _is_lerobot),)


def detect(folder: Folder) -> bool:
    """Return whether a folder has a layout that drivesim knows but does not read."""
    return any(has_layout(folder) for _, has_layout in _LAYOUTS)


def drives(folder: Folder) -> Contents:
    """Return no drives, and a line that names the layout."""
    name = next(name for name, has_layout in _LAYOUTS if has_layout(folder))
    return Contents(
        own=frozenset((*folder.files, *folder.folders, *folder.others)),
        notices=(
            f"is {name}, which drivesim does not read yet; convert it to videos with CSVs beside "
            "them",
        ),
    )
