"""Check file names that are read from input files: they must not lead outside a folder."""

import re
from pathlib import Path

# Matches absolute paths, `..`, and unprintable characters: control characters and surrogates.
_OUTSIDE = re.compile(
    r"^(?:[A-Za-z]:)?[/\\]|(?:^|[/\\])\.\.(?:[/\\]|$)|[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
)


def is_inner_name(name: str) -> bool:
    """Return whether a name is relative, stays inside its folder and can be printed on one line."""
    return bool(name) and not _OUTSIDE.search(name)


def inside(folder: Path, name: str, home: Path | None = None) -> Path:
    """Return the path of `name` below `folder`.

    A caller with many names passes `home`, which is `folder.resolve()`. Raises ValueError if the
    name, or a symbolic link on the path, leads outside the folder.
    """
    if not is_inner_name(name):
        raise ValueError(f"{name!r} is not the name of a file inside {folder}")
    path = folder / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: the links form a cycle.
        raise ValueError(f"{name!r} cannot be resolved in {folder}") from None
    home = home or folder.resolve()
    if not target.is_relative_to(home):
        below = [part for part in (*reversed(path.parents), path) if part.is_relative_to(folder)]
        link = next(part for part in below if not part.resolve().is_relative_to(home))
        raise ValueError(
            f"{link.relative_to(folder).as_posix()!r} is a link that leads outside {folder}; "
            "replace it with a copy of its target"
        )
    return path
