"""Writes synthetic drives: a video, a CSV of actions and a JSON file for replays."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_file import write_action_file
from driving_sim.data.synthetic.drives import DRIVE_FORMAT, SyntheticDrive, drive, frame_count
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
    """Write drives as `drive_000.mp4`, `.csv` and `.json`, and so on; return the videos' paths.

    Each drive has a world of its own, which depends only on the seed and the drive's number. If
    `worlds` is given, there are only that many worlds, and drive n uses world n modulo `worlds`.
    `first` is the number of the first drive. To write held-out drives in the same worlds, choose a
    `first` above the numbers of the training drives. `workers` is the number of processes that
    write drives in parallel. `progress` is called again and again, each time with the number of
    frames done since the last call. In total these are `drives * frame_count(seconds, config)`
    frames.

    If an earlier call with the same settings was interrupted, only the missing drives are written.
    Raises DriveSimError if `out` already contains all drives, drives with other settings, or other
    files.
    """
    config = config or SyntheticConfig()
    frames = frame_count(seconds, config)
    if drives < 1 or frames < 2:
        raise DriveSimError(
            f"{drives} drives of {seconds:g} s at {config.fps:g} frames/s: "
            "make at least one drive, and at least 2 frames per drive"
        )
    worlds = first + drives if worlds is None else worlds
    if worlds < 1:
        raise DriveSimError(f"worlds={worlds}: must be at least 1")
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
                f"{out}: already holds these {drives} drives; choose another `out`, or delete it"
            )
        if len(missing) < drives:
            progress((drives - len(missing)) * frames)
        jobs = [(stems[n], seeds(seed, n % worlds)[0], seeds(seed, n)[1]) for n in missing]
        make = partial(_make, config, seconds)
        if workers > 1:
            # Spawn the processes: a fork would copy locks that the caller's threads hold.
            spawn = get_context("spawn")
            with ProcessPoolExecutor(min(workers, len(missing)), mp_context=spawn) as pool:
                for _ in pool.map(make, *zip(*jobs, strict=True)):
                    progress(frames)
        else:
            for job in jobs:
                make(*job, progress)
    except OSError as error:
        raise DriveSimError(
            f"{out}: cannot write ({error.strerror}); free some space, or choose another `out`"
        ) from error
    return [stem.with_suffix(".mp4") for stem in stems.values()]


def seeds(seed: int, number: int) -> tuple[int, int]:
    """Return the seeds of world `number` and driver `number` in a set made with `seed`."""
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
    write_drive(drive(SyntheticWorld(world_seed, config), seconds, driver_seed), stem, advance)


def write_drive(
    driven: SyntheticDrive, stem: Path, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write a drive as a video, a CSV and a JSON file: the path `stem` with three suffixes.

    `advance` is called with 1 after each frame. Raises DriveSimError if a file cannot be written.
    """
    config = driven.world.config
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
    # Write the JSON file last, because its existence marks a drive as complete.
    driven.save(stem.with_suffix(".json"))
