"""Steer a world model left and right, and measure which way its pictures turn."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats, Pixels
from driving_sim.data.drive import Drive, sample
from driving_sim.data.inspect.motion import yaw_motion
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.progress import progress
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.rollout import context_from_drive
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

MOVING_MPS = 2.0
"""Minimum speed at the start of a future that is steered left or right.

A standing car does not turn, whatever its steering.
"""


def obeyed(left_motion: float, right_motion: float) -> bool:
    """Return whether the car turned left when steered left, and right when steered right.

    Both arguments are image motions, positive if the car turns left.
    """
    return left_motion > 0 > right_motion


def measure_control(
    world: WorldModel,
    drives: Sequence[Drive],
    *,
    starts: int = 10,
    seconds: float = 2.0,
    sampling: Sampling,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Steer left and right from several starts, and count how often the car obeys.

    The starts are spread over the drives, at times when the car is known to drive at 2 m/s or
    more. A drive without such a time is used anyway. From each start the model generates two
    futures, one to the left and one to the right. Both have the same context and the same random
    draws, and keep the last speed of the context. They are steered as hard as the 99th percentile
    of |steering| in the training data. Their motion is the mean of `yaw_motion` over all frames.

    `sheet` is a picture file (.png or .jpg) to write, with a row of frames for each start. Returns
    the counts, the settings and all trials as JSON.
    """
    if sheet is not None and sheet.suffix.lower() not in (".png", ".jpg"):
        raise DriveSimError(
            f"`sheet` {sheet}: not the name of a picture; choose a name that ends in .png or .jpg"
        )
    frames = round(seconds * world.fps) if math.isfinite(seconds) else 0
    if frames < 1:
        raise DriveSimError(
            f"`seconds` {seconds:g}: not long enough for one frame at the model's "
            f"{world.fps:.3g} frames/s; choose {1 / world.fps:.2g} or more"
        )
    if world.statistics.steering_p99 == 0:
        raise DriveSimError(
            "the model learned no steering, because its training drives have none; train on drives "
            "with steering"
        )
    pictured = (frames - 1) // 2, frames - 1  # the two frames of each future that the sheet shows
    half, end = (f"after {(n + 1) / world.fps:.1f} s" for n in pictured)
    headings = [f"left {end}", f"left {half}", "start", f"right {half}", f"right {end}"]
    trials: dict[str, list[dict[str, float]]] = {drive.id: [] for drive in drives}
    rows: list[tuple[str, list[Pixels]]] = []
    with progress(starts, "left and right", "starts") as bar:
        for number in bar.counted(range(starts)):
            drive = drives[number % len(drives)]
            share = (number // len(drives) + 0.5) / -(-starts // len(drives))
            times = _times_to_start(world, drive)
            start_s = float(times[int(share * len(times))])
            start, *futures = _steer_both_ways(world, drive, start_s, frames, sampling)
            # The motions are in picture widths per frame, and positive if the car turns left.
            left, right = (
                float(yaw_motion(np.stack([start, *future])).mean()) for future in futures
            )
            trial = {"start_s": start_s, "left_motion": left, "right_motion": right}
            trials[drive.id].append(trial)
            to_left, to_right = ([future[n] for n in pictured] for future in futures)
            rows.append((f"{drive.id} at {start_s:.1f} s", [*to_left[::-1], start, *to_right]))
    if sheet is not None:
        with atomic_file(sheet) as temporary:
            Image.fromarray(contact_sheet(rows, headings)).save(temporary)
    motions = [
        (trial["left_motion"], trial["right_motion"])
        for of_drive in trials.values()
        for trial in of_drive
    ]
    return {
        "starts": starts,
        "seconds": seconds,
        "steering": world.statistics.steering_p99,
        "obeyed": sum(obeyed(*motion) for motion in motions),
        "mean_left_minus_right": float(np.mean([left - right for left, right in motions])),
        "sampling": asdict(sampling),
        "trials": trials,
        "fingerprint": world.fingerprint,
        "precision": world.precisions,
    }


def _times_to_start(world: WorldModel, drive: Drive) -> Floats:
    """Return the times, after the first context, at which the car drives at `MOVING_MPS` or more.

    If the car is never that fast, return all times after the first context.
    """
    sampled = sample(drive, fps=world.fps)
    first = min(world.context_frames, len(sampled.timestamps) - 1)
    times = sampled.timestamps[first:]
    # The speed at the time of a frame is in the action that led to the frame.
    speeds = np.append(0.0, sampled.actions[:-1, SPEED])[first:]
    moves = speeds >= MOVING_MPS
    return times[moves] if moves.any() else times


def _steer_both_ways(
    world: WorldModel, drive: Drive, start_s: float, frames: int, sampling: Sampling
) -> tuple[Pixels, Pixels, Pixels]:
    """Return the last context frame, and the frames of the two futures: left, right."""
    context = context_from_drive(world, drive, start_s)
    situation = context.situation(world)
    actions = np.tile(situation.last_action, (2, frames, 1))
    furthest = world.statistics.steering_p99
    actions[0, :, STEERING], actions[1, :, STEERING] = furthest, -furthest
    valid = np.tile(situation.last_valid | [False, True], (2, frames, 1))
    steps = world.generate(context.prefix(world), actions, valid, sampling=sampling)
    tokens = torch.stack([step.tokens for step in steps], dim=1).cpu()
    left, right = (world.tokenizer.decode(branch).numpy() for branch in tokens)
    return context.frames[-1], left, right
