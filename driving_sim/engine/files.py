"""Write files and folders atomically, delete leftovers of killed writers, compute checksums."""

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from driving_sim.engine.errors import DriveSimError

_WINDOWS = sys.platform == "win32"
_LONGEST_NAME = 255  # bytes, which most file systems allow
_LONGEST_SUFFIX = 20  # characters; a longer one names no file format
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_REPLACED = re.compile(r"\.(.+)\.\d+\.replaced")


def temporary_beside(path: Path, process: int | None = None) -> Path:
    """Return the path of the temporary file or folder that a process will rename to `path`.

    The parent folder of `path` is created. `process` is the id of the process, by default that of
    this process.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DriveSimError(f"cannot create the folder {path.parent}: {error.strerror}") from error
    # Keep the suffix at the end, because PyAV and Pillow choose the file format by the suffix.
    stem, suffix = path.stem, path.suffix
    if len(suffix) > _LONGEST_SUFFIX:
        stem, suffix = path.name, ""
    ending = f".{process or os.getpid()}.partial{suffix}"
    room = _LONGEST_NAME - len(os.fsencode(f".{ending}"))
    if len(os.fsencode(stem)) > room:
        mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
        stem = os.fsencode(stem)[: room - len(mark)].decode("utf-8", "ignore") + mark
    return path.with_name(f".{stem}{ending}")


def _sync(path: Path) -> None:
    # Windows cannot open folders, and can only sync files that are opened for writing.
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within this context, raise `DriveSimError` if `path` cannot be written.

    The reason can be a full disk or a missing permission. Other errors are raised unchanged.
    """
    try:
        yield
    except OSError as error:
        # A permission error can also come from an input file, so check which file the error names.
        is_output = isinstance(error.filename, str) and Path(error.filename).is_relative_to(
            path.parent
        )
        if error.errno in _FULL or (error.errno in _FORBIDDEN and is_output):
            raise DriveSimError(
                f"cannot write {path}: {os.strerror(error.errno)}; make room or choose another "
                "folder"
            ) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path. On success, rename the file there to `path`. Otherwise delete it.

    The file is synced to disk before it is renamed. Raises `DriveSimError` if the disk is full or
    `path` may not be written.
    """
    with disk_errors(path):
        temporary = temporary_beside(path)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder. On success, rename it to `path`. Otherwise delete it.

    An existing folder at `path` is replaced. All files are synced to disk before the folder is
    renamed. Raises the same errors as `atomic_file`.
    """
    with disk_errors(path):
        temporary = temporary_beside(path)
        replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                _sync(entry)
            if path.exists():
                # Do not delete the old folder before the new one is in place: if the process is
                # killed between the two steps, `tidy` restores the old folder.
                path.rename(replaced)
            temporary.rename(path)
            _sync(path.parent)
        finally:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            for leftover in (temporary, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_free(folder: Path) -> bool:
    """Return whether `folder` exists and contains nothing but hidden files and folders.

    Hidden files do not count, because killed writers leave hidden temporary files behind.
    """
    return folder.is_dir() and all(entry.name.startswith(".") for entry in folder.iterdir())


def tidy(folder: Path) -> None:
    """Delete the leftovers of killed writers in `folder` and its subfolders.

    Call this only while no other process writes to `folder`. If a writer was killed while it
    replaced a folder, the old content of that folder is restored.
    """
    for path in [*folder.rglob(".*.replaced")]:
        name = _REPLACED.fullmatch(path.name)
        if name and not path.with_name(name[1]).exists():
            path.rename(path.with_name(name[1]))
    for path in [*folder.rglob(".*.partial*"), *folder.rglob(".*.replaced")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
