"""How recordings are read: what their columns and clocks mean where their files do not say it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.engine.errors import DriveSimError

SPEED_UNITS = {"mps": 1.0, "kmh": 1 / 3.6, "mph": 0.44704}
"""Factor from each unit of `Reading.speed_unit` to m/s."""
STEERING_UNITS = {"rad": 1.0, "deg": math.pi / 180}
"""Factor from each unit of `Reading.steering_unit` to rad."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The user's settings for reading recordings.

    Raises DriveSimError if a setting is not allowed.
    """

    steering_kind: SteeringKind | None = None
    """What a steering column measures if its name does not say it. Columns whose names say it must
    be of this kind too."""
    time_offset: float = 0.0
    """Seconds that are added to the times of every action log."""
    speed: str | None = None
    """Name of the column with the speed, if drivesim does not know the name."""
    speed_unit: str | None = None
    """Unit of the column `speed`: mps (by default), kmh or mph."""
    steering: str | None = None
    """Name of the column with the steering, if drivesim does not know the name."""
    steering_unit: str | None = None
    """Unit of the column `steering`, if it is an angle: rad (by default) or deg."""
    stream: int | None = None
    """Number of the video stream to read in files with several streams, as ffprobe counts them.
    None chooses the best."""
    video_fps: float | None = None
    """Frame rate of videos that do not store one, such as raw H.264 and HEVC, and of pictures that
    only have numbers."""
    wheelbase: float | Mapping[str, float] | None = None
    """Distance between the axles in metres: for all drives, or for the drives in each of several
    files and folders. The folder "" stands for all others. None takes that of a passenger car."""

    def __post_init__(self) -> None:
        _require_known("steering_kind", self.steering_kind, get_args(SteeringKind))
        _require_known("speed_unit", self.speed_unit, tuple(SPEED_UNITS))
        _require_known("steering_unit", self.steering_unit, tuple(STEERING_UNITS))
        for name, column in (("speed", self.speed), ("steering", self.steering)):
            if column is None and getattr(self, f"{name}_unit") is not None:
                raise DriveSimError(f"`{name}_unit` needs the name of the column, `{name}`")
        wheelbases = [("wheelbase", value) for value in self.wheelbases.values()]
        for name, value in (("video_fps", self.video_fps), *wheelbases):
            if value is not None and not 0 < value < math.inf:
                raise DriveSimError(f"`{name}` {value:g}: must be a finite number above 0")
        if not math.isfinite(self.time_offset):
            raise DriveSimError(f"`time_offset` {self.time_offset:g}: must be finite")

    @property
    def wheelbases(self) -> Mapping[str, float]:
        """The wheelbase of each file or folder; "" stands for all others."""
        if isinstance(self.wheelbase, Mapping):
            return self.wheelbase
        return {} if self.wheelbase is None else {"": self.wheelbase}

    def wheelbase_of(self, path: Path) -> float | None:
        """Return the wheelbase of the drive at `path`. The innermost of its folders decides."""
        path = _absolute(path)
        inside = [name for name in self.wheelbases if name and path.is_relative_to(_absolute(name))]
        innermost = max(inside, key=lambda name: len(_absolute(name).parts), default="")
        return self.wheelbases.get(innermost)

    def check_kind(self, steering: str, kind: SteeringKind) -> None:
        """Raise DriveSimError if `steering_kind` is set and differs from the `kind` of a log.

        `steering` says in the message which file or column is meant.
        """
        if self.steering_kind not in (None, kind):
            raise DriveSimError(
                f"{steering} is {kind}, but {self.steering_kind} is needed, as `steering_kind` or "
                "the model says; give drives of that kind, or correct `steering_kind`"
            )


def _absolute(path: Path | str) -> Path:
    """Return an absolute path without "..". Links are not followed, so a link is in its folder."""
    return Path(os.path.normpath(Path(path).absolute()))


def parse_wheelbases(texts: Sequence[str]) -> Mapping[str, float]:
    """Read wheelbases, each written as `METRES` or as `FOLDER=METRES`."""
    wheelbases: dict[str, float] = {}
    for text in texts:
        folder, equals, metres = text.rpartition("=")
        folder = os.path.normpath(folder) if folder else ""
        try:
            value = float(metres)
            if equals and not folder:
                raise ValueError
        except ValueError:
            raise DriveSimError(
                f"`wheelbase` {text}: write metres, or a folder and metres, such as lake=2.9"
            ) from None
        if folder in wheelbases:
            raise DriveSimError(
                f"`wheelbase` {text}: there is another one for {folder or 'all drives'}"
            )
        wheelbases[folder] = value
    return wheelbases


def _require_known(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise DriveSimError(f"`{name}` {value}: unknown; choose {', '.join(known)}")


AS_NAMED = Reading()
"""Read recordings as their files name and date their contents."""
