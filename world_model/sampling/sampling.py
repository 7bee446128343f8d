"""Draw tokens from the model's logits, with temperature, top-k, top-p, guidance and a seed.

Draws are reproducible: the seed fixes a uniform random number for each token, which picks the token
by the inverse CDF.

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
    """Settings for drawing tokens from the model's distribution."""

    temperature: NonNegative = 1.0
    """Divisor of the logits; 0 takes the most probable token."""
    top_k: Count | None = None
    """Number of most probable tokens to keep; of equally probable ones, lower indices win."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability that the kept tokens must reach together.

    As few tokens as possible are kept, the most probable ones first. Of equally probable
    ones, lower indices win.
    """
    guidance: NonNegative = 1.0
    """g in `l_null + g (l - l_null)`: 1 is the plain model, more makes actions count more."""
    seed: Int64 = 0
    """Seed of the uniform random numbers."""

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p is set, so that some tokens may be excluded."""
        return self.top_k is not None or self.top_p is not None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the plain model's distribution."""
        return (self.temperature, self.guidance) == (1, 1) and not self.truncates


def truncated_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities [..., K] to draw from; excluded tokens have -inf."""
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

    `least` [..., 1] is the log-probability of the least probable token that stays. Of several
    tokens with this value, those with lower indices stay.
    """
    tied = log_probs == least
    left = count - (log_probs > least).sum(-1, keepdim=True)
    surplus = tied & (tied.cumsum(-1, dtype=torch.int32) > left)
    return log_probs.masked_fill(surplus | (log_probs < least), -torch.inf)


def uniforms(seed: int, samples: Tensor, frame: int, rows: int, cols: int) -> Tensor:
    """Return uniform random numbers in [0, 1), float32 [B, rows, cols], for `samples` int64 [B].

    Each number depends only on (seed, sample, frame, row, column). A chain of SplitMix64 steps, one
    per coordinate, hashes them; the upper 24 bits of the hash are the number. The numbers are
    computed on the CPU.
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
    """Return the tokens [...] that the inverse CDF of log_probs [..., K] has at `uniform` [...].

    The CDF sums tokens in the order of their indices. A rounding error in the logits therefore
    changes a draw only if the draw lies that close to the boundary between two tokens. Tokens of
    probability 0 are never drawn.
    """
    total = log_probs.exp().cumsum(-1)
    # `uniform` has 24 bits, so the product stays below the last sum even in float32.
    at = (uniform * total[..., -1]).unsqueeze(-1)
    tokens = torch.searchsorted(total, at, right=True).squeeze(-1)
    return tokens.clamp_(max=log_probs.shape[-1] - 1)  # NaN yields an arbitrary valid token
