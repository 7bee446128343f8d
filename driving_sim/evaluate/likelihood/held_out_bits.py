"""Measure a world model's bits per token and calibration on held-out drives.

Baselines are measured on the same frames. A run is a stretch of a drive without a time gap.

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
    """Return the drives of `training` except the model's validation drives.

    The model did not learn from its validation drives. They only selected its best checkpoint.
    Raises DriveSimError if no drive is left.
    """
    learned = [name for name in training.drive_ids if name not in world.validation_drives]
    if not learned:
        raise DriveSimError(
            f"{training.path}: contains only validation drives of the model; use `training_tokens` "
            "to name the token store that the model was trained on"
        )
    return training.select(learned)


def evaluate_likelihood(
    world: WorldModel, heldout: TokenStore, training: TokenStore | None, *, stride: int = 1
) -> Section:
    """Measure bits per token of the model and of baselines.

    Only frames with a full window of past frames are judged, and only every `stride`-th of them.
    The baselines are fitted to `learned_drives`. Without `training` there are none.

    The metric `streamed_over_recomputed` tests whether long rollouts predict as well as short ones.
    The bits of frames 2W to 4W of each run are measured in two ways: with the growing cache of a
    rollout, and with the window recomputed for each frame. The metric is the bits with the cache
    divided by the bits with the recomputed window, so 1 is ideal. It is None if no run is long
    enough.

    Intervals resample blocks of 3 s, or of W frames if these last longer (Künsch 1989,
    10.1214/aos/1176347265).
    """
    world.check_store(heldout)
    frames, tokens = world.context_frames, world.tokenizer.rows * world.tokenizer.cols
    block = block_frames(world.fps, frames)
    windows = FullWindows(heldout.drives, frames=frames, stride=stride)
    calibration = Calibration()
    with progress(len(windows), "bits per token", "frames") as bar:
        model = bits_per_token(
            world.transformer, windows, advance=bar.advance, watch=calibration.add
        )
    judged = {"model": model}
    if training is not None:
        world.check_store(training)
        judged |= _baselines(learned_drives(world, training), windows)
    places = _by_position(world, heldout.drives, block)
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        "frames": len(windows),
        "context_frames": frames,
        "block_frames": block,
        "bits_per_token": {name: _interval(bits, block) for name, bits in judged.items()},
        "bits_per_frame": {name: _interval(bits, block, tokens) for name, bits in judged.items()},
        "accuracy": {name: float(bits.accuracy.mean()) for name, bits in judged.items()},
        "share_of_copy_last": model.mean / judged["copy_last"].mean
        if training is not None
        else None,
        "streamed_over_recomputed": _streamed_share(world, heldout.drives, model),
        "by_position": [place["mean"] for place in places],
        "by_position_interval": {end: [place[end] for place in places] for end in ("low", "high")},
        "calibration": calibration.metrics(),
    }
    parts = _table(metrics), _plot(metrics)
    return Section("likelihood", "Likelihood of held-out drives", _TEXT, metrics, parts)


def _baselines(drives: Sequence[DriveTokens], windows: FullWindows) -> dict[str, FrameBits]:
    """Return the bits of baselines that are fitted to `drives`."""
    copy_last = CopyLast.fit(drives)
    return {
        "time_bigram": TimeBigram.fit(drives).bits_per_token(windows),
        "copy_last": copy_last.bits_per_token(windows),
        "unigram": copy_last.unigram.bits_per_token(windows),
    }


_TEXT = """How well does the model predict drives that it has not seen? A token costs -log2 p
bits if the model gave it the probability p, so fewer bits are better. Only frames with a full
window of past frames count. A good model needs fewer bits than all three baselines. These only
count tokens in the training drives, and they are missing if the training drives are not at hand.
"Unigram" counts how frequent each token is. "Copy last" expects the token that the frame before had
at the same place, and gives a small probability to all others. "Time bigram" counts how often one
token follows another at the same place.

The intervals resample blocks of 3 s, or of the model's window if that lasts longer, because
neighbouring frames are alike. Bits per token depend on the tokenizer, so they cannot compare models
with different tokenizers. They also do not show how good a long rollout looks.

