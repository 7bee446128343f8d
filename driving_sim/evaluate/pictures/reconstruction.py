"""How near a tokenizer's reconstructions are, and what its tokens cost and tell.

Axes: B frames of a batch, H W pixels, r c token rows and columns, K codes, U blocks of frames.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from driving_sim.data.drive import SampledDrive
from driving_sim.engine.progress import progress
from driving_sim.evaluate.pictures.flicker import flicker, flicker_shares
from driving_sim.evaluate.pictures.quality import frame_measures
from driving_sim.evaluate.report.cell import Cell
from driving_sim.evaluate.report.intervals import block_frames, bootstrap, mean_of_sums, mean_sums
from driving_sim.evaluate.report.section import Media, Section, Table, photo
from driving_sim.tokenizer.metrics import codebook_use
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.panels import side_by_side

Frames = NDArray[np.uint8]

_BATCH = 16
_WORST = 6
_APART_S = 2.0
"""The worst frames shown are this far apart: neighbours fail alike."""
_BITS_PER_PIXEL = 24
_MEASURES = ("psnr_db", "ssim", "lpips")


class _DriveMeter:
    """Measures one drive, batch by batch."""

    def __init__(
        self, sampled: SampledDrive, tokenizer: Tokenizer, perceptual: PerceptualLoss | None
    ) -> None:
        self.sampled, self.tokenizer = sampled, tokenizer
        self.measures = frame_measures(perceptual)
        self.values = {name: np.zeros(0) for name in self.measures}
        self.flicker: Counter[str] = Counter()
        self.counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self._last: list[tuple[Frames, NDArray[np.int64]]] = []

    def add(self, batch: Frames) -> None:
        """Measure the drive's next frames, uint8 [B, H, W, 3]."""
        began = time.perf_counter()
        tokens = self.tokenizer.encode(batch)
        encoded = time.perf_counter()
        rebuilt = self.tokenizer.decode(tokens)
        self.seconds["encode"] += encoded - began
        self.seconds["decode"] += time.perf_counter() - encoded
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts))
        for name, measure in self.measures.items():
            values = measure(rebuilt, torch.from_numpy(batch)).double().numpy()
            self.values[name] = np.append(self.values[name], values)
        # Pairs reach over the edges of batches.
        seen = zip(*self._last, (batch, tokens.numpy()), strict=True)
        frames, codes = (np.concatenate(parts) for parts in seen)
        self.flicker += flicker(codes, frames)
        self._last = [(batch[-1:], tokens[-1:].numpy())]

    def beside(self, index: int) -> Media:
        """Show a frame and its reconstruction."""
        chosen = self.sampled.indices[[index]]
        frames = self.sampled.drive.frames(chosen, self.tokenizer.frame_size)
        rebuilt = self.tokenizer.decode(self.tokenizer.encode(frames)).numpy()
        place = f"{self.sampled.drive.id} at {self.sampled.timestamps[index]:.1f} s"
        return photo(
            side_by_side([frames[0], rebuilt[0]], columns=2),
            f"{place}: {self.values['psnr_db'][index]:.1f} dB. "
            "Left: the frame. Right: reconstructed",
        )


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
    meters = [_DriveMeter(each, tokenizer, perceptual) for each in drives]
    with progress(sum(len(each.indices) for each in drives), "evaluate", "frames") as bar:
        for meter in meters:
            for batch in meter.sampled.batches(tokenizer.frame_size, _BATCH):
                meter.add(batch)
                bar.advance(len(batch))
    metrics = _metrics(tokenizer, meters)
    return Section(
        name="reconstruction",
        title="Reconstruction",
        text=_TEXT,
        metrics=metrics,
        parts=(
            _overall(metrics),
            _by_drive(metrics),
            *(meters[drive].beside(index) for drive, index in _worst(meters)),
        ),
    )


def _worst(meters: Sequence[_DriveMeter]) -> list[tuple[int, int]]:
    """The drives and frames of the lowest PSNR, of one moment only the worst."""
    ranked = sorted(
        (value, drive, index)
        for drive, meter in enumerate(meters)
        for index, value in enumerate(meter.values["psnr_db"].tolist())
    )
    chosen: list[tuple[int, int]] = []
    for _, drive, index in ranked:
        times = meters[drive].sampled.timestamps
        near = (n for other, n in chosen if other == drive)
        if all(abs(times[index] - times[n]) >= _APART_S for n in near):
            chosen.append((drive, index))
        if len(chosen) == _WORST:
            break
    return chosen


_TEXT = """Every frame is encoded, decoded and compared on 8-bit pixels. PSNR is averaged over
frames in dB; SSIM is that of Wang et al. 2004 (Gaussian windows, valid region). Intervals are over
blocks of 3 s.

Flicker: of the token cells whose pixels do not change from a frame to the next, the share whose
token changes all the same. Bits per frame: tokens times the bits of a code; the compression factor
is that of 24-bit pixels. The frames shown are those of the lowest PSNR that lie 2 s apart."""


def _metrics(tokenizer: Tokenizer, meters: Sequence[_DriveMeter]) -> dict[str, Any]:
    frames = sum(len(meter.sampled.indices) for meter in meters)
    bits = tokenizer.rows * tokenizer.cols * math.log2(tokenizer.codebook_size)
    # Neighbouring frames are alike and no units of their own: blocks of them are.
    blocks = [
        np.arange(len(meter.sampled.indices)) // block_frames(meter.sampled.fps) for meter in meters
    ]
    means = {}
    for name in meters[0].measures:
        sums = [mean_sums(m.values[name], block) for m, block in zip(meters, blocks, strict=True)]
        means[name] = bootstrap(np.concatenate(sums), mean_of_sums)
    return {
        "frames": frames,
        **means,
        "codebook": codebook_use(torch.stack([meter.counts for meter in meters]).sum(0)),
        "flicker": flicker_shares(sum((meter.flicker for meter in meters), Counter())),
        "bits_per_frame": bits,
        "compression_factor": tokenizer.height * tokenizer.width * _BITS_PER_PIXEL / bits,
        "frames_per_second": {
            name: frames / sum(meter.seconds[name] for meter in meters)
            for name in ("encode", "decode")
        },
        "drives": {
            meter.sampled.drive.id: {
                "frames": len(meter.sampled.indices),
                **{name: float(values.mean()) for name, values in meter.values.items()},
                "codebook": codebook_use(meter.counts),
                "flicker": flicker_shares(meter.flicker)["flicker"],
            }
            for meter in meters
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
