"""Bits per token of a world model on held-out drives: beside baselines, calibrated, and coded.

Axes: n judged frames, W frames of context, P tokens of a frame, w windows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure

from driving_sim.data.arrays import Floats
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.data.tokens.windows import sequential_windows
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.report.intervals import block_frames, interval
from driving_sim.evaluate.report.section import Media, Section, Table, plot
from driving_sim.world_model.training.baselines import CopyLast, TimeBigram
from driving_sim.world_model.training.bits import (
    FrameBits,
    FullWindows,
    TokenBits,
    bits_per_token,
    streamed_bits_per_token,
)
from driving_sim.world_model.world_model import WorldModel

_BINS = 10
_BATCH = 4


def learned_drives(world: WorldModel, training: TokenStore) -> tuple[DriveTokens, ...]:
    """The drives of `training` that the model learned from: not those that chose its weights.

    Raises DriveSimError where there are none.
    """
    learned = [name for name in training.drive_ids if name not in world.validation_drives]
    if not learned:
        raise DriveSimError(
            f"{training.path} holds only drives that the model was validated on: name the token "
            "store that it was trained on with `training_tokens`"
        )
    return training.select(learned)


def evaluate_likelihood(
    world: WorldModel, heldout: TokenStore, training: TokenStore, *, stride: int = 1
) -> Section:
    """Bits per token on every `stride`-th frame with a full window behind it, beside baselines.

    The baselines are fitted on `learned_drives`. `streamed_over_recomputed` is what frames 2W to
    4W of the drives cost in a rollout's cache, which nothing recomputes, over what they cost in
    windows of their own: near 1 where long rollouts are as good as short ones, None where no drive
    is that long. Intervals are over blocks of 3 s, or of W frames where these last longer (Künsch
    1989, 10.1214/aos/1176347265).
    """
    world.check_store(heldout)
    world.check_store(training)
    drives = learned_drives(world, training)
    frames, tokens = world.context_frames, world.tokenizer.rows * world.tokenizer.cols
    block = block_frames(world.fps, frames)
    windows = FullWindows(heldout.drives, frames=frames, stride=stride)
    calibration = Calibration()
    with progress(len(windows), "bits per token", "frames") as bar:
        model = bits_per_token(
            world.transformer, windows, advance=bar.advance, watch=calibration.add
        )
    copy_last = CopyLast.fit(drives)
    judged = {
        "model": model,
        "time_bigram": TimeBigram.fit(drives).bits_per_token(windows),
        "copy_last": copy_last.bits_per_token(windows),
        "unigram": copy_last.unigram.bits_per_token(windows),
    }
    places = _by_position(world, heldout.drives, block)
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        "frames": len(windows),
        "context_frames": frames,
        "block_frames": block,
        "bits_per_token": {name: _interval(each, block) for name, each in judged.items()},
        "bits_per_frame": {name: _interval(each, block, tokens) for name, each in judged.items()},
        "accuracy": {name: float(each.accuracy.mean()) for name, each in judged.items()},
        "share_of_copy_last": model.mean / judged["copy_last"].mean,
        "streamed_over_recomputed": _streamed_share(world, heldout.drives, model),
        "by_position": [each["mean"] for each in places],
        "by_position_interval": {end: [each[end] for each in places] for end in ("low", "high")},
        "calibration": calibration.metrics(),
    }
    parts = _table(metrics), _plot(metrics)
    return Section("likelihood", "Likelihood of held-out drives", _TEXT, metrics, parts)


_TEXT = """How many bits each token of the held-out drives costs under the model, with a full window
behind it; fewer is better. The baselines know the training drives' counts only: the unigram, the
last frame copied (with probability 1 - e, else a unigram draw), and the bigram in time, the token
given the one before it at the same place. Intervals are over blocks of 3 s, or of a whole window
where that lasts longer: neighbouring frames are no independent evidence.

