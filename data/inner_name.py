"""Check file names that an input file contains: they must not lead out of its folder."""

import re
from pathlib import Path

# Absolute paths, `..`, and characters that cannot be printed: control characters and surrogates.
_OUTSIDE = re.compile(
    r"^(?:[A-Za-z]:)?[/\\]|(?:^|[/\\])\.\.(?:[/\\]|$)|[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
)


def is_inner_name(name: str) -> bool:
    """Return whether a name is relative, stays inside its folder and can be printed on one line."""
    return bool(name) and not _OUTSIDE.search(name)


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` below `folder`; raise ValueError if it or a link leads outside."""
    if not is_inner_name(name):
        raise ValueError(f"{name!r} is not the name of a file inside {folder}")
    path = folder / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: the links form a circle.
        raise ValueError(f"{name!r} cannot be resolved in {folder}") from None
    home = folder.resolve()
    if not target.is_relative_to(home):
        below = [part for part in (*reversed(path.parents), path) if part.is_relative_to(folder)]
        link = next(part for part in below if not part.resolve().is_relative_to(home))
        raise ValueError(
            f"{link.relative_to(folder).as_posix()!r} is a link out of {folder}; replace it "
            "by the file or folder that it leads to"
        )
    return path
