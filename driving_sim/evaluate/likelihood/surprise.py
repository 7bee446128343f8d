"""Show where a drive surprised a world model, with a heat map of the bits of its tokens.

A run is a stretch of a drive without a time gap.

Axes: N frames of a drive, r c token rows and columns, H W pixels.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from driving_sim.data.arrays import Floats, Floats32, Pixels
from driving_sim.data.drive import Drive, SampledDrive
from driving_sim.data.video.writer import write_video
from driving_sim.engine.config import save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.engine.progress import Progress, progress
from driving_sim.evaluate.footage import APART_S, frames_apart
from driving_sim.world_model.panels import contact_sheet, draw_panel, side_by_side
from driving_sim.world_model.rollout import sample_for
from driving_sim.world_model.training.bits import streamed_token_bits
from driving_sim.world_model.world_model import WorldModel

Bits = Floats32
"""The cost of each token of a frame in bits, [r, c]."""

_BATCH = 16
_MOMENTS = 6
_CURVES = 12  # maximum number of drives in the plot
_OPACITY = 0.65
_COLOURS: Pixels = colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
_SHORT = " (short context)"
_INK, _PAPER = (240, 240, 240), (24, 24, 28)
_LINE, _PALE, _MARK = "#2a5db0", "#b9bec8", "#b4541a"


class _JudgedDrive:
    """A drive, and the mean bits per token of each frame that was judged so far."""

    def __init__(self, sampled: SampledDrive, window: int, video: str) -> None:
        """Prepare a drive. `window` is in frames. `video` is the name of its output video."""
        self.id, self.sampled, self.video = sampled.drive.id, sampled, video
        behind = np.concatenate([np.arange(stop - start) for start, stop in sampled.segments])
        # `full` [N] marks the frames with a full window of context. If a drive has such frames,
        # only they count. Otherwise the drive is `short`, and all its frames count except the first
        # of each run. Short drives are marked, because frames with less context cost more bits.
        self.full = behind >= window - 1
        self.short = not self.full.any()
        self.counts = behind > 0 if self.short else self.full
        self.bits: list[float] = []

    @property
    def counted(self) -> Floats:
        return np.array(self.bits)[self.counts]

    @property
    def mean(self) -> float:
        return float(self.counted.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moment:
    """A frame that surprised the model more than any other frame within 2 s."""

    drive: _JudgedDrive
    frame: int
    bits: Bits

    @property
    def time_s(self) -> float:
        return float(self.drive.sampled.timestamps[self.frame])

    @property
    def mean(self) -> float:
        return self.drive.bits[self.frame]


def find_surprises(world: WorldModel, drives: Sequence[Drive], out: Path) -> dict[str, Any]:
    """Measure the bits of every token of the drives, and show what surprised the model.

    Writes the new folder `out` and returns the content of its `surprise.json`:

    - a video of each drive: its frames, with a heat map of the bits of their tokens beside them
    - `surprise.png`: bits per token over time
    - `moments.png`: the most surprising frames
    - `surprise.json`: all numbers

    The model sees the drive as in a rollout, frame by frame with a cache. Only frames with a full
    window of context count for the means, the ranking of the drives and the most surprising frames.
    If a drive is too short to have such frames, all its frames count, except the first frame of the
    drive and the first after each time gap. Such a drive is marked, ranked last, and left out of
    the overall mean. The colours range from 0 bits to the bits of a uniform guess, so pictures of
    different drives can be compared. Frames are not kept in memory.

    Raises:
        DriveSimError: If `out` exists, if a drive has no two frames in a row, if its frame rate or
            steering kind is not the model's, if a video is damaged, or if the disk is full.
    """
    if out.exists():
        raise DriveSimError(f"{out}: exists already; choose another `out`, or delete it")
    names = _file_names([drive.id for drive in drives])
    judged = [
        _JudgedDrive(sample_for(world, drive), world.context_frames, f"{name}.mp4")
        for drive, name in zip(drives, names, strict=True)
    ]
    moments: list[_Moment] = []
    with atomic_folder(out) as folder:
        with progress(sum(len(drive.counts) for drive in judged), "surprise", "frames") as bar:
            for drive in judged:
                tokens: list[Bits] = []
                pictures = _pictures(world, drive, tokens, bar)
                write_video(folder / drive.video, pictures, fps=drive.sampled.fps)
                candidates = np.flatnonzero(drive.counts).tolist()
                ranked = sorted(candidates, key=drive.bits.__getitem__, reverse=True)
                frames = frames_apart(ranked, drive.sampled.timestamps, _MOMENTS)
                moments += [_Moment(drive=drive, frame=t, bits=tokens[t]) for t in frames]
        # Put drives with short context last. The sort is stable, so earlier moments win ties.
        moments.sort(key=lambda moment: (moment.drive.short, -moment.mean))
        moments = moments[:_MOMENTS]
        _draw_curves(folder / "surprise.png", judged, moments)
        Image.fromarray(_moments_sheet(world, moments)).save(folder / "moments.png")
        report = _report(world, judged, moments)
        save_json(folder / "surprise.json", report)
    return report


def _file_names(ids: Sequence[str]) -> list[str]:
    """Return a different file name for every id, valid on every file system."""
    names: list[str] = []
    for drive_id in ids:
        name = re.sub(r"[^\w.~-]+", "_", drive_id)
        # Some file systems ignore case.
        while name.lower() in map(str.lower, names):
            name += "_"
        names.append(name)
    return names


def _judged_frames(world: WorldModel, sampled: SampledDrive) -> Iterator[tuple[Pixels, Bits]]:
    """Yield every frame with the bits of its tokens. After a time gap the model has no context."""
    encoded = (
        (frame, tokens)
        for batch in sampled.batches(world.tokenizer.frame_size, _BATCH)
        for frame, tokens in zip(batch, world.tokenizer.encode(batch).numpy(), strict=True)
    )
    for start, stop in sampled.segments:
        to_yield, to_judge = tee(islice(encoded, stop - start))
        run = streamed_token_bits(
            world.transformer,
            (tokens for _, tokens in to_judge),
            sampled.actions[None, start:stop],
            sampled.action_valid[None, start:stop],
        )
        for (frame, _), token_bits in zip(to_yield, run, strict=True):
            bits = token_bits.bits.cpu().numpy()
            yield frame, rearrange(bits, "1 (r c) -> r c", c=world.tokenizer.cols)


def _pictures(
    world: WorldModel, judged: _JudgedDrive, tokens: list[Bits], bar: Progress
) -> Iterator[Pixels]:
    """Yield the pictures of a drive's output video, and collect the bits of its frames.

    For every frame, append the bits of its tokens to `tokens`, and their mean to `judged.bits`.
    """
    sampled = judged.sampled
    starts = {start for start, _ in sampled.segments}
    for t, (frame, bits) in enumerate(_judged_frames(world, sampled)):
        judged.bits.append(float(bits.mean(dtype=np.float64)))
        tokens.append(bits)
        bar.advance(1)
        short = "" if judged.full[t] else _SHORT
        panel = draw_panel(
            frame,
            f"{sampled.timestamps[t]:.1f} s  {judged.bits[t]:.2f} bits{short}",
            # Show the action that led to this frame.
            sampled.actions[t - 1],
            sampled.action_valid[t - 1] & (t not in starts),
            2 * world.statistics.steering_p95 or 1.0,
        )
        height, width, _ = panel.shape
        picture = panel[-(len(frame) * width // frame.shape[1]) :]
        legend = _legend(height - len(picture), width, _top_bits(world))
        heat = heat_map(picture, bits, _top_bits(world))
        yield side_by_side([panel, np.concatenate([legend, heat])], columns=2)


def _top_bits(world: WorldModel) -> float:
    """Return the bits at the top of the colour scale: the cost of a uniform guess."""
    return math.log2(world.tokenizer.codebook_size)


def heat_map(frame: Pixels, bits: Bits, most: float) -> Pixels:
    """Return a grey copy of `frame` [H, W, 3], tinted by the bits [r, c] of its tokens.

    The colours range from 0 to `most` bits.
    """
    height, width, _ = frame.shape
    share = Image.fromarray(np.clip(bits / most, 0, 1).astype(np.float32))
    smooth = np.asarray(share.resize((width, height), Image.Resampling.BILINEAR))
    colour = _COLOURS[(smooth * 255).round().astype(np.uint8)]
    grey = frame.mean(axis=2, keepdims=True)
    mixed: Pixels = ((1 - _OPACITY) * grey + _OPACITY * colour).astype(np.uint8)
    return mixed


@lru_cache(maxsize=4)
def _legend(height: int, width: int, most: float) -> Pixels:
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    font, below = ImageFont.load_default(12), height * 3 // 4
    left, right = 20, int(width * 0.7)
    draw.text((6, height // 4), "bits of each token (surprise)", fill=_INK, font=font, anchor="lm")
    draw.text((6, below), "0", fill=_INK, font=font, anchor="lm")
    draw.text((right + 6, below), f"{most:.1f}+ bits", fill=_INK, font=font, anchor="lm")
    pixels = np.array(image)
    ramp = np.linspace(0, 255, right - left).round().astype(np.uint8)
    pixels[below - 5 : below + 5, left:right] = _COLOURS[ramp]
    return pixels


def _moments_sheet(world: WorldModel, moments: Sequence[_Moment]) -> Pixels:
    rows = []
    for number, moment in enumerate(moments, 1):
        sampled = moment.drive.sampled
        pair = sampled.indices[moment.frame - 1 : moment.frame + 1]
        before, frame = sampled.drive.frames(pair, world.tokenizer.frame_size)
        place = f"{number}. {moment.drive.id} at {moment.time_s:.1f} s"
        short = _SHORT if moment.drive.short else ""
        title = f"{place}: {moment.mean:.2f} bits per token{short}"
        rows.append((title, [before, frame, heat_map(frame, moment.bits, _top_bits(world))]))
    return contact_sheet(rows, ["frame before", "frame", "surprise"])


def _draw_curves(path: Path, judged: Sequence[_JudgedDrive], moments: Sequence[_Moment]) -> None:
    """Write a PNG with the curves of the most surprising drives, all on the same scale."""
    plotted = _ranked(judged)[:_CURVES]
    figure = Figure(figsize=(12, 1.2 + 1.8 * len(plotted)), layout="constrained")
    rows = figure.subplots(len(plotted), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, drive in zip(rows, plotted, strict=True):
        gaps = [start for start, _ in drive.sampled.segments[1:]]
        bits = np.array(drive.bits)
        for values, colour in ((bits, _PALE), (np.where(drive.full, bits, np.nan), _LINE)):
            # NaN breaks the line at the gaps of the video.
            times, broken = (np.insert(x, gaps, np.nan) for x in (drive.sampled.timestamps, values))
            axes.plot(times, broken, color=colour, linewidth=1)
        axes.axhline(drive.mean, color=_LINE, linewidth=0.8, linestyle=":")
        # Without parse_math=False, a dollar sign in a file name would start a formula.
        title = f"{drive.id}: {drive.mean:.2f} bits{_SHORT if drive.short else ''}"
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for number, moment in enumerate(moments, 1):
            if moment.drive is drive:
                place = moment.time_s, moment.mean
                axes.plot(*place, "o", color=_MARK)
                axes.annotate(str(number), place, (6, 0), textcoords="offset points", color=_MARK)
    counted = np.concatenate([drive.counted for drive in plotted])
    margin = 0.2 * float(np.ptp(counted)) or 0.1
    rows[0].set_ylim(counted.min() - margin, counted.max() + margin)
    rows[-1].set_xlabel("time in s")
    figure.suptitle("Surprise in bits per token (grey: less context than the model's window)")
    figure.savefig(path, dpi=100)


def _ranked(judged: Sequence[_JudgedDrive]) -> list[_JudgedDrive]:
    """Sort drives by their mean bits, highest first, but put drives with short context last."""
    return sorted(judged, key=lambda drive: (drive.short, -drive.mean))


def _report(
    world: WorldModel, judged: Sequence[_JudgedDrive], moments: Sequence[_Moment]
) -> dict[str, Any]:
    compared = [drive for drive in judged if not drive.short] or judged
    return {
        "bits_per_token": float(np.concatenate([drive.counted for drive in compared]).mean()),
        "ranking": [drive.id for drive in _ranked(judged)],
        "moments": [
            {"drive": moment.drive.id, "time_s": moment.time_s, "bits_per_token": moment.mean}
            for moment in moments
        ],
        "drives": {
            drive.id: {
                "video": drive.video,
                "frames": len(drive.bits),
                "short_context": drive.short,
                "bits_per_token": drive.mean,
                "p95_bits_per_token": float(np.quantile(drive.counted, 0.95)),
                "per_frame": {
                    "time_s": drive.sampled.timestamps.tolist(),
                    "bits_per_token": drive.bits,
                    "counted": drive.counts.tolist(),
                },
            }
            for drive in judged
        },
        "settings": {
            "fps": world.fps,
            "context_frames": world.context_frames,
            "moments_apart_s": APART_S,
            "colours_end_at_bits": _top_bits(world),
            "precision": world.precisions,
        },
        "fingerprints": {
            "tokenizer": world.tokenizer.fingerprint,
            "world_model": world.fingerprint,
        },
    }
