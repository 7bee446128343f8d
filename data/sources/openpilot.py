"""Find the videos of openpilot's routes, and leave out the camera that shows the driver.

A folder has one minute of a route: `fcamera.hevc` (the road), `ecamera.hevc` (the road, wide
angle), `dcamera.hevc` (the driver), `qcamera.ts` (the road, in low resolution), and the logs `rlog`
and `qlog`. The names may begin with the route and end with the logs' compression.
https://github.com/commaai/openpilot
"""

import re
from dataclasses import replace
from pathlib import PurePath

from driving_sim.data.sources import video_folder
from driving_sim.data.sources.source import Contents, Folder
from driving_sim.engine.parsing import one_line

_CAMERA = re.compile(r"(.*--)?([fedq]camera)")
_LOG = re.compile(r"(.*--)?[rq]log(\.zst|\.bz2)?")


def _cameras(folder: Folder) -> dict[str, tuple[str, str]]:
    """Return the route and the camera of each video that is named like one of a route."""
    names = [name for name in folder.files if video_folder.is_video(name)]
    matches = {name: _CAMERA.fullmatch(PurePath(name).stem) for name in names}
    return {name: (match[1] or "", match[2]) for name, match in matches.items() if match}


def detect(folder: Folder) -> bool:
    """Return whether a folder contains a video or a log of a route."""
    return any(map(_LOG.fullmatch, folder.files)) or bool(_cameras(folder))


def drives(folder: Folder) -> Contents:
    """Return the videos of the road, and lines about the files that are left out."""
    cameras = _cameras(folder)
    of_driver = [name for name, (_, camera) in cameras.items() if camera == "dcamera"]
    copies = [
        name
        for name, (route, camera) in cameras.items()
        if camera == "qcamera" and (route, "fcamera") in cameras.values()
    ]
    logs = [name for name in folder.files if _LOG.fullmatch(name)]
    notices = []
    if of_driver:
        notices.append(f"passed over {_few(of_driver)}: the camera shows the driver")
    if copies:
        notices.append(f"passed over {_few(copies)}: the same pictures as fcamera, but small")
    if logs:
        notices.append(
            f"passed over {_few(logs)}: openpilot's logs are not read; for actions, put a CSV "
            "beside each video"
        )
    left_out = {PurePath(name).stem for name in (*of_driver, *copies)}
    rest = [
        name
        for name in folder.files
        if name not in logs and not (PurePath(name).stem in left_out and _is_beside(name))
    ]
    contents = video_folder.contents_of(folder, rest)
    own = contents.own | {*folder.files} - {*rest}
    return replace(contents, own=own, notices=tuple(notices))


def _is_beside(name: str) -> bool:
    """Return whether a file is a video or belongs to the video of the same stem."""
    return video_folder.is_video(name) or PurePath(name).suffix.lower() in video_folder.BESIDE


def _few(names: list[str]) -> str:
    first, *more = map(one_line, names)
    if len(more) > 1:
        return f"{first} and {len(more)} more"
    return " and ".join((first, *more))
