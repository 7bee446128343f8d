"""Outputs that are written whole or not at all, and a file's checksum."""

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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_REPLACED = re.compile(r"\.(.+)\.\d+\.replaced")


def temporary_beside(path: Path, process: int | None = None) -> Path:
    """Where a process, this one by default, writes what will be `path`; makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DriveSimError(f"cannot create the folder {path.parent}: {error.strerror}") from error
    # The suffix stays last: writers (PyAV, Pillow) choose the format by it.
    return path.with_name(f".{path.stem}.{process or os.getpid()}.partial{path.suffix}")


def _sync(path: Path) -> None:
    # Windows opens no folders, and syncs files that may be written only.
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a file size limit or a lack of rights inside into a `DriveSimError`."""
    try:
        yield
    except OSError as error:
        # An input that may not be read is another matter.
        of_output = isinstance(error.filename, str) and Path(error.filename).is_relative_to(
            path.parent
        )
        if error.errno in _FULL or (error.errno in _FORBIDDEN and of_output):
            raise DriveSimError(
                f"cannot write {path}: {os.strerror(error.errno)}; make room or choose another "
                "place"
            ) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed, else removed.

    A full disk and the like become a `DriveSimError` (see `disk_errors`).
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
    """Yield a new folder beside `path`; on success it is synced and renamed, else removed.

    An existing folder at `path` is replaced. Errors as for `atomic_file`.
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
                # Moved first: a kill in between leaves the old content, under another name.
                path.rename(replaced)
            temporary.rename(path)
            _sync(path.parent)
        finally:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            for leftover in (temporary, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256, in hexadecimal, of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_free(folder: Path) -> bool:
    """Whether an existing path is a folder with nothing in it but what killed writers left."""
    return folder.is_dir() and all(entry.name.startswith(".") for entry in folder.iterdir())


def tidy(folder: Path) -> None:
    """Clear `folder` and all below it of what killed writers left, when no other writes there.

    A folder that was being replaced, and is not there yet anew, gets its old content back.
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
