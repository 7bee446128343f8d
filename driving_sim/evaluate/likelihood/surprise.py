"""What a world model did not expect: the bits of every token, drawn over the drives' own frames.

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
"""[r, c], what each token of a frame cost."""

_BATCH = 16
_MOMENTS = 6
_CURVES = 12  # of more drives, only the most surprising ones are in the picture
_OPACITY = 0.65
_COLOURS: Pixels = colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
_SHORT = " (short context)"
_INK, _PAPER = (240, 240, 240), (24, 24, 28)
_LINE, _PALE, _MARK = "#2a5db0", "#b9bec8", "#b4541a"


class _Watched:
    """A drive, with bits per token of its frames as far as they have been judged."""

    def __init__(self, sampled: SampledDrive, window: int, video: str) -> None:
        """`video` is the name of its file."""
        self.id, self.sampled, self.video = sampled.drive.id, sampled, video
        behind = np.concatenate([np.arange(stop - start) for start, stop in sampled.segments])
        # [N], which frames have a full window behind them, and which say something of the drive:
        # the same ones, if there are any. Else what they cost does not compare with others.
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
    """A frame that surprised more than those around it."""

    watched: _Watched
    frame: int
    bits: Bits

    @property
    def time_s(self) -> float:
        return float(self.watched.sampled.timestamps[self.frame])

    @property
    def mean(self) -> float:
        return self.watched.bits[self.frame]


def find_surprises(world: WorldModel, drives: Sequence[Drive], out: Path) -> dict[str, Any]:
    """Judge every token of drives as a rollout would meet it, and draw what surprised the model.

    The new folder `out` holds a video for each drive (its frames, and beside them the bits of their
    tokens as a heat map), `surprise.png` (bits per token over time), `moments.png` (the most
    surprising frames) and `surprise.json`, whose content is returned. Means, ranking and moments
    are of frames with a full window of context behind them. A drive that has none is judged by all
    frames but those that begin a run; it is marked, comes after all others and takes no part in the
    mean of all. The colours go from 0 bits to those of an even guess among all codes: pictures of
    different drives and models compare. No frames are kept in memory.

    Raises:
        DriveSimError: `out` exists; a drive has no two frames in a row, or another frame rate or
            steering kind than the model; a video is damaged; the disk is full.
    """
    if out.exists():
        raise DriveSimError(f"{out} exists: choose another `out`, or delete it")
    names = _file_names([drive.id for drive in drives])
    watched = [
        _Watched(sample_for(world, drive), world.context_frames, f"{name}.mp4")
        for drive, name in zip(drives, names, strict=True)
    ]
    moments: list[_Moment] = []
    with atomic_folder(out) as folder:
        with progress(sum(len(each.counts) for each in watched), "surprise", "frames") as bar:
            for each in watched:
                tokens: list[Bits] = []
                pictures = _pictures(world, each, tokens, bar)
                write_video(folder / each.video, pictures, fps=each.sampled.fps)
                candidates = np.flatnonzero(each.counts).tolist()
                ranked = sorted(candidates, key=each.bits.__getitem__, reverse=True)
                frames = frames_apart(ranked, each.sampled.timestamps, _MOMENTS)
                moments += [_Moment(watched=each, frame=t, bits=tokens[t]) for t in frames]
        # Of equals the earlier comes first.
        moments.sort(key=lambda moment: (moment.watched.short, -moment.mean))
        moments = moments[:_MOMENTS]
        _draw_curves(folder / "surprise.png", watched, moments)
        Image.fromarray(_moments_sheet(world, moments)).save(folder / "moments.png")
        report = _report(world, watched, moments)
        save_json(folder / "surprise.json", report)
    return report


def _file_names(ids: Sequence[str]) -> list[str]:
    """A name for each id that every file system takes, none of them twice."""
    names: list[str] = []
    for drive_id in ids:
        name = re.sub(r"[^\w.~-]+", "_", drive_id)
        # Some file systems do not tell capitals apart.
        while name.lower() in map(str.lower, names):
            name += "_"
        names.append(name)
    return names


def _judged_frames(world: WorldModel, sampled: SampledDrive) -> Iterator[tuple[Pixels, Bits]]:
    """Yield every frame with the bits of its tokens; after a gap the model starts afresh."""
    encoded = (
        (frame, tokens)
        for batch in sampled.batches(world.tokenizer.frame_size, _BATCH)
        for frame, tokens in zip(batch, world.tokenizer.encode(batch).numpy(), strict=True)
    )
    for start, stop in sampled.segments:
        shown, judged = tee(islice(encoded, stop - start))
        run = streamed_token_bits(
            world.transformer,
            (tokens for _, tokens in judged),
            sampled.actions[None, start:stop],
            sampled.action_valid[None, start:stop],
        )
        for (frame, _), found in zip(shown, run, strict=True):
            bits = found.bits.cpu().numpy()
            yield frame, rearrange(bits, "1 (r c) -> r c", c=world.tokenizer.cols)


def _pictures(
    world: WorldModel, watched: _Watched, tokens: list[Bits], bar: Progress
) -> Iterator[Pixels]:
    """Yield the frames of a drive's video, and take note of their bits, in all and of `tokens`."""
    sampled = watched.sampled
    starts = {start for start, _ in sampled.segments}
    for t, (frame, bits) in enumerate(_judged_frames(world, sampled)):
        watched.bits.append(float(bits.mean(dtype=np.float64)))
        tokens.append(bits)
        bar.advance(1)
        short = "" if watched.full[t] else _SHORT
        panel = draw_panel(
            frame,
            f"{sampled.timestamps[t]:.1f} s  {watched.bits[t]:.2f} bits{short}",
            # The action that led to it.
            sampled.actions[t - 1],
            sampled.action_valid[t - 1] & (t not in starts),
            2 * world.statistics.steering_p95 or 1.0,
        )
        height, width, _ = panel.shape
        picture = panel[-(len(frame) * width // frame.shape[1]) :]
        legend = _legend(height - len(picture), width, _most(world))
        heat = heat_map(picture, bits, _most(world))
        yield side_by_side([panel, np.concatenate([legend, heat])], columns=2)


def _most(world: WorldModel) -> float:
    """The bits at which the colours end: what an even guess among all codes costs."""
    return math.log2(world.tokenizer.codebook_size)


def heat_map(frame: Pixels, bits: Bits, most: float) -> Pixels:
    """The frame [H, W, 3] in grey, under its tokens' bits [r, c] as colours from 0 to `most`."""
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
    draw.text((6, height // 4), "surprise of each token", fill=_INK, font=font, anchor="lm")
    draw.text((6, below), "0", fill=_INK, font=font, anchor="lm")
    draw.text((right + 6, below), f"{most:.1f}+ bits", fill=_INK, font=font, anchor="lm")
    pixels = np.array(image)
    ramp = np.linspace(0, 255, right - left).round().astype(np.uint8)
    pixels[below - 5 : below + 5, left:right] = _COLOURS[ramp]
    return pixels


def _moments_sheet(world: WorldModel, moments: Sequence[_Moment]) -> Pixels:
    rows = []
    for number, moment in enumerate(moments, 1):
        sampled = moment.watched.sampled
        pair = sampled.indices[moment.frame - 1 : moment.frame + 1]
        before, frame = sampled.drive.frames(pair, world.tokenizer.frame_size)
        place = f"{number}. {moment.watched.id} at {moment.time_s:.1f} s"
        short = _SHORT if moment.watched.short else ""
        title = f"{place}: {moment.mean:.2f} bits per token{short}"
        rows.append((title, [before, frame, heat_map(frame, moment.bits, _most(world))]))
    return contact_sheet(rows, ["the frame before", "the frame", "its surprise"])


def _draw_curves(path: Path, watched: Sequence[_Watched], moments: Sequence[_Moment]) -> None:
    """Write a PNG with a curve for each of the most surprising drives, all on one scale."""
    shown = _ranked(watched)[:_CURVES]
    figure = Figure(figsize=(12, 1.2 + 1.8 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, each in zip(rows, shown, strict=True):
        gaps = [start for start, _ in each.sampled.segments[1:]]
        bits = np.array(each.bits)
        for values, colour in ((bits, _PALE), (np.where(each.full, bits, np.nan), _LINE)):
            # The line is broken where the video is.
            times, broken = (np.insert(x, gaps, np.nan) for x in (each.sampled.timestamps, values))
            axes.plot(times, broken, color=colour, linewidth=1)
        axes.axhline(each.mean, color=_LINE, linewidth=0.8, linestyle=":")
        # A dollar sign in a file name is no formula.
        title = f"{each.id}: {each.mean:.2f} bits{_SHORT if each.short else ''}"
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for number, moment in enumerate(moments, 1):
            if moment.watched is each:
                place = moment.time_s, moment.mean
                axes.plot(*place, "o", color=_MARK)
                axes.annotate(str(number), place, (6, 0), textcoords="offset points", color=_MARK)
    counted = np.concatenate([each.counted for each in shown])
    margin = 0.2 * float(np.ptp(counted)) or 0.1
    rows[0].set_ylim(counted.min() - margin, counted.max() + margin)
    rows[-1].set_xlabel("time in s")
    figure.suptitle("Surprise in bits per token (pale: less context than the model's window)")
    figure.savefig(path, dpi=100)


def _ranked(watched: Sequence[_Watched]) -> list[_Watched]:
    return sorted(watched, key=lambda each: (each.short, -each.mean))


def _report(
    world: WorldModel, watched: Sequence[_Watched], moments: Sequence[_Moment]
) -> dict[str, Any]:
    compared = [each for each in watched if not each.short] or watched
    return {
        "bits_per_token": float(np.concatenate([each.counted for each in compared]).mean()),
        "ranking": [each.id for each in _ranked(watched)],
        "moments": [
            {"drive": each.watched.id, "time_s": each.time_s, "bits_per_token": each.mean}
            for each in moments
        ],
        "drives": {
            each.id: {
                "video": each.video,
                "frames": len(each.bits),
                "short_context": each.short,
                "bits_per_token": each.mean,
                "p95_bits_per_token": float(np.quantile(each.counted, 0.95)),
                "per_frame": {
                    "time_s": each.sampled.timestamps.tolist(),
                    "bits_per_token": each.bits,
                    "counted": each.counts.tolist(),
                },
            }
            for each in watched
        },
        "settings": {
            "fps": world.fps,
            "context_frames": world.context_frames,
            "moments_apart_s": APART_S,
            "colours_end_at_bits": _most(world),
            "precision": world.precisions,
        },
        "fingerprints": {
            "tokenizer": world.tokenizer.fingerprint,
            "world_model": world.fingerprint,
        },
    }
