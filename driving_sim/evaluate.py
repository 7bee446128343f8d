"""Measurements of trained models on drives that they have not seen: `drivesim evaluate`.

Axes: N frames of a drive, V variants of its actions.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from PIL import Image

from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.data.drive import Drive, SampledDrive, sample
from driving_sim.data.motion import yaw_motion
from driving_sim.data.token_store import DriveTokens, TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.progress import progress
from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.baselines import CopyLast
from driving_sim.world_model.bits import (
    FrameBits,
    FullWindows,
    bits_per_token,
    streamed_bits,
    streamed_bits_per_token,
)
from driving_sim.world_model.panels import Frame, contact_sheet
from driving_sim.world_model.rollout import context_from_drive
from driving_sim.world_model.sampler import Sampling
from driving_sim.world_model.world_model import WorldModel

_BATCH = 16
_RESAMPLES = 2000
_MOVING_MPS = 2.0


def evaluate_tokenizer(tokenizer: Tokenizer, drives: Sequence[SampledDrive]) -> dict[str, Any]:
    """Measure reconstructions (means over frames, on uint8 pixels) and the use of the codebook."""
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    per_drive: dict[str, dict[str, float]] = {}
    frames_seen = 0
    with progress(sum(len(each.indices) for each in drives), "evaluate", "frames") as bar:
        for each in drives:
            measured: list[tuple[torch.Tensor, torch.Tensor]] = []
            for batch in each.batches(tokenizer.frame_size, _BATCH):
                frames = torch.from_numpy(batch)
                tokens = tokenizer.encode(frames)
                rebuilt = tokenizer.decode(tokens)
                measured.append((psnr(rebuilt, frames), ssim(rebuilt, frames)))
                counts += torch.bincount(tokens.flatten(), minlength=len(counts))
                bar.advance(len(frames))
            per_drive[each.drive.id] = {
                "frames": len(each.indices),
                "psnr_db": float(torch.cat([p for p, _ in measured]).mean()),
                "ssim": float(torch.cat([s for _, s in measured]).mean()),
            }
            frames_seen += len(each.indices)
    means = {
        name: sum(drive[name] * drive["frames"] for drive in per_drive.values()) / frames_seen
        for name in ("psnr_db", "ssim")
    }
    return {
        "size": [tokenizer.height, tokenizer.width],
        "frames": frames_seen,
        **means,
        "codebook": codebook_use(counts)._asdict(),
        "drives": per_drive,
        "fingerprint": tokenizer.fingerprint,
    }


def evaluate_likelihood(
    world: WorldModel, heldout: TokenStore, training: TokenStore
) -> dict[str, Any]:
    """Bits per token on frames with a full window behind them, beside two baselines.

    The baselines are fitted on the drives of `training` that the model was trained on: its
    validation drives, which chose the model, play no part. `streamed_over_recomputed` is what
    frames 2W to 4W of the drives cost in a rollout's cache, which nothing recomputes, over what
    they cost in windows of their own: near 1 where long rollouts are as good as short ones, None
    where no drive is that long.
    """
    world.check_store(heldout)
    world.check_store(training)
    _check_apart(heldout, training)
    learned = [name for name in training.drive_ids if name not in world.validation_drives]
    if not learned:
        raise DriveSimError(
            f"{training.path} holds only drives that the model was validated on: name the token "
            "store that it was trained on with --training-tokens"
        )
    windows = FullWindows(heldout.drives, frames=world.context_frames)
    copy_last = CopyLast.fit(training.select(learned))
    with progress(len(windows), "bits per token", "frames") as bar:
        model = bits_per_token(world.transformer, windows, advance=bar.advance)
    copied = copy_last.bits_per_token(windows)
    unigram = copy_last.unigram.bits_per_token(windows)
    return {
        "frames": len(windows),
        "context_frames": world.context_frames,
        "bits_per_token": model.mean,
        "accuracy": float(model.accuracy.mean()),
        "copy_last_bits_per_token": copied.mean,
        "copy_last_accuracy": float(copied.accuracy.mean()),
        "unigram_bits_per_token": unigram.mean,
        "share_of_copy_last": model.mean / copied.mean,
        "streamed_over_recomputed": _streamed_share(world, heldout.drives, model),
        "fingerprint": world.fingerprint,
    }


def _streamed_share(
    world: WorldModel, drives: Sequence[DriveTokens], recomputed: FrameBits
) -> float | None:
    frames = world.context_frames
    with progress(len(drives), "streamed bits", "drives") as bar:
        streamed = streamed_bits_per_token(
            world.transformer, drives, first=2 * frames, stop=4 * frames, advance=bar.advance
        )
    if not len(streamed.bits):
        return None
    places = zip(recomputed.drive.tolist(), recomputed.frame.tolist(), strict=True)
    bits = dict(zip(places, recomputed.bits.tolist(), strict=True))
    same = zip(streamed.drive.tolist(), streamed.frame.tolist(), strict=True)
    return streamed.mean / float(np.mean([bits[place] for place in same]))


def _check_apart(heldout: TokenStore, training: TokenStore) -> None:
    """Refuse a drive that is in both; synthetic sets number theirs alike, so ids do not tell."""
    trained: dict[str, list[DriveTokens]] = {}
    for drive in training.drives:
        trained.setdefault(drive.id, []).append(drive)
    for drive in heldout.drives:
        if any(np.array_equal(drive.tokens, other.tokens) for other in trained.get(drive.id, [])):
            raise DriveSimError(
                f"{heldout.path}: drive {drive.id!r} is in the training tokens {training.path} "
                "too; measure on drives that were held out"
            )


def evaluate_action_information(
    world: WorldModel, heldout: TokenStore, *, shuffles: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Bits per frame that the true actions are worth over actions shuffled between windows.

    A shuffle permutes a drive's windows of `context_frames` frames, for speed, for steering and for
    both. The interval is the 95 % percentile block bootstrap over these windows (Künsch 1989,
    https://doi.org/10.1214/aos/1176347265).
    """
    world.check_store(heldout)
    rng = np.random.default_rng(seed)
    channels = {"speed": [SPEED], "steering": [STEERING], "both": [SPEED, STEERING]}
    gains: dict[str, list[NDArray[np.float64]]] = {name: [] for name in channels}
    runs = [(drive, *segment) for drive in heldout.drives for segment in drive.entry.segments]
    with progress(len(runs) * len(channels), "shuffle actions", "runs") as bar:
        for drive, begin, stop in runs:
            for name, chosen in channels.items():
                # An action that is not known stays so wherever it is moved to.
                actions = np.repeat(drive.actions[None, begin:stop], shuffles + 1, axis=0)
                valid = np.repeat(drive.action_valid[None, begin:stop], shuffles + 1, axis=0)
                for number in range(1, shuffles + 1):
                    order = _block_permutation(stop - begin, world.context_frames, rng)
                    actions[number][:, chosen] = actions[0, order][:, chosen]
                    valid[number][:, chosen] = valid[0, order][:, chosen]
                bits = streamed_bits(world.transformer, drive, begin, actions, valid)
                gains[name].append(_gain_per_block(bits, world.context_frames))
                bar.advance(1)
    tokens = world.tokenizer.rows * world.tokenizer.cols
    return {
        "shuffles": shuffles,
        "gain_bits_per_frame": {
            name: _bootstrap(np.concatenate(values) * tokens, rng) for name, values in gains.items()
        },
        "fingerprint": world.fingerprint,
    }


