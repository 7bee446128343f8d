"""Outputs that are written whole or not at all."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from driving_sim.engine.errors import DriveSimError

_WINDOWS = sys.platform == "win32"
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
_REPLACED = re.compile(r"\.(.+)\.\d+\.replaced")
_FORBIDDEN = frozenset((errno.EACCES, errno.EPERM))


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
    except Exception as error:
        code = _errno(error)
        if code not in _FULL and not (code in _FORBIDDEN and _is_at(error, path)):
            raise
        raise DriveSimError(
            f"cannot write {path}: {os.strerror(code)}; make room or choose another place"
        ) from error


def _is_at(error: Exception, path: Path) -> bool:
    """Whether an error is about the output: an input that may not be read is another matter."""
    name = error.filename if isinstance(error, OSError) else None
    return isinstance(name, str) and Path(name).is_relative_to(path.parent)


def _errno(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # Writers in Rust (safetensors) give the number in their message only.
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


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
        replaced = temporary.with_suffix(".replaced")
        _remove(temporary, replaced)
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
            _remove(temporary, replaced)


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
            _remove(path)
        else:
            path.unlink(missing_ok=True)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
