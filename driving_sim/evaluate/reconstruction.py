"""How near a tokenizer's reconstructions are, and how much of its codebook they use."""

from collections.abc import Sequence
from typing import Any

import torch

from driving_sim.data.drive import SampledDrive
from driving_sim.engine.progress import progress
from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim
from driving_sim.tokenizer.tokenizer import Tokenizer

_BATCH = 16


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
