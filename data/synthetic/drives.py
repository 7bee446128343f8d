"""Synthetic drives through a world, saved with everything needed to replay them."""

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from driving_sim.data.arrays import Floats, Floats32, Pixels
from driving_sim.data.synthetic.motion.driver import Driver
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.engine.config import save_json, to_dict
from driving_sim.engine.errors import DriveSimError

DRIVE_FORMAT = "drivesim synthetic drive 1"


@dataclass(frozen=True, slots=True)
class SyntheticDrive:
    """A drive of T frames through a world. Its frames are rendered only when they are read."""

    world: SyntheticWorld
    states: tuple[VehicleState, ...]
    """Car state at each frame, from which the frame is rendered."""
    actions: Floats32
    """Speed (m/s), road-wheel angle (rad) [T, 2]; actions[t] is applied from frame t to t + 1."""

    @property
    def timestamps(self) -> Floats:
        """Time of each frame [T], in seconds from the first frame."""
        return np.arange(len(self.states)) / self.world.config.fps

    def stream(self) -> Iterator[Pixels]:
        """Yield the frames one by one, uint8 RGB [height, width, 3]."""
        return (self.world.render(state) for state in self.states)

    @property
    def frames(self) -> Pixels:
        """All frames, uint8 RGB [T, height, width, 3]. Every access renders them again."""
        return np.stack(list(self.stream()))

    def between(self, begin: int, end: int) -> "SyntheticDrive":
        """Return the part of the drive from frame `begin` up to, but not including, frame `end`."""
        return SyntheticDrive(self.world, self.states[begin:end], self.actions[begin:end])

    def save(self, path: Path) -> None:
        """Write the drive as JSON, with everything needed to replay it from any frame."""
        save_json(
            path,
            {
                "format": DRIVE_FORMAT,
                "world_seed": self.world.seed,
                "config": to_dict(self.world.config),
                "states": [astuple(state) for state in self.states],
                "actions": self.actions.tolist(),
            },
        )


def frame_count(seconds: float, config: SyntheticConfig) -> int:
    """Return the number of frames of a drive. Raises DriveSimError if `seconds` is not finite."""
    if not math.isfinite(seconds):
        raise DriveSimError(f"`seconds` {seconds:g}: must be a finite number")
    return round(seconds * config.fps)


def drive(world: SyntheticWorld, seconds: float, driver_seed: int) -> SyntheticDrive:
    """Simulate a drive. `driver_seed` decides where the drive starts and how the driver behaves."""
    rng = np.random.default_rng([driver_seed, 1])
    state = world.reset(station_m=rng.uniform(0.0, world.config.stretch_m))
    driver = Driver(world.road, driver_seed, world.config)
    states: list[VehicleState] = []
    actions = np.empty((frame_count(seconds, world.config), 2), np.float32)
    for action in actions:
        states.append(state)
        action[:] = driver.act(state, 1 / world.config.fps)
        # Move the car by the recorded action (rounded to float32), so that a replay is exact.
        state = world.step(state, action)
    return SyntheticDrive(world, tuple(states), actions)