Calibration: where the model gives its best guess a probability p, the guess should be right with
that frequency; the expected calibration error is the mean distance (Guo et al. 2017,
arXiv 1706.04599)."""


class Calibration:
    """How often the likeliest token was right, by how likely the model thought it."""

    def __init__(self) -> None:
        self.sums = np.zeros((3, _BINS))

    def add(self, judged: TokenBits) -> None:
        """Count tokens into bins of equal width."""
        confidence = judged.confidence.double().cpu().numpy().ravel()
        right = judged.right.cpu().numpy().ravel()
        places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        terms = (None, right, confidence)
        self.sums += [np.bincount(places, term, minlength=_BINS) for term in terms]

    def metrics(self) -> dict[str, Any]:
        """Mean confidence and accuracy of each bin (None where empty), and their distance."""
        counts, right, confidence = self.sums

        def means(sums: Floats) -> list[float | None]:
            pairs = zip(sums.tolist(), counts.tolist(), strict=True)
            return [total / count if count else None for total, count in pairs]

        return {
            "expected_error": float(np.abs(right - confidence).sum() / counts.sum()),
            "confidence": means(confidence),
            "accuracy": means(right),
            "share": (counts / counts.sum()).tolist(),
        }


def _interval(judged: FrameBits, block: int, tokens: int = 1) -> dict[str, float | None]:
    """Mean bits of so many tokens, over frames, with its interval over blocks of frames."""
    blocks = judged.drive * (1 + judged.frame.max() // block) + judged.frame // block
    return interval(judged.bits * tokens, blocks)


def _by_position(
    world: WorldModel, drives: Sequence[DriveTokens], block: int
) -> list[dict[str, float | None]]:
    """Mean bits per token of the frames at each place of windows side by side, with intervals."""
    bits = _bits_of_windows(world, drives)
    # Windows that are shorter than a block are resampled so many together.
    units = np.arange(len(bits)) // -(-block // world.context_frames)
    return [interval(place, units) for place in bits.T]


@torch.inference_mode()
def _bits_of_windows(world: WorldModel, drives: Sequence[DriveTokens]) -> Floats:
    """Mean bits per token of each frame of windows side by side, [w, W]."""
    found = []
    for batch in sequential_windows(drives, frames=world.context_frames, batch_size=_BATCH):
        inputs = {name: value.to(world.device) for name, value in batch.items()}
        logits = rearrange(world.transformer(**inputs), "b t r c k -> (b t) (r c) k")
        judged = TokenBits.judge(logits, rearrange(inputs["tokens"], "b t r c -> (b t) (r c)"))
        found.append(rearrange(judged.means()[0], "(b t) -> b t", b=len(inputs["tokens"])))
    return np.concatenate(found)


def _table(metrics: dict[str, Any]) -> Table:
    per_frame, accuracy = metrics["bits_per_frame"], metrics["accuracy"]
    return Table(
        "Frames with a full window behind them; in brackets the 95 % interval",
        ("", "bits per token", "bits per frame", "likeliest token right"),
        [
            (name.replace("_", " "), bits, per_frame[name], accuracy[name])
            for name, bits in metrics["bits_per_token"].items()
        ],
    )


def _plot(metrics: dict[str, Any]) -> Media:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    position = np.arange(1, len(metrics["by_position"]) + 1)
    line = left.plot(position, metrics["by_position"], marker="o")
    low, high = (np.array(metrics["by_position_interval"][end], float) for end in ("low", "high"))
    left.fill_between(position, low, high, color=line[0].get_color(), alpha=0.2, linewidth=0)
    left.set(xlabel="frame of the window", ylabel="bits per token")
    calibration = metrics["calibration"]
    pairs = zip(calibration["confidence"], calibration["accuracy"], strict=True)
    known = np.array([pair for pair in pairs if None not in pair], np.float64)
    right.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    right.plot(known[:, 0], known[:, 1], marker="o")
    right.set(xlabel="probability of the likeliest token", ylabel="share of it being right")
    caption = (
        "Left: bits by the frame's place in its window; band: 95 % interval. Right: calibration"
    )
    return plot(figure, caption)


def _streamed_share(
    world: WorldModel, drives: Sequence[DriveTokens], recomputed: FrameBits
) -> float | None:
    """What the judged frames cost in a rollout's cache, over what they cost recomputed."""
    frames = world.context_frames
    with progress(len(drives), "streamed bits", "drives") as bar:
        streamed = streamed_bits_per_token(
            world.transformer, drives, first=2 * frames, stop=4 * frames, advance=bar.advance
        )
    # A number for each frame, in the drives' order.
    places, others = (judged.drive << 32 | judged.frame for judged in (streamed, recomputed))
    _, kept, judged = np.intersect1d(places, others, assume_unique=True, return_indices=True)
    if not len(kept):
        return None
    in_cache, alone = np.stack([streamed.bits[kept], recomputed.bits[judged]], axis=1).mean(axis=0)
    return float(in_cache / alone)
