"""Synthetic drives: driven, filmed, and written as video, CSV and the world to replay them in."""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.action_file import write_action_file
from driving_sim.data.synthetic.driver import Driver
from driving_sim.data.synthetic.vehicle import VehicleState
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.data.video_writer import VideoWriter
from driving_sim.engine.config import from_dict, load_json, save_json, to_dict
from driving_sim.engine.errors import DriveSimError

_FORMAT = "drivesim synthetic drive 1"
_PLAN = "synthetic.json"


@dataclass(frozen=True, slots=True)
class SyntheticDrive:
    """A drive of T frames through a world; the frames are rendered when asked for."""

    world: SyntheticWorld
    states: tuple[VehicleState, ...]
    """Where each frame is seen from."""
    actions: NDArray[np.float32]
    """[T, 2] speed in m/s, road-wheel angle in rad: actions[t] leads from frame t to t + 1."""

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """[T] seconds from the first frame."""
        return np.arange(len(self.states)) / self.world.config.fps

    def stream(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames one by one, uint8 RGB [height, width, 3]."""
        return (self.world.render(state) for state in self.states)

    @property
    def frames(self) -> NDArray[np.uint8]:
        """All frames, uint8 RGB [T, height, width, 3], rendered anew at each call."""
        return np.stack(list(self.stream()))

    def save(self, path: Path) -> None:
        """Write all that it takes to replay the drive, or another one from any of its frames."""
        save_json(
            path,
            {
                "format": _FORMAT,
                "world_seed": self.world.seed,
                "config": to_dict(self.world.config),
                "states": [astuple(state) for state in self.states],
                "actions": self.actions.tolist(),
            },
        )


def load_synthetic_drive(path: Path) -> SyntheticDrive:
    """Read a drive that `SyntheticDrive.save` wrote; raises DriveSimError where it is not one."""
    saved = load_json(path)
    try:
        if saved["format"] != _FORMAT:
            raise ValueError(f"format is {saved['format']!r}")
        world = SyntheticWorld(saved["world_seed"], from_dict(SyntheticConfig, saved["config"]))
        states = tuple(VehicleState(*map(float, state)) for state in saved["states"])
        actions = np.array(saved["actions"], np.float32).reshape(len(states), 2)
    except (KeyError, TypeError, ValueError) as error:
        raise DriveSimError(
            f"{path}: is not a drive of `drivesim synth` of this version ({error}); make it anew"
        ) from error
    return SyntheticDrive(world, states, actions)


def frame_count(seconds: float, config: SyntheticConfig) -> int:
    """Return the number of frames of a drive."""
    return round(seconds * config.fps)


def drive(world: SyntheticWorld, seconds: float, driver_seed: int) -> SyntheticDrive:
    """Let a driver loose in a world, starting on a part of the road that its seed chooses."""
    rng = np.random.default_rng([driver_seed, 1])
    state = world.reset(station_m=rng.uniform(0.0, 3000.0))
    driver = Driver(world.road, driver_seed)
    states: list[VehicleState] = []
    actions = np.empty((frame_count(seconds, world.config), 2), np.float32)
    for action in actions:
        states.append(state)
        action[:] = driver.act(state, 1 / world.config.fps)
        # The car obeys the recorded (rounded) action, so that a replay is exact.
        state = world.step(state, action)
    return SyntheticDrive(world, tuple(states), actions)


def write_synthetic_drives(
    out: Path,
    *,
    drives: int,
    seconds: float,
    seed: int = 0,
    config: SyntheticConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write drives as `drive_000.mp4`, `.csv` and `.json` each, and return the videos' paths.

    Each drive has a world of its own, a function of (seed, its number). `progress` is called with
    the number of frames that came to be there, `drives * frame_count(seconds, config)` in all. A
    folder with an unfinished set of the same plan is completed; one with a finished or another set,
    or with other files, raises DriveSimError.
    """
    config = config or SyntheticConfig()
    if drives < 1 or frame_count(seconds, config) < 2:
        raise DriveSimError(
            f"{drives} drives of {seconds:g} s at {config.fps:g} frames/s: "
            "there must be at least one drive, of at least 2 frames"
        )
    names = [f"drive_{number:03d}" for number in range(drives)]
    _claim(out, names, {"seconds": seconds, "seed": seed, "config": to_dict(config)})
    for number, name in enumerate(names):
        if (out / f"{name}.json").exists():
            if progress:
                progress(frame_count(seconds, config))
            continue
        world_seed, driver_seed = np.random.SeedSequence([seed, number]).generate_state(2)
        world = SyntheticWorld(int(world_seed), config)
        _write(out / name, drive(world, seconds, int(driver_seed)), progress)
    return [out / f"{name}.mp4" for name in names]


def _claim(out: Path, names: list[str], plan: dict[str, Any]) -> None:
    """Make the folder ours, or find that it is, for this plan."""
    plan = {"format": _FORMAT, "drives": len(names)} | plan
    if not out.exists() or not any(out.iterdir()):
        save_json(out / _PLAN, plan)
        return
    if not (out / _PLAN).exists():
        raise DriveSimError(f"{out}: holds other files; choose a new folder for synthetic drives")
    if load_json(out / _PLAN) != plan:
        raise DriveSimError(
            f"{out}: holds synthetic drives of another plan (see {_PLAN}); "
            "choose a new folder or delete this one"
        )
    if all((out / f"{name}.json").exists() for name in names):
        raise DriveSimError(
            f"{out}: already holds these {len(names)} drives; choose a new folder or delete it"
        )


def _write(stem: Path, driven: SyntheticDrive, progress: Callable[[int], None] | None) -> None:
    config = driven.world.config
    with VideoWriter(
        stem.with_suffix(".mp4"), fps=config.fps, height=config.height, width=config.width
    ) as video:
        for frame in driven.stream():
            video.write(frame)
            if progress:
                progress(1)
    end = len(driven.states) / config.fps
    write_action_file(
        stem.with_suffix(".csv"), driven.timestamps, driven.actions, "road_wheel", hold_until=end
    )
    # Last: a drive is there when its JSON is.
    driven.save(stem.with_suffix(".json"))
