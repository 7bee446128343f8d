"""How tokens are drawn from what the model says: temperature, top-k, top-p, guidance, a seed.

Draws are reproducible: a uniform number for each token, and the token that it falls to.

Axes: B futures, K codes.
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from driving_sim.data.hashing import mixed
from driving_sim.engine.config import Count, Int64, NonNegative, config


@config
class Sampling:
    """How tokens are drawn from the model's distribution."""

    temperature: NonNegative = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: Count | None = None
    """Keep only this many most probable tokens; ties go to the lower token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep only the smallest set of most probable tokens that together reach this probability; ties
    go to the lower token."""
    guidance: NonNegative = 1.0
    """g in `l_null + g (l - l_null)`: 1 is the plain model, more makes actions count more."""
    seed: Int64 = 0
    """Chooses the uniform numbers."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be cut off."""
        return self.top_k is not None or self.top_p is not None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return (self.temperature, self.guidance) == (1, 1) and not self.truncates


def truncated_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities [..., K] that tokens are drawn from, -inf where cut off."""
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    tempered = logits if sampling.temperature == 1 else logits / sampling.temperature
    log_probs = tempered.log_softmax(-1)
    codes = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < codes:
        least = log_probs.topk(sampling.top_k, dim=-1).values[..., -1:]
        log_probs = _cut(log_probs, least, sampling.top_k).log_softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = log_probs.sort(dim=-1, descending=True).values
        too_few = (ordered.exp().cumsum(-1) < sampling.top_p).sum(-1, keepdim=True)
        needed = (too_few + 1).clamp_(max=codes)
        log_probs = _cut(log_probs, ordered.gather(-1, needed - 1), needed).log_softmax(-1)
    return log_probs


def _cut(log_probs: Tensor, least: Tensor, count: Tensor | int) -> Tensor:
    """Set all but the `count` most probable of log_probs [..., K] to -inf.

    `least` [..., 1] is the log-probability of the last one that stays; of those that have it, too,
    the lower tokens stay.
    """
    tied = log_probs == least
    left = count - (log_probs > least).sum(-1, keepdim=True)
    surplus = tied & (tied.cumsum(-1, dtype=torch.int32) > left)
    return log_probs.masked_fill(surplus | (log_probs < least), -torch.inf)


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
