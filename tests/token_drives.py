"""Tiny token stores and tokenizers: 3 x 4 tokens of 9 codes, and drives whose steering matters."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from driving_sim.data.timing import gaps
from driving_sim.data.token_store import StoreInfo, TokenStore
from driving_sim.data.token_store_plan import PlannedDrive, StorePlan
from driving_sim.data.token_store_writer import TokenStoreWriter
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.tokenizer import Tokenizer

ROWS, COLS, LEVELS = 3, 4, (3, 3)
FPS = 8.0


def tiny_tokenizer(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    config = AutoencoderConfig(
        height=16 * ROWS,
        width=16 * COLS,
        levels=LEVELS,
        widths=(16, 16, 16),
        blocks=(1, 1, 1),
        attention_blocks=0,
        head_size=16,
    )
    return Tokenizer(Autoencoder(config))


def turning_drive(frames: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [T, r, c], actions and validity: each frame is the last one, shifted by steering.

    A sixth of the tokens is drawn anew each time.
    """
    rng = np.random.default_rng(seed)
    actions = np.stack([rng.uniform(3, 9, frames), rng.choice([-0.3, 0.0, 0.3], frames)], 1)
    tokens = [rng.integers(9, size=(ROWS, COLS))]
    for speed_steering in actions[:-1]:
        shifted = np.roll(tokens[-1], int(np.sign(speed_steering[1])), axis=1)
        anew = rng.random((ROWS, COLS)) < 1 / 6
        tokens.append(np.where(anew, rng.integers(9, size=(ROWS, COLS)), shifted))
    return np.stack(tokens), actions.astype(np.float32), np.ones((frames, 2), np.bool_)


def write_store(
    out: Path,
    lengths: Sequence[int] = (40, 40, 40),
    *,
    fingerprint: str = "f00d",
    gap_at: int | None = None,
) -> TokenStore:
    """Drives "0", "1", ... of `turning_drive`; with `gap_at`, a gap in time before that frame."""
    info = StoreInfo(
        tokenizer_fingerprint=fingerprint,
        rows=ROWS,
        cols=COLS,
        codebook_size=9,
        fps=FPS,
        steering_kind="road_wheel",
        levels=LEVELS,
    )
    planned = tuple(PlannedDrive(id=str(n), frames=frames) for n, frames in enumerate(lengths))
    with TokenStoreWriter(out, StorePlan(info=info, drives=planned)) as writer:
        for n, frames in enumerate(lengths):
            times = np.arange(frames) / FPS
            if gap_at is not None:
                times[gap_at:] += 1.0
            tokens, actions, valid = turning_drive(frames, n)
            writer.add(str(n), tokens, actions, valid, times, gaps(times))
        writer.finish()
    return TokenStore(out)
