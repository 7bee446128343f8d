"""Names that a file gives: they stay names, and what they name stays below its folder."""

import re
from pathlib import Path

# A root or a drive in front, `..` anywhere; controls and half characters, which no line can show.
_OUTSIDE = re.compile(
    r"^(?:[A-Za-z]:)?[/\\]|(?:^|[/\\])\.\.(?:[/\\]|$)|[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
)


def is_inner_name(name: str) -> bool:
    """Whether a name is a relative one that leads nowhere outside, on one line."""
    return bool(name) and not _OUTSIDE.search(name)


def inside(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`; `ValueError` where it, or a link, leads elsewhere."""
    if not is_inner_name(name):
        raise ValueError(f"{name!r} is not a name within {folder}")
    path = folder / name
    try:
        found = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        raise ValueError(f"{name!r} leads nowhere in {folder}") from None
    home = folder.resolve()
    if not found.is_relative_to(home):
        below = [each for each in (*reversed(path.parents), path) if each.is_relative_to(folder)]
        link = next(each for each in below if not each.resolve().is_relative_to(home))
        raise ValueError(
            f"{link.relative_to(folder).as_posix()!r} is a link out of {folder}; put what it leads "
            "to in its place, or a copy"
        )
    return path