def _block_permutation(length: int, block: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices that permute whole blocks; what is left over at the end stays."""
    blocks = length // block
    order = (rng.permutation(blocks)[:, None] * block + np.arange(block)).ravel()
    left_over = np.arange(blocks * block, length)
    return np.concatenate([order, left_over]).astype(np.int64)


def _gain_per_block(bits: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Mean gain of variant 0 of `bits` [V, N] over the others, per whole block after the first."""
    gain = bits[1:].mean(axis=0) - bits[0]
    blocks = len(gain) // block
    whole = gain[block : blocks * block]
    return reduce(whole, "(b n) -> b", "mean", n=block)


def _bootstrap(values: NDArray[np.float64], rng: np.random.Generator) -> dict[str, float]:
    if not len(values):
        raise DriveSimError("the held-out drives are shorter than two windows: nothing to shuffle")
    means = values[rng.integers(len(values), size=(_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlTrial:
    """Two futures of one start: full left and full right."""

    start_s: float
    left_motion: float
    """Mean image motion in picture widths a frame, positive where the car turns left."""
    right_motion: float

    @property
    def obeyed(self) -> bool:
        """Whether left turned left and right turned right."""
        return self.left_motion > 0 > self.right_motion


def evaluate_control(
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
        raise DriveSimError(f"--sheet {sheet}: a picture is a .png or .jpg file; name it so")
    frames = round(seconds * world.fps) if math.isfinite(seconds) else 0
    if frames < 1:
        raise DriveSimError(
            f"--seconds {seconds:g}: less than a frame at the model's {world.fps:.3g} frames/s"
        )
    if world.steering_p99 == 0:
        raise DriveSimError(
            "the model's training drives have no steering, so there is nothing to steer with: "
            "train on drives that do"
        )
    trials: dict[str, list[ControlTrial]] = {drive.id: [] for drive in drives}
    rows: list[tuple[str, list[Frame]]] = []
    with progress(starts, "left and right", "starts") as bar:
        for number in range(starts):
            drive = drives[number % len(drives)]
            share = (number // len(drives) + 0.5) / -(-starts // len(drives))
            times = _times_to_start(world, drive)
            start_s = float(times[int(share * len(times))])
            trial, pictures = _steer_both_ways(world, drive, start_s, frames, sampling)
            trials[drive.id].append(trial)
            rows.append((f"{drive.id} at {start_s:.1f} s", pictures))
            bar.advance(1)
    if sheet is not None:
        half, end = (f"after {(n + 1) / world.fps:.1f} s" for n in _sheet_frames(frames))
        headings = [f"left {end}", f"left {half}", "start", f"right {half}", f"right {end}"]
        with atomic_file(sheet) as temporary:
            Image.fromarray(contact_sheet(rows, headings)).save(temporary)
    every = [trial for each in trials.values() for trial in each]
    return {
        "starts": starts,
        "seconds": seconds,
        "steering": world.steering_p99,
        "obeyed": sum(trial.obeyed for trial in every),
        "mean_left_minus_right": float(np.mean([t.left_motion - t.right_motion for t in every])),
        "sampling": asdict(sampling),
        "trials": {name: [asdict(trial) for trial in each] for name, each in trials.items()},
        "fingerprint": world.fingerprint,
    }


def _times_to_start(world: WorldModel, drive: Drive) -> NDArray[np.float64]:
    """The times after the first context at which the car moves: one that stands cannot turn."""
    sampled = sample(drive, fps=world.fps)
    first = min(world.context_frames, len(sampled.timestamps) - 1)
    times = sampled.timestamps[first:]
    speeds = np.append(0.0, sampled.actions[:-1, SPEED])[first:]  # that led to each time
    moves = speeds >= _MOVING_MPS
    return times[moves] if moves.any() else times


def _steer_both_ways(
    world: WorldModel, drive: Drive, start_s: float, frames: int, sampling: Sampling
) -> tuple[ControlTrial, list[Frame]]:
    """Return what was measured, and pictures of it: left after all and half, start, right."""
    context = context_from_drive(world, drive, start_s)
    past = len(context.tokens) - 1
    prefix = world.encode_prefix(
        context.tokens, context.actions[:past], context.action_valid[:past]
    )
    situation = context.situation(world)
    actions = np.tile(situation.last_action, (2, frames, 1))
    actions[0, :, STEERING], actions[1, :, STEERING] = world.steering_p99, -world.steering_p99
    valid = np.tile(situation.last_valid | [False, True], (2, frames, 1))
    tokens = [step.tokens for step in world.generate(prefix, actions, valid, sampling=sampling)]
    start = context.frames[-1]
    left, right = (
        world.tokenizer.decode(torch.stack(branch).cpu()).numpy()
        for branch in zip(*tokens, strict=True)
    )
    left_motion, right_motion = (
        float(yaw_motion(np.concatenate([start[None], future])).mean()) for future in (left, right)
    )
    half, end = _sheet_frames(frames)
    return (
        ControlTrial(start_s=start_s, left_motion=left_motion, right_motion=right_motion),
        [left[end], left[half], start, right[half], right[end]],
    )


def _sheet_frames(frames: int) -> tuple[int, int]:
    """The frames of a future that a contact sheet shows: half-way and the last one."""
    return (frames - 1) // 2, frames - 1