The left plot shows the bits by a frame's place in its window. The curve should fall, because later
frames have more past frames as context. The right plot shows calibration: how often the model's
likeliest token was right, for each probability that the model gave it. A calibrated model lies on
the diagonal. Below the diagonal, the model is too sure of itself. The expected calibration error is
the mean distance from the diagonal, so less is better (Guo et al. 2017, arXiv 1706.04599)."""


class Calibration:
    """Counts how often the model's likeliest token was right, by the probability of that token."""

    def __init__(self) -> None:
        self.sums = np.zeros((3, _BINS))

    def add(self, judged: TokenBits) -> None:
        """Add tokens to the bins of their probabilities. All bins have the same width."""
        confidence = judged.confidence.double().cpu().numpy().ravel()
        right = judged.right.cpu().numpy().ravel()
        places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        terms = (None, right, confidence)
        self.sums += [np.bincount(places, term, minlength=_BINS) for term in terms]

    def metrics(self) -> dict[str, Any]:
        """Return the mean confidence and accuracy of each bin, and the expected calibration error.

        Both means are None in an empty bin.
        """
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
    """Return the mean bits of `tokens` tokens, with an interval.

    By default these are the bits per token. If `tokens` is the number of tokens in a frame, they
    are the bits per frame. The interval resamples blocks of frames.
    """
    blocks = judged.drive * (1 + judged.frame.max() // block) + judged.frame // block
    return interval(judged.bits * tokens, blocks)


def _by_position(
    world: WorldModel, drives: Sequence[DriveTokens], block: int
) -> list[dict[str, float | None]]:
    """Return the mean bits per token for each place in the model's window, with intervals.

    The drives are cut into windows that do not overlap. The n-th result is the mean over the n-th
    frames of all windows.
    """
    bits = _bits_of_windows(world, drives)
    # The intervals resample groups of neighbouring windows. A group has the fewest windows that
    # together last at least one block.
    units = np.arange(len(bits)) // -(-block // world.context_frames)
    return [interval(place, units) for place in bits.T]


@torch.inference_mode()
def _bits_of_windows(world: WorldModel, drives: Sequence[DriveTokens]) -> Floats:
    """Cut the drives into windows without overlap. Return the bits per token of each frame [w, W].

    The value of a frame is the mean over its tokens.
    """
    means = []
    for batch in sequential_windows(drives, frames=world.context_frames, batch_size=_BATCH):
        inputs = {name: value.to(world.device) for name, value in batch.items()}
        logits = rearrange(world.transformer(**inputs), "b t r c k -> (b t) (r c) k")
        judged = TokenBits.judge(logits, rearrange(inputs["tokens"], "b t r c -> (b t) (r c)"))
        means.append(rearrange(judged.means()[0], "(b t) -> b t", b=len(inputs["tokens"])))
    return np.concatenate(means)


def _table(metrics: dict[str, Any]) -> Table:
    per_frame, accuracy = metrics["bits_per_frame"], metrics["accuracy"]
    return Table(
        "Cost of the held-out drives, with 95 % intervals; fewer bits are better",
        ("", "bits per token", "bits per frame", "likeliest token is right (share)"),
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
    left.set(xlabel="place of the frame in the window", ylabel="bits per token")
    calibration = metrics["calibration"]
    pairs = zip(calibration["confidence"], calibration["accuracy"], strict=True)
    known = np.array([pair for pair in pairs if None not in pair], np.float64)
    right.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    right.plot(known[:, 0], known[:, 1], marker="o")
    right.set(xlabel="probability of the likeliest token", ylabel="how often it is right (share)")
    caption = (
        "Left: bits by place in the window, with the 95 % interval as a band. Right: calibration; "
        f"expected calibration error {calibration['expected_error']:.3f}"
    )
    return plot(figure, caption)


def _streamed_share(
    world: WorldModel, drives: Sequence[DriveTokens], recomputed: FrameBits
) -> float | None:
    """Return the bits with a rollout's cache, divided by the bits with a recomputed window.

    Both are measured on frames 2W to 4W of every run. Returns None if no run is that long.
    """
    frames = world.context_frames
    with progress(len(drives), "streamed bits", "drives") as bar:
        streamed = streamed_bits_per_token(
            world.transformer, drives, first=2 * frames, stop=4 * frames, advance=bar.advance
        )
    # Give every frame of every drive its own id, to find the frames that were judged in both ways.
    streamed_ids = streamed.drive << 32 | streamed.frame
    recomputed_ids = recomputed.drive << 32 | recomputed.frame
    _, in_streamed, in_recomputed = np.intersect1d(
        streamed_ids, recomputed_ids, assume_unique=True, return_indices=True
    )
    if not len(in_streamed):
        return None
    bits = np.stack([streamed.bits[in_streamed], recomputed.bits[in_recomputed]], axis=1)
    with_cache, with_window = bits.mean(axis=0)
    return float(with_cache / with_window)
