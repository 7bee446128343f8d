"""Whether a world model turns the way it is steered, as its pictures' motion shows."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from driving_sim.data.actions.action_file import SPEED, STEERING
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
"""Counterfactual futures start at this speed or more: a car that stands does not show steering."""


def obeyed(left_motion: float, right_motion: float) -> bool:
    """Whether left turned left and right turned right: image motion is positive to the left."""
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
    """Steer left and right at the training data's 99th percentile from starts spread over drives.

    Each pair of futures has one context and the same draws, and holds the context's speed: starts
    are where the drive is known to be faster than 2 m/s, if it ever is. The motion is what
    `drivesim inspect` measures, over the whole future. `sheet` is a picture
    file to draw the futures in, a row for each start.
    """
    if sheet is not None and sheet.suffix.lower() not in (".png", ".jpg"):
        raise DriveSimError(f"`sheet` {sheet}: a picture is a .png or .jpg file; name it so")
    frames = round(seconds * world.fps) if math.isfinite(seconds) else 0
    if frames < 1:
        raise DriveSimError(
            f"`seconds` {seconds:g}: less than a frame at the model's {world.fps:.3g} frames/s"
        )
    if world.statistics.steering_p99 == 0:
        raise DriveSimError(
            "the model's training drives have no steering, so there is nothing to steer with: "
            "train on drives that do"
        )
    shown = (frames - 1) // 2, frames - 1  # of each future, in the picture: half-way and the end
    half, end = (f"after {(n + 1) / world.fps:.1f} s" for n in shown)
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
            # Mean image motion in picture widths a frame, positive where the car turns left.
            left, right = (
                float(yaw_motion(np.stack([start, *future])).mean()) for future in futures
            )
            trial = {"start_s": start_s, "left_motion": left, "right_motion": right}
            trials[drive.id].append(trial)
            to_left, to_right = ([future[n] for n in shown] for future in futures)
            rows.append((f"{drive.id} at {start_s:.1f} s", [*to_left[::-1], start, *to_right]))
    if sheet is not None:
        with atomic_file(sheet) as temporary:
            Image.fromarray(contact_sheet(rows, headings)).save(temporary)
    every = (trial for each in trials.values() for trial in each)
    motions = [(trial["left_motion"], trial["right_motion"]) for trial in every]
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
    """The times after the first context at which the car moves: one that stands cannot turn."""
    sampled = sample(drive, fps=world.fps)
    first = min(world.context_frames, len(sampled.timestamps) - 1)
    times = sampled.timestamps[first:]
    speeds = np.append(0.0, sampled.actions[:-1, SPEED])[first:]  # that led to each time
    moves = speeds >= MOVING_MPS
    return times[moves] if moves.any() else times


def _steer_both_ways(
    world: WorldModel, drive: Drive, start_s: float, frames: int, sampling: Sampling
) -> tuple[Pixels, Pixels, Pixels]:
    """Return the last frame before the futures, and those to the left and to the right."""
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
