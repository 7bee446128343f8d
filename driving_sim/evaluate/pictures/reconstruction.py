"""How near a tokenizer's reconstructions are, and what its tokens cost and tell.

Axes: B frames of a batch, H W pixels, r c token rows and columns, K codes, U blocks of frames.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from driving_sim.data.arrays import Floats, Ints, Pixels
from driving_sim.data.drive import SampledDrive
from driving_sim.engine.progress import progress
from driving_sim.evaluate.footage import frames_apart
from driving_sim.evaluate.pictures.flicker import flicker, flicker_shares
from driving_sim.evaluate.pictures.quality import frame_measures
from driving_sim.evaluate.report.cell import Cell
from driving_sim.evaluate.report.intervals import block_frames, interval
from driving_sim.evaluate.report.section import Media, Section, Table, photo
from driving_sim.tokenizer.metrics import codebook_use
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.panels import side_by_side

_BATCH = 16
_WORST = 6
_BITS_PER_PIXEL = 24
_MEASURES = ("psnr_db", "ssim", "lpips")


class _Measured:
    """What is measured of one drive, batch by batch."""

    def __init__(
        self, sampled: SampledDrive, tokenizer: Tokenizer, perceptual: PerceptualLoss | None
    ) -> None:
        self.sampled, self.frames = sampled, len(sampled.indices)
        self.measures = frame_measures(perceptual)
        self.batches: dict[str, list[Floats]] = {name: [] for name in self.measures}
        self.flicker: Counter[str] = Counter()
        self.counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self._last: list[tuple[Pixels, Ints]] = []

    @property
    def values(self) -> dict[str, Floats]:
        """Each measure of every frame [N]."""
        return {name: np.concatenate(parts) for name, parts in self.batches.items()}

    def add(self, tokenizer: Tokenizer, batch: Pixels) -> None:
        """Measure the drive's next frames, uint8 [B, H, W, 3]."""
        began = time.perf_counter()
        tokens = tokenizer.encode(batch)
        encoded = time.perf_counter()
        rebuilt = tokenizer.decode(tokens)
        self.seconds["encode"] += encoded - began
        self.seconds["decode"] += time.perf_counter() - encoded
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts))
        for name, measure in self.measures.items():
            values = measure(rebuilt, torch.from_numpy(batch)).double().numpy()
            self.batches[name].append(values)
        # Pairs reach over the edges of batches.
        seen = zip(*self._last, (batch, tokens.numpy()), strict=True)
        frames, codes = (np.concatenate(parts) for parts in seen)
        self.flicker += flicker(codes, frames)
        self._last = [(batch[-1:], tokens[-1:].numpy())]


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    drives: Sequence[SampledDrive],
    *,
    perceptual: PerceptualLoss | None = None,
) -> Section:
    """Measure reconstructions on uint8 pixels, the codebook's use, flicker and speed.

    LPIPS (arXiv 1801.03924) needs `perceptual`. Means are over frames, their intervals over blocks
    of 3 s (Künsch 1989, 10.1214/aos/1176347265).
    """
    measured = [_Measured(each, tokenizer, perceptual) for each in drives]
    with progress(sum(each.frames for each in measured), "evaluate", "frames") as bar:
        for each in measured:
            for batch in each.sampled.batches(tokenizer.frame_size, _BATCH):
                each.add(tokenizer, batch)
                bar.advance(len(batch))
    metrics = _metrics(tokenizer, measured)
    parts: list[Table | Media] = [_overall(metrics), _by_drive(metrics)]
    parts += _worst(tokenizer, measured)
    return Section("reconstruction", "Reconstruction", _TEXT, metrics, parts)


