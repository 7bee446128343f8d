"""Bits per token of a world model on held-out drives, beside baselines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from driving_sim.data.token_store import DriveTokens, TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.world_model.baselines import CopyLast
from driving_sim.world_model.bits import (
    FrameBits,
    FullWindows,
    bits_per_token,
    streamed_bits_per_token,
)
from driving_sim.world_model.world_model import WorldModel


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
