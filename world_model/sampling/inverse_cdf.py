"""Reproducible draws: a uniform number for each token, and the token that it falls to.

Axes: B futures, K codes.
"""

import numpy as np
import torch
from torch import Tensor

from driving_sim.data.hashing import mixed


def uniforms(seed: int, samples: Tensor, frame: int, rows: int, cols: int) -> Tensor:
    """Return float32 numbers in [0, 1) for `samples` int64 [B], shaped [B, rows, cols].

    Each is a function of (seed, sample, frame, row, column) only: a chain of SplitMix64 steps, one
    per coordinate, the upper 24 bits of which are the number. Computed on the CPU.
    """
    hashed = mixed(np.array([seed % 2**64], np.uint64))
    for coordinate in (
        samples.cpu().numpy()[:, None, None],
        np.array([frame]),
        np.arange(rows)[:, None],
        np.arange(cols),
    ):
        step = (coordinate + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        hashed = mixed(hashed + step)
    return torch.from_numpy((hashed >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens [...] at `uniform` [...] of the inverse CDF of log_probs [..., K].

    Tokens follow in the order of their indices, so that rounding errors in the logits move a draw
    only where it lies within them of a boundary. A token of probability 0 is never drawn.
    """
    total = log_probs.exp().cumsum(-1)
    # uniform has 24 bits: the product rounds to less than the last sum, even in float32.
    at = (uniform * total[..., -1]).unsqueeze(-1)
    found = torch.searchsorted(total, at, right=True).squeeze(-1)
    return found.clamp_(max=log_probs.shape[-1] - 1)  # of what is not a number, some token
