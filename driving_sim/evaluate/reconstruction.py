"""How near a tokenizer's reconstructions are, and what its tokens cost and tell.

Axes: B frames of a batch, H W pixels, r c token rows and columns, K codes.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from driving_sim.data.drive import SampledDrive
from driving_sim.engine.progress import progress
from driving_sim.evaluate.flicker import Flicker, flicker
from driving_sim.evaluate.intervals import interval
from driving_sim.evaluate.section import Cell, Section, Table, photo
from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.panels import side_by_side

Frames = NDArray[np.uint8]

_BATCH = 16
_BLOCK = 16  # frames: neighbours are alike, and no independent units
_WORST = 6
_BITS_PER_PIXEL = 24


@dataclass(frozen=True, slots=True)
class _Shown:
    """A frame beside its reconstruction."""

    psnr_db: float
    place: str
    frame: Frames
    rebuilt: Frames


class _DriveMeter:
    """Measures one drive, batch by batch."""

    def __init__(
        self, sampled: SampledDrive, tokenizer: Tokenizer, perceptual: PerceptualLoss | None
    ) -> None:
        self.sampled, self.tokenizer, self.perceptual = sampled, tokenizer, perceptual
        self.values: dict[str, list[NDArray[np.float64]]] = {}
        self.flicker = Flicker(cells=0, changed=0, still=0, still_changed=0)
        self.counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
        self.worst: list[_Shown] = []
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self._frames = 0
        self._last: tuple[Frames, NDArray[np.int64]] | None = None

    def add(self, batch: Frames) -> None:
        """Measure the drive's next frames, uint8 [B, H, W, 3]."""
        began = time.perf_counter()
        tokens = self.tokenizer.encode(batch)
        encoded = time.perf_counter()
        rebuilt = self.tokenizer.decode(tokens)
        self.seconds["encode"] += encoded - began
        self.seconds["decode"] += time.perf_counter() - encoded
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts))
        for name, values in self._compare(torch.from_numpy(batch), rebuilt).items():
            self.values.setdefault(name, []).append(values.double().numpy())
        self._keep_worst(batch, rebuilt.numpy())
        self._count_flicker(batch, tokens.numpy())
        self._frames += len(batch)

    def mean(self, name: str) -> float:
        """Mean of a measure over the drive's frames."""
        return float(np.concatenate(self.values[name]).mean())

    def blocks(self, name: str) -> list[float]:
        """Means of a measure over blocks of neighbouring frames."""
        values = np.concatenate(self.values[name])
        pieces = np.array_split(values, max(1, len(values) // _BLOCK))
        return [float(piece.mean()) for piece in pieces]

    def _compare(self, frames: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, torch.Tensor]:
        values = {"psnr_db": psnr(rebuilt, frames), "ssim": ssim(rebuilt, frames)}
        if self.perceptual is not None:
            values["lpips"] = self.perceptual.frame_distances(rebuilt, frames)
        return values

    def _keep_worst(self, batch: Frames, rebuilt: Frames) -> None:
        times = self.sampled.timestamps[self._frames : self._frames + len(batch)]
        found = [
            _Shown(float(value), f"{self.sampled.drive.id} at {second:.1f} s", frame, again)
            for value, second, frame, again in zip(
                self.values["psnr_db"][-1], times, batch, rebuilt, strict=True
            )
        ]
        self.worst = sorted([*self.worst, *found], key=lambda shown: shown.psnr_db)[:_WORST]

    def _count_flicker(self, batch: Frames, tokens: NDArray[np.int64]) -> None:
        if self._last is not None:
            frames = np.concatenate([self._last[0], batch])
            self.flicker += flicker(np.concatenate([self._last[1], tokens]), frames)
        else:
            self.flicker += flicker(tokens, batch)
        self._last = batch[-1:], tokens[-1:]


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    drives: Sequence[SampledDrive],
    *,
    perceptual: PerceptualLoss | None = None,
) -> Section:
    """Measure reconstructions on uint8 pixels, the codebook's use, flicker and speed.

    LPIPS (arXiv 1801.03924) needs `perceptual`. Means are over frames, their intervals over blocks
    of 16 neighbouring ones.
    """
    meters = [_DriveMeter(each, tokenizer, perceptual) for each in drives]
    with progress(sum(len(each.indices) for each in drives), "evaluate", "frames") as bar:
        for meter in meters:
            for batch in meter.sampled.batches(tokenizer.frame_size, _BATCH):
                meter.add(batch)
                bar.advance(len(batch))
    metrics = _metrics(tokenizer, meters)
    worst = sorted((shown for each in meters for shown in each.worst), key=lambda s: s.psnr_db)
    return Section(
        name="reconstruction",
        title="Reconstruction",
        text=_TEXT,
        metrics=metrics,
        parts=(
            _overall(metrics),
            _by_drive(metrics),
            *(
                photo(
                    side_by_side([shown.frame, shown.rebuilt], columns=2),
                    f"{shown.place}: {shown.psnr_db:.1f} dB. Left: the frame. Right: reconstructed",
                )
                for shown in worst[:_WORST]
            ),
        ),
    )


_TEXT = """Every frame is encoded, decoded and compared on 8-bit pixels. PSNR is averaged over
frames in dB; SSIM is that of Wang et al. 2004 (Gaussian windows, valid region).

Flicker: of the token cells whose pixels do not change from a frame to the next, the share whose
token changes all the same. Bits per frame: tokens times the bits of a code; the compression factor
is that of 24-bit pixels. The frames shown are the worst ones."""


def _metrics(tokenizer: Tokenizer, meters: Sequence[_DriveMeter]) -> dict[str, Any]:
    counts = torch.stack([meter.counts for meter in meters]).sum(0)
    frames = sum(meter._frames for meter in meters)
    bits = tokenizer.rows * tokenizer.cols * math.log2(tokenizer.codebook_size)
    means: dict[str, Any] = {}
    for name in meters[0].values:
        blocks = [value for meter in meters for value in meter.blocks(name)]
        every = np.concatenate([np.concatenate(meter.values[name]) for meter in meters])
        means[name] = {**interval(blocks), "mean": float(every.mean())}
    flickered = sum((meter.flicker for meter in meters[1:]), start=meters[0].flicker)
    return {
        "frames": frames,
        **means,
        "codebook": codebook_use(counts)._asdict(),
        "flicker": flickered.shares(),
        "bits_per_frame": bits,
        "compression_factor": tokenizer.height * tokenizer.width * _BITS_PER_PIXEL / bits,
        "frames_per_second": {
            name: frames / sum(meter.seconds[name] for meter in meters)
            for name in ("encode", "decode")
        },
        "drives": {
            meter.sampled.drive.id: {
                "frames": meter._frames,
                **{name: meter.mean(name) for name in meter.values},
                "codebook": codebook_use(meter.counts)._asdict(),
                "flicker": meter.flicker.shares()["flicker"],
            }
            for meter in meters
        },
    }


def _overall(metrics: dict[str, Any]) -> Table:
    codebook, speed = metrics["codebook"], metrics["frames_per_second"]
    rows: list[tuple[Cell, ...]] = [
        (name, metrics[name]["mean"], f"{metrics[name]['low']:.3f} to {metrics[name]['high']:.3f}")
        for name in ("psnr_db", "ssim", "lpips")
        if name in metrics
    ]
    rows += [
        ("share of the codes used", codebook["used"], None),
        ("perplexity of the codes", codebook["perplexity"], None),
        ("entropy of the codes, bits", codebook["entropy_bits"], None),
        ("flicker", metrics["flicker"]["flicker"], None),
        ("bits per frame", metrics["bits_per_frame"], None),
        ("compression factor", metrics["compression_factor"], None),
        ("frames encoded per second", speed["encode"], None),
        ("frames decoded per second", speed["decode"], None),
    ]
    return Table(caption="All drives", columns=("", "value", "95 % interval"), rows=tuple(rows))


def _by_drive(metrics: dict[str, Any]) -> Table:
    names = [name for name in ("psnr_db", "ssim", "lpips") if name in metrics]
    rows = tuple(
        (
            drive,
            found["frames"],
            *(found[name] for name in names),
            found["codebook"]["perplexity"],
            found["flicker"],
        )
        for drive, found in metrics["drives"].items()
    )
    columns = ("drive", "frames", *names, "perplexity", "flicker")
    return Table(caption="By drive", columns=columns, rows=rows)
