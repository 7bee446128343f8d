"""Read nuScenes, and data sets in its schema. Each scene is a drive.

The frames are those of the front camera, 12 a second: the samples (2 a second) and the sweeps
between them. `tables.py` says how they are listed, and `motion.py` where the actions come from.
https://www.nuscenes.org
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive
from driving_sim.data.inner_name import inside
from driving_sim.data.sources.nuscenes.motion import CanBus, Poses, scene_log
from driving_sim.data.sources.nuscenes.tables import CAMERA, Scene, read_scenes
from driving_sim.data.sources.pictures.files import (
    about_sizes,
    check_picture_times,
    find_pictures,
    unused_rate,
)
from driving_sim.data.sources.source import Contents, Folder, Found, refused
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_TABLES = frozenset(("sample.json", "sample_data.json", "sensor.json"))
_VERSION = re.compile(r"v\d+\.\d+.*")  # v1.0-mini, v1.0-trainval
_OWN = frozenset(
    ("samples", "sweeps", "maps", "can_bus", "images", "lidar", "lidarseg", "panoptic")
)
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")


def _versions(folder: Folder) -> list[str]:
    """Return the folders with tables below a folder."""
    return [
        name
        for name in filter(_VERSION.fullmatch, folder.folders)
        if all((folder.path / name / table).is_file() for table in _TABLES)
    ]


def detect(folder: Folder) -> bool:
    """Return whether a folder contains the tables of nuScenes, or folders with them."""
    return {*folder.files} >= _TABLES or bool(_versions(folder))


def drives(folder: Folder) -> Contents:
    """Return a drive for each scene of a data set."""
    versions = _versions(folder)
    own = {*versions, *_OWN}
    if {*folder.files} >= _TABLES:
        versions = ["."]
        own |= {name for name in folder.files if name.endswith(".json")}
    found: list[Found] = []
    notices = []
    seen: set[str] = set()
    for version in versions:
        tables = folder.path / version
        try:
            scenes = read_scenes(tables)
        except DriveSimError as error:
            part = version if len(versions) > 1 else ""
            found.append(Found(path=folder.path, load=refused(error), part=part))
            continue
        new = [scene for scene in scenes if scene.token not in seen]
        if len(new) < len(scenes):
            notices.append(
                f"{len(scenes) - len(new)} scenes of {one_line(version)} are in another version "
                "too and are read once"
            )
        seen |= {scene.token for scene in new}
        root = _root(folder.path, new)
        here = [scene for scene in new if _has_pictures(root, scene)]
        if len(here) < len(new):
            notices.append(
                f"{len(new) - len(here)} of {len(new)} scenes are left out: their pictures are not "
                f"here (the first is {one_line(_first_missing(new, here))})"
            )
        found += _scenes(folder.path, root, tables, here, len(found))
    if not found and not notices:
        notices.append(f"is a nuScenes data set without pictures of {CAMERA}")
    return Contents(drives=tuple(found), own=frozenset(own), notices=tuple(notices))


def _has_pictures(root: Path, scene: Scene) -> bool:
    """Return whether a few of the pictures of a scene are there."""
    last = len(scene.pictures) - 1
    for number in {0, last // 3, last // 2, last}:
        try:
            if inside(root, scene.pictures[number].name).is_file():
                return True
        except (ValueError, OSError):
            return True  # The name is bad, which is said when the scene is loaded.
    return False


def _first_missing(scenes: list[Scene], here: list[Scene]) -> str:
    return next(scene for scene in scenes if scene not in here).pictures[0].name


def _scenes(
    folder: Path, root: Path, tables: Path, scenes: list[Scene], before: int
) -> list[Found]:
    poses = Poses(tables, {picture.pose for scene in scenes for picture in scene.pictures})
    can = CanBus(root / "can_bus", {scene.name for scene in scenes})
    kind: SteeringKind = "steering_wheel" if can.is_there else "curvature"
    counts = Counter(scene.name for scene in scenes)
    return [
        Found(
            path=folder,
            load=partial(_load, root, scene, kind, poses, can),
            part=scene.name
            if _PLAIN.fullmatch(scene.name) and counts[scene.name] == 1
            else f"scene_{number}",
        )
        for number, scene in enumerate(scenes, before + 1)
    ]


def _root(folder: Path, scenes: list[Scene]) -> Path:
    """Return the folder of the data set: the one above if the tables themselves were given."""
    if scenes and _VERSION.fullmatch(folder.resolve().name):
        first = scenes[0].pictures[0].name.split("/")[0]
        if first and not (folder / first).exists() and (folder.parent / first).is_dir():
            return folder.parent
    return folder


def _load(
    root: Path,
    scene: Scene,
    kind: SteeringKind,
    poses: Poses,
    can: CanBus,
    path: Path,
    drive_id: str,
    reading: Reading,
    actions: bool,
) -> Drive:
    """Load a scene. Raises DriveSimError if fewer than 2 of its pictures are there."""
    where = f"{one_line(root)}: scene {one_line(scene.name)}"

    def bad_name(index: int, error: object) -> DriveSimError:
        return DriveSimError(f"{where}: {one_line(error)}; download the tables again")

    names = [picture.name for picture in scene.pictures]
    kept, pictures, lines = find_pictures(root, names, bad_name)
    if len(kept) < 2:
        raise DriveSimError(
            f"{where}: {len(kept)} of {len(names)} pictures of {CAMERA} are there (the first is "
            f"{one_line(names[0])}); download them, or leave the scene out"
        )
    stamps = np.array([scene.pictures[index].seconds for index in kept])
    times = check_picture_times(where, stamps)
    log = None
    if actions:
        if kind == "steering_wheel" and reading.steering_kind == "curvature":
            kind = "curvature"
        reading.check_kind(f"{where}: the steering", kind)
        start = float(stamps[0]) - reading.time_offset
        log = scene_log(scene, kind, poses, can, start, where)
    return Drive(
        id=drive_id,
        source="nuscenes",
        timestamps=times,
        reader=pictures,
        log=log,
        assumptions=(*lines, *unused_rate(reading), *about_sizes(pictures)),
    )
