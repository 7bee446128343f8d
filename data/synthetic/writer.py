"""Writes synthetic drives: video, CSV and the world to replay them in."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_file import write_action_file
from driving_sim.data.synthetic.drives import DRIVE_FORMAT, drive, frame_count
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.data.video.writer import video_writer
from driving_sim.engine.config import to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.run_folder import claim_folder

_PLAN = "synthetic.json"


def write_synthetic_drives(
    out: Path,
    *,
    drives: int,
    seconds: float,
    seed: int = 0,
    worlds: int | None = None,
    first: int = 0,
    config: SyntheticConfig | None = None,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write drives as `drive_000.mp4`, `.csv` and `.json` each, and return the videos' paths.

    Each drive has a world of its own, a function of (seed, its number); with `worlds`, the drives
    take turns in that many. Numbers count from `first` on: drives to hold out are later ones in the
    same worlds. `progress` is called with the number of frames that came to be there,
    `drives * frame_count(seconds, config)` in all. With `workers` > 1, as many processes make a
    drive each. A folder with an unfinished set of the same plan is completed; one with a finished
    or another set, or with other files, raises DriveSimError.
    """
    config = config or SyntheticConfig()
    frames = frame_count(seconds, config)
    if drives < 1 or frames < 2:
        raise DriveSimError(
            f"{drives} drives of {seconds:g} s at {config.fps:g} frames/s: "
            "there must be at least one drive, of at least 2 frames"
        )
    worlds = first + drives if worlds is None else worlds
    if worlds < 1:
        raise DriveSimError(f"{worlds} worlds to drive in: there must be at least one")
    plan = {
        "format": DRIVE_FORMAT,
        "drives": drives,
        "seconds": seconds,
        "seed": seed,
        "worlds": worlds,
        "first": first,
        "config": to_dict(config),
    }
    stems = {number: out / f"drive_{number:03d}" for number in range(first, first + drives)}
    try:
        claim_folder(out, _PLAN, plan, "synthetic drives")
        missing = [n for n, stem in stems.items() if not stem.with_suffix(".json").exists()]
        if not missing:
            raise DriveSimError(
                f"{out}: already holds these {drives} drives; choose a new folder or delete it"
            )
        if len(missing) < drives:
            progress((drives - len(missing)) * frames)
        jobs = [(stems[n], seeds(seed, n % worlds)[0], seeds(seed, n)[1]) for n in missing]
        make = partial(_make, config, seconds)
        if workers > 1:
            # Spawned: a fork would copy the locks of whatever threads the caller runs.
            spawn = get_context("spawn")
            with ProcessPoolExecutor(min(workers, len(missing)), mp_context=spawn) as pool:
                for _ in pool.map(make, *zip(*jobs, strict=True)):
                    progress(frames)
        else:
            for job in jobs:
                make(*job, progress)
    except OSError as error:
        raise DriveSimError(
            f"{out}: cannot be written ({error.strerror}); free space or choose another place"
        ) from error
    return [stem.with_suffix(".mp4") for stem in stems.values()]


def seeds(seed: int, number: int) -> tuple[int, int]:
    """Return the seeds of world and of driver `number` of the drives made with `seed`."""
    world, driver = np.random.SeedSequence((seed, number)).generate_state(2).tolist()
    return world, driver


def _make(
    config: SyntheticConfig,
    seconds: float,
    stem: Path,
    world_seed: int,
    driver_seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    driven = drive(SyntheticWorld(world_seed, config), seconds, driver_seed)
    fps, height, width = config.fps, config.height, config.width
    with video_writer(stem.with_suffix(".mp4"), fps=fps, height=height, width=width) as write:
        for frame in driven.stream():
            write(frame)
            advance(1)
    write_action_file(
        stem.with_suffix(".csv"),
        driven.timestamps,
        driven.actions,
        "road_wheel",
        hold_until=len(driven.states) / fps,
    )
    # Last: a drive is there when its JSON is.
    driven.save(stem.with_suffix(".json"))
