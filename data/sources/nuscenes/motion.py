"""Find out how a car of nuScenes moved: from its CAN bus, or from its poses.

The CAN bus is an extension of nuScenes, with files for each scene in `can_bus/`. `pose` (50 Hz) has
the velocity and the angular rates of the car (x forward, y left, z up). `steeranglefeedback`
(100 Hz) has the angle of the steering wheel in rad, right positive.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from driving_sim.data.actions.action_log import STEERING_LIMIT, ActionLog, Channel, SteeringKind
from driving_sim.data.arrays import Floats
from driving_sim.data.sources.nuscenes.tables import (
    Scene,
    heading,
    number_of,
    numbers_of,
    read_rows,
    text_of,
)
from driving_sim.data.sources.path_curvature import check_speed, path_log
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line

_FARTHEST_M = 1e7
_MOST_SAMPLES = 1_000_000
_LATEST = 1e17  # µs


class Motion(NamedTuple):
    """The speed and the yaw rate of a car at some times."""

    times: Floats
    """[M] Seconds since 1970, strictly increasing."""
    speed: Floats
    """[M] In m/s, positive forwards."""
    yaw_rate: Floats
    """[M] In rad/s, positive to the left."""
    notices: tuple[str, ...] = ()


class Poses:
    """The poses of the car in the pictures of some scenes. They are read once, when needed."""

    def __init__(self, tables: Path, tokens: Collection[str]) -> None:
        self._path, self._tokens = tables / "ego_pose.json", frozenset(tokens)
        self._lock = Lock()
        self._poses: dict[str, tuple[float, float, float]] | DriveSimError | None = None

    def motion(self, scene: Scene) -> Motion:
        """Return how the car moves from each picture of a scene to the next, halfway in time.

        Raises DriveSimError if the table is bad, or if it lacks a pose.
        """
        with self._lock:
            if self._poses is None:
                try:
                    self._poses = self._read()
                except DriveSimError as error:  # Do not read a damaged table for every scene.
                    self._poses = error
        if isinstance(self._poses, DriveSimError):
            raise self._poses
        poses = self._poses
        missing = sum(picture.pose not in poses for picture in scene.pictures)
        if missing:
            raise DriveSimError(
                f"{one_line(self._path)}: lacks the poses of {missing} pictures; download it again"
            )
        times = np.array([picture.seconds for picture in scene.pictures])
        x, y, angle = np.array([poses[picture.pose] for picture in scene.pictures]).T
        chosen = np.flatnonzero(np.append(True, np.diff(times) > 0))
        if len(chosen) < 3:
            raise DriveSimError(f"{one_line(self._path)}: a scene has fewer than 3 times")
        times, x, y, angle = times[chosen], x[chosen], y[chosen], np.unwrap(angle[chosen])
        seconds = np.diff(times)
        middle = (angle[1:] + angle[:-1]) / 2
        ahead = np.diff(x) * np.cos(middle) + np.diff(y) * np.sin(middle)
        return Motion(times[:-1] + seconds / 2, ahead / seconds, np.diff(angle) / seconds)

    def _read(self) -> dict[str, tuple[float, float, float]]:
        poses = {}
        for row in read_rows(self._path):
            token = text_of(row, "token", self._path)
            if token in self._tokens:
                x, y, _ = numbers_of(row, "translation", self._path, 3, _FARTHEST_M)
                rotation = numbers_of(row, "rotation", self._path, 4, 2.0)
                poses[token] = (x, y, heading(rotation))
        return poses


class CanBus:
    """The CAN bus of the scenes, if it was downloaded."""

    def __init__(self, folder: Path, scenes: Collection[str]) -> None:
        self._folder = folder
        self._scenes = {name for name in scenes if name.isascii() and _is_plain(name)}

    def _path(self, scene: str, message: str) -> Path | None:
        path = self._folder / f"{scene}_{message}.json"
        return path if scene in self._scenes and path.is_file() else None

    def steers(self, scene: str) -> bool:
        """Return whether the steering of a scene is there."""
        return self._path(scene, "steeranglefeedback") is not None

    @property
    def is_there(self) -> bool:
        """Whether the steering of any scene is there."""
        return any(map(self.steers, self._scenes))

    def motion(self, scene: str) -> Motion | None:
        """Return how the car moves, or None if this is not there."""
        path = self._path(scene, "pose")
        if path is None:
            return None
        values = []
        for row in _messages(path):
            velocity = numbers_of(row, "vel", path, 3, 1e6)
            rates = numbers_of(row, "rotation_rate", path, 3, 1e6)
            values.append((number_of(row, "utime", path, _LATEST) / 1e6, velocity[0], rates[2]))
        (times, speed, yaw_rate), notices = _in_order(values, path)
        return Motion(times, speed, yaw_rate, notices)

    def steering(self, scene: str) -> tuple[Floats, Floats, tuple[str, ...]] | None:
        """Return the times and the angles of the steering wheel, left positive, and notices, or
        None if they are not there."""
        path = self._path(scene, "steeranglefeedback")
        if path is None:
            return None
        most = STEERING_LIMIT["steering_wheel"]
        values = [
            (
                number_of(row, "utime", path, _LATEST) / 1e6,
                -number_of(row, "value", path, most),
            )
            for row in _messages(path)
        ]
        (times, angles), notices = _in_order(values, path)
        return times, angles, notices


def _is_plain(name: str) -> bool:
    return all(character.isalnum() or character in "-_" for character in name)


def _messages(path: Path) -> list[dict[str, object]]:
    rows = []
    for row in read_rows(path):
        rows.append(row)
        if len(rows) > _MOST_SAMPLES:
            raise DriveSimError(
                f"{one_line(path)}: has more than {_MOST_SAMPLES:,} messages; leave the scene out"
            )
    return rows


def _in_order(
    values: Sequence[tuple[float, ...]], path: Path
) -> tuple[tuple[Floats, ...], tuple[str, ...]]:
    """Return columns of values, the first of which are increasing times, and what was left out."""
    if not values:
        raise DriveSimError(f"{one_line(path)}: contains no messages; remove this file")
    columns = np.array(values).T
    earlier = np.maximum.accumulate(columns[0])[:-1]
    later = np.append(True, columns[0][1:] > earlier)
    if later.sum() < 2:
        raise DriveSimError(f"{one_line(path)}: has a single time; remove this file")
    notices: tuple[str, ...] = ()
    if early := int((~later).sum()):
        notices = (
            f"{early} messages of {path.stem.rpartition('_')[2]} are not later than those before "
            "and are left out",
        )
    return tuple(columns[:, later]), notices


def scene_log(
    scene: Scene, kind: SteeringKind, poses: Poses, can: CanBus, start: float, origin: str
) -> ActionLog:
    """Return the actions of a scene in seconds from `start`, with this kind of steering.

    The speed comes from the CAN bus if that is there, and from the poses otherwise. So does the
    `curvature`. An angle of the `steering_wheel` is only on the CAN bus. Raises DriveSimError if a
    file is bad.
    """
    motion = can.motion(scene.name)
    where = "the CAN bus" if motion else "the poses of the car"
    motion = motion or poses.motion(scene)
    notices: tuple[str, ...] = (f"the speed comes from {where}", *motion.notices)
    if kind == "curvature":
        log = path_log(motion.times - start, motion.speed, motion.yaw_rate, origin)
        return replace(log, notices=(*notices, *log.notices))
    check_speed(motion.speed, origin)
    speed = Channel(times=motion.times - start, values=motion.speed.astype(np.float32))
    wheel = can.steering(scene.name)
    if wheel is None:
        notices += (
            "the CAN bus lacks the steering of this scene, so it is unknown (`steering_kind="
            "curvature` takes the curvature of the path in all scenes)",
        )
        return ActionLog(speed=speed, notices=notices, origin=origin)
    times, angles, more = wheel
    return ActionLog(
        speed=speed,
        steering=Channel(times=times - start, values=angles.astype(np.float32)),
        steering_kind="steering_wheel",
        notices=(*notices, *more),
        origin=origin,
    )
