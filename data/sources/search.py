"""Search files and folders for everything that looks like a drive, and count the rest."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.sources import (
    comma2k19,
    donkeycar,
    foreign,
    kitti,
    nuscenes,
    openpilot,
    pictures,
    udacity,
    video_folder,
)
from driving_sim.data.sources.source import Folder, Found, Source
from driving_sim.data.sources.udacity.log import LOG_NAME
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

SOURCES: tuple[Source, ...] = (
    udacity,
    comma2k19,
    donkeycar,
    kitti,
    nuscenes,
    foreign,
    openpilot,
)
"""The layouts that are known. The first one that a folder has says what is in the folder. In other
folders, pictures and videos are searched."""

_SUFFIX = re.compile(r"\.\w{1,12}", re.ASCII)
_MOST_SUFFIXES = 6


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that looks like a drive, found by searching `root`."""

    root: Path
    found: Found

    def id(self, *, with_suffix: bool, with_root: bool) -> str:
        """Return the path below `root`, with or without the suffix and the name of `root`."""
        path, part = self.found.path, f"/{self.found.part}" if self.found.part else ""
        name = path if with_suffix or path.is_dir() else path.with_suffix("")
        if path == self.root:
            return name.resolve().name + part
        below = name.relative_to(self.root).as_posix() + part
        return f"{self.root.resolve().name}/{below}" if with_root else below


@dataclass(slots=True)
class Search:
    """What was found in some files and folders."""

    reading: Reading = AS_NAMED
    candidates: list[Candidate] = field(default_factory=list)
    notices: dict[str, list[Path]] = field(default_factory=dict)
    """What was left out or guessed, and the folders in which it was."""
    counts: list[str] = field(default_factory=list)
    """A line for each searched folder that has files which belong to no drive."""

    @property
    def lines(self) -> list[str]:
        """One line for everything in the folders that was left out or guessed."""
        return [*map(_about, self.notices, self.notices.values()), *self.counts]

    def add(self, path: Path) -> None:
        """Search a file or folder.

        Raises DriveSimError if it does not exist, or is a CSV.
        """
        if not path.exists():
            raise DriveSimError(f"{path}: no such file or folder")
        if path.name == LOG_NAME:
            path = path.parent
        if path.is_dir():
            others: Counter[str] = Counter()
            self._visit(path, path, others, set(), ())
            if others:
                self.counts.append(f"{path}: {_passed_over(others)}")
        elif path.suffix.lower() == ".csv":
            raise DriveSimError(
                f"{path}: is a CSV; pass the video that it belongs to, or their folder"
            )
        else:
            self.candidates.append(Candidate(path, Found(path=path, load=video_folder.load)))

    def _visit(
        self,
        root: Path,
        path: Path,
        others: Counter[str],
        visited: set[Path],
        taken: Collection[str],
    ) -> None:
        """Search a folder. Drives outside it have `taken` these files in it."""
        if path.resolve() in visited:  # A link may point to a parent folder.
            return
        visited.add(path.resolve())
        folder = Folder.of(path)
        if taken:
            folder = replace(folder, files=tuple(sorted({*folder.files}.difference(taken))))
        source = next((source for source in SOURCES if source.detect(folder)), None)
        contents = source.drives(folder) if source else pictures.drives(folder, self.reading)
        self.candidates += [Candidate(root, found) for found in contents.drives]
        for line in contents.notices:
            folders = self.notices.setdefault(line, [])
            if path not in folders[-1:]:  # Several of the searched paths may contain it.
                folders.append(path)
        others.update(_suffixes({*folder.files, *folder.others} - contents.own))
        below = _by_folder((*contents.own, *taken))
        for name in folder.folders:
            if name in contents.own:
                continue
            if contents.has_more:
                self._visit(root, path / name, others, visited, below.get(name, ()))
            else:
                others.update(_suffixes(_names_below(path / name)))


def _by_folder(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of files below each folder, given names such as `folder/name`."""
    below = defaultdict(list)
    for name in names:
        folder, slash, rest = name.partition("/")
        if slash:
            below[folder].append(rest)
    return below


def _names_below(folder: Path) -> Iterator[str]:
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (name for name in files if not name.startswith("."))


def _suffixes(names: Iterable[str]) -> Iterator[str]:
    """Yield the suffix of each name in lower case. It is empty if it does not look like one."""
    for name in names:
        suffix = PurePath(name).suffix.lower()
        yield suffix if _SUFFIX.fullmatch(suffix) else ""


def _passed_over(others: Counter[str]) -> str:
    ranked = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{count} {suffix or 'without a suffix'}" for suffix, count in ranked]
    if len(kinds) > _MOST_SUFFIXES:
        rest = sum(count for _, count in ranked[_MOST_SUFFIXES:])
        kinds[_MOST_SUFFIXES:] = [f"{rest} of other kinds"]
    total = others.total()
    return f"passed over {total} other file{'s' * (total > 1)}: {', '.join(kinds)}"


def _about(line: str, folders: list[Path]) -> str:
    more = len(folders) - 1
    others = f" (and {more} more folder{'s' * (more > 1)})" if more else ""
    return f"{one_line(folders[0])}{others}: {line}"