def _worst(tokenizer: Tokenizer, measured: Sequence[_Measured]) -> Iterator[Media]:
    """The frames of the lowest PSNR, of one moment only the worst, and their reconstructions."""
    ranked = []
    for number, each in enumerate(measured):
        values = each.values["psnr_db"]
        order = np.argsort(values, kind="stable").tolist()
        worst = frames_apart(order, each.sampled.timestamps, _WORST)
        ranked += [(values[index], number, index) for index in worst]
    for value, number, index in sorted(ranked)[:_WORST]:
        sampled = measured[number].sampled
        frames = sampled.drive.frames(sampled.indices[[index]], tokenizer.frame_size)
        rebuilt = tokenizer.decode(tokenizer.encode(frames)).numpy()
        place = f"{sampled.drive.id} at {sampled.timestamps[index]:.1f} s"
        yield photo(
            side_by_side([frames[0], rebuilt[0]], columns=2),
            f"{place}: {value:.1f} dB. Left: the frame. Right: reconstructed",
        )


_TEXT = """Every frame is encoded, decoded and compared on 8-bit pixels. PSNR is averaged over
frames in dB; SSIM is that of Wang et al. 2004 (Gaussian windows, valid region). Intervals are over
blocks of 3 s.

Flicker: of the token cells whose pixels do not change from a frame to the next, the share whose
token changes all the same. Bits per frame: tokens times the bits of a code; the compression factor
is that of 24-bit pixels. The frames shown are those of the lowest PSNR that lie 2 s apart."""


def _metrics(tokenizer: Tokenizer, measured: Sequence[_Measured]) -> dict[str, Any]:
    frames = sum(each.frames for each in measured)
    bits = tokenizer.rows * tokenizer.cols * math.log2(tokenizer.codebook_size)
    # Neighbouring frames are alike and no units of their own: blocks of them are.
    blocks = np.concatenate(
        [
            frames * number + np.arange(each.frames) // block_frames(each.sampled.fps)
            for number, each in enumerate(measured)
        ]
    )
    return {
        "frames": frames,
        **{
            name: interval(np.concatenate([each.values[name] for each in measured]), blocks)
            for name in measured[0].measures
        },
        "codebook": codebook_use(torch.stack([each.counts for each in measured]).sum(0)),
        "flicker": flicker_shares(sum((each.flicker for each in measured), Counter())),
        "bits_per_frame": bits,
        "compression_factor": tokenizer.height * tokenizer.width * _BITS_PER_PIXEL / bits,
        "frames_per_second": {
            name: frames / sum(each.seconds[name] for each in measured)
            for name in ("encode", "decode")
        },
        "drives": {
            each.sampled.drive.id: {
                "frames": each.frames,
                **{name: float(values.mean()) for name, values in each.values.items()},
                "codebook": codebook_use(each.counts),
                "flicker": flicker_shares(each.flicker)["flicker"],
            }
            for each in measured
        },
    }


def _overall(metrics: dict[str, Any]) -> Table:
    codebook, speed = metrics["codebook"], metrics["frames_per_second"]
    rows: list[tuple[Cell, ...]] = [
        *((name, metrics[name]) for name in _MEASURES if name in metrics),
        ("share of the codes used", codebook["used"]),
        ("perplexity of the codes", codebook["perplexity"]),
        ("entropy of the codes, bits", codebook["entropy_bits"]),
        ("flicker", metrics["flicker"]["flicker"]),
        ("bits per frame", metrics["bits_per_frame"]),
        ("compression factor", metrics["compression_factor"]),
        ("frames encoded per second", speed["encode"]),
        ("frames decoded per second", speed["decode"]),
    ]
    return Table("All drives; means with 95 % intervals", ("", "value"), rows)


def _by_drive(metrics: dict[str, Any]) -> Table:
    names = ["frames", *(name for name in _MEASURES if name in metrics)]
    rows: list[tuple[Cell, ...]] = []
    for drive, found in metrics["drives"].items():
        measured = (found[name] for name in names)
        rows.append((drive, *measured, found["codebook"]["perplexity"], found["flicker"]))
    return Table("By drive", ("drive", *names, "perplexity", "flicker"), rows)
