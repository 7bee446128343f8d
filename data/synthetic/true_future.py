"""Replays any actions from any state to get their true future, and loads saved drives."""

from pathlib import Path

import numpy as np

from driving_sim.data.arrays import Floats32, Pixels
from driving_sim.data.synthetic.drives import DRIVE_FORMAT, SyntheticDrive
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.engine.config import from_dict, load_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown


def replay(
    world: SyntheticWorld, state: VehicleState, actions: Floats32, *, steps: int = 1
) -> Pixels:
    """Return the frames [N, H, W, 3] after each of the actions [N, 2], starting from `state`.

    Each action is applied for `steps` time steps. A perfect model would predict these frames.
    """
    frames = np.empty((len(actions), world.config.height, world.config.width, 3), np.uint8)
    for frame, action in zip(frames, actions, strict=True):
        for _ in range(steps):
            state = world.step(state, action)
        frame[:] = world.render(state)
    return frames


def load_synthetic_drive(path: Path) -> SyntheticDrive:
    """Read a drive that `SyntheticDrive.save` wrote. Raises DriveSimError for any other file."""
    saved = load_json(path)
    try:
        if saved["format"] != DRIVE_FORMAT:
            raise ValueError(f"its format is {shown(saved['format'])}")
        world = SyntheticWorld(saved["world_seed"], from_dict(SyntheticConfig, saved["config"]))
        states = tuple(VehicleState(*map(float, state)) for state in saved["states"])
        actions = np.array(saved["actions"], np.float32).reshape(len(states), 2)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise DriveSimError(
            f"{path}: not a drive made by this version of `drivesim synth` ({one_line(error)}); "
            "make the drive again"
        ) from error
    return SyntheticDrive(world, states, actions)


def synthetic_beside(video: Path) -> SyntheticDrive | None:
    """Return the simulated drive that a video shows, from the JSON file beside it.

    Returns None if `drivesim synth` did not make the video. Raises DriveSimError if its JSON file
    is damaged.
    """
    beside = video.with_suffix(".json")
    if not beside.is_file() or load_json(beside).get("format") != DRIVE_FORMAT:
        return None
    return load_synthetic_drive(beside)
