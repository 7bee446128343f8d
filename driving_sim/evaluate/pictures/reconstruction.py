"""Measure a tokenizer's reconstructions, use of the codebook, flicker and speed.

Axes: N frames of a drive, B frames of a batch, H W pixels.
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
_WORST = 6  # number of the worst frames to show in the report
_BITS_PER_PIXEL = 24
_MEASURES = ("psnr_db", "ssim", "lpips")


class _DriveMeasures:
    """The measurements of one drive, collected batch by batch."""

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
        """Values of each measure for the frames measured so far, [N], by the measure's name."""
        return {name: np.concatenate(parts) for name, parts in self.batches.items()}

    def add(self, tokenizer: Tokenizer, batch: Pixels) -> None:
        """Encode, decode and measure the drive's next frames, uint8 [B, H, W, 3]."""
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
        # Prepend the last frame of the batch before, because `flicker` compares pairs of frames.
        with_last = zip(*self._last, (batch, tokens.numpy()), strict=True)
        frames, codes = (np.concatenate(parts) for parts in with_last)
        self.flicker += flicker(codes, frames)
        self._last = [(batch[-1:], tokens[-1:].numpy())]


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    drives: Sequence[SampledDrive],
    *,
    perceptual: PerceptualLoss | None = None,
) -> Section:
    """Measure a tokenizer's reconstructions, use of the codebook, flicker and speed.

    Reconstructions are compared with the frames as uint8 pixels. LPIPS (arXiv 1801.03924) is left
    out without `perceptual`. Means are over frames. Their intervals resample blocks of 3 s (Künsch
    1989, 10.1214/aos/1176347265).
    """
    measured = [_DriveMeasures(sampled, tokenizer, perceptual) for sampled in drives]
    with progress(sum(drive.frames for drive in measured), "evaluate", "frames") as bar:
        for drive in measured:
            for batch in drive.sampled.batches(tokenizer.frame_size, _BATCH):
                drive.add(tokenizer, batch)
                bar.advance(len(batch))
    metrics = _metrics(tokenizer, measured)
    parts: list[Table | Media] = [_overall(metrics), _by_drive(metrics)]
    parts += _worst(tokenizer, measured)
    return Section("reconstruction", "Reconstruction", _TEXT, metrics, parts)


def _worst(tokenizer: Tokenizer, measured: Sequence[_DriveMeasures]) -> Iterator[Media]:
    """Yield pictures of the frames with the lowest PSNR, beside their reconstructions.

    If several of these frames are close in time, only the worst of them is shown.
    """
    ranked = []
    for number, drive in enumerate(measured):
        values = drive.values["psnr_db"]
        order = np.argsort(values, kind="stable").tolist()
        worst = frames_apart(order, drive.sampled.timestamps, _WORST)
        ranked += [(values[index], number, index) for index in worst]
    for value, number, index in sorted(ranked)[:_WORST]:
        sampled = measured[number].sampled
        frames = sampled.drive.frames(sampled.indices[[index]], tokenizer.frame_size)
        rebuilt = tokenizer.decode(tokenizer.encode(frames)).numpy()
        place = f"{sampled.drive.id} at {sampled.timestamps[index]:.1f} s"
        yield photo(
            side_by_side([frames[0], rebuilt[0]], columns=2),
            f"{place}: {value:.1f} dB. Left: original frame. Right: reconstruction",
        )


_TEXT = """Question: how much of a frame survives the tokenizer? This limits the pictures of every
world model that uses it. Every frame is encoded to tokens, decoded again, and compared with the
original as 8-bit pixels.

How to read it. PSNR and SSIM (Wang et al. 2004; at most 1) are better if higher, LPIPS is better if
lower. Perplexity and entropy show how evenly the codes are used. A low share of used codes means
that a part of the codebook is wasted. Flicker looks at the cells of a picture that do not change
from one frame to the next. It is the share of these cells whose token changes anyway. 0 is best,
because a world model has to predict these changes, and nothing in the picture explains them. Bits
per frame is the number of tokens times the bits of a code. The compression factor compares it with
24-bit pixels.

Limits. PSNR and SSIM hardly notice small objects such as a distant car, so look at the pictures
too. They show the frames with the lowest PSNR, at least 2 s apart. The results are valid only for
similar drives. The speed depends on the machine. Intervals resample blocks of 3 s, because
neighbouring frames are similar."""


def _metrics(tokenizer: Tokenizer, measured: Sequence[_DriveMeasures]) -> dict[str, Any]:
    frames = sum(drive.frames for drive in measured)
    bits = tokenizer.rows * tokenizer.cols * math.log2(tokenizer.codebook_size)
    # Neighbouring frames are not independent, so the intervals resample blocks of frames.
    blocks = np.concatenate(
        [
            frames * number + np.arange(drive.frames) // block_frames(drive.sampled.fps)
            for number, drive in enumerate(measured)
        ]
    )
    return {
        "frames": frames,
        **{
            name: interval(np.concatenate([drive.values[name] for drive in measured]), blocks)
            for name in measured[0].measures
        },
        "codebook": codebook_use(torch.stack([drive.counts for drive in measured]).sum(0)),
        "flicker": flicker_shares(sum((drive.flicker for drive in measured), Counter())),
        "bits_per_frame": bits,
        "compression_factor": tokenizer.height * tokenizer.width * _BITS_PER_PIXEL / bits,
        "frames_per_second": {
            name: frames / sum(drive.seconds[name] for drive in measured)
            for name in ("encode", "decode")
        },
        "drives": {
            drive.sampled.drive.id: {
                "frames": drive.frames,
                **{name: float(values.mean()) for name, values in drive.values.items()},
                "codebook": codebook_use(drive.counts),
                "flicker": flicker_shares(drive.flicker)["flicker"],
            }
            for drive in measured
        },
    }


_LABELS = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


def _overall(metrics: dict[str, Any]) -> Table:
    codebook, speed = metrics["codebook"], metrics["frames_per_second"]
    rows: list[tuple[Cell, ...]] = [
        *((_LABELS[name], metrics[name]) for name in _MEASURES if name in metrics),
        ("share of the codes used", codebook["used"]),
        ("perplexity of the codes", codebook["perplexity"]),
        ("entropy of the codes, bits", codebook["entropy_bits"]),
        ("flicker, share of still cells", metrics["flicker"]["flicker"]),
        ("bits per frame", metrics["bits_per_frame"]),
        ("compression factor", metrics["compression_factor"]),
        ("frames encoded per second", speed["encode"]),
        ("frames decoded per second", speed["decode"]),
    ]
    caption = "All drives together. Means over frames have 95 % intervals"
    return Table(caption, ("", "value"), rows)


def _by_drive(metrics: dict[str, Any]) -> Table:
    measures = [name for name in _MEASURES if name in metrics]
    rows: list[tuple[Cell, ...]] = []
    for drive, facts in metrics["drives"].items():
        means = (facts[name] for name in measures)
        perplexity, flicker_share = facts["codebook"]["perplexity"], facts["flicker"]
        rows.append((drive, facts["frames"], *means, perplexity, flicker_share))
    labels = (_LABELS[name] for name in measures)
    columns = ("drive", "frames", *labels, "perplexity", "flicker")
    caption = "Each drive by itself. Look at drives that are much worse than the others: their "
    caption += "scenes, light or camera may be missing from the training data"
    return Table(caption, columns, rows)
