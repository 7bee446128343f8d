"""What every source of drives has in common: it looks at one folder and says what is in it.

A source is a module with the functions `detect` and `drives` of `Source`. It is added to the list
in `search.py`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive
from driving_sim.engine.errors import DriveSimError

Load = Callable[[Path, str, Reading, bool], Drive]
"""Function that loads a drive, given its path, its id, how to read it, and whether to read its
actions."""


def refused(error: DriveSimError) -> Load:
    """Return the function that loads a drive which cannot be used: it raises this error."""

    def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
        raise error

    return load


@dataclass(frozen=True, slots=True)
class Folder:
    """The names of what lies in a folder, sorted. Hidden files and folders are left out."""

    path: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]
    others: tuple[str, ...]
    """Names that are neither files nor folders, such as links that lead nowhere."""

    @classmethod
    def of(cls, path: Path) -> Self:
        """List a folder."""
        files: list[str] = []
        folders: list[str] = []
        others: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    kind = files if entry.is_file() else folders if entry.is_dir() else others
                except OSError:  # The entry is a link in a cycle of links.
                    kind = others
                kind.append(entry.name)
        return cls(path, *(tuple(sorted(names)) for names in (files, folders, others)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Something that looks like a drive, and how to load it."""

    path: Path
    load: Load
    part: str = ""
    """Name of the drive among several drives in `path`; the id ends with it. Empty if `path` is a
    single drive."""
    has_frames: bool = True
    """Whether there are frames. If there are only actions, it matters only to those who read
    actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a source makes of a folder."""

    drives: tuple[Found, ...] = ()
    own: frozenset[str]
    """Names of the files and folders that belong to the drives, such as `a.csv` or `b/0.jpg`. Other
    files are counted, and one line tells the user of them."""
    has_more: bool = False
    """Whether the other folders are searched for drives too."""
    notices: tuple[str, ...] = ()
    """What was left out or guessed. Each line is shown after the folder's path and a colon."""


class Source(Protocol):
    """A module that reads one layout of files."""

    def detect(self, folder: Folder) -> bool:
        """Return whether a folder has this layout."""
        ...

    def drives(self, folder: Folder) -> Contents:
        """Return what is in a folder that has this layout."""
        ...
