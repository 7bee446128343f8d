"""Draw tokens from the model's logits: temperature, min-p, top-k, top-p, guidance and a seed.

Draws are reproducible: the seed fixes a uniform random number for each token, and the inverse CDF
maps this number to the token.

Axes: B futures, K codes.
"""

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from driving_sim.data.hashing import mixed
from driving_sim.engine.config import Count, Int64, NonNegative, Share, config


@config
class Sampling:
    """Settings for drawing tokens from the model's distribution."""

    temperature: NonNegative = 1.0
    """Divisor of the logits; 0 always chooses the most probable token."""
    min_p: Share = 0.0
    """Least probability of the tokens to keep, as a share of the most probable token's.

    Where the model is sure, this excludes what it hardly believes in; where it is not, it excludes
    little (Nguyen et al. 2024, arXiv 2407.01082). 0 keeps all tokens.
    """
    top_k: Count | None = None
    """Number of most probable tokens to keep; ties are broken in favour of lower indices."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Minimum total probability of the tokens to keep.

    Keeps the smallest number of most probable tokens that reach it. Ties are broken in favour of
    lower indices.
    """
    guidance: NonNegative = 1.0
    """Guidance strength g; logits become `l_null + g (l - l_null)`.

    `l` are the logits with known actions, and `l_null` those with unknown actions. g = 1 gives the
    plain model. A larger g strengthens the effect of the actions.
    """
    seed: Int64 = 0
    """Seed of the uniform random numbers."""

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p is set, which may exclude some tokens."""
        return self.top_k is not None or self.top_p is not None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the plain model's distribution."""
        plain = self.temperature == 1 and self.guidance == 1 and self.min_p == 0
        return plain and not self.truncates


def truncated_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities [..., K] to draw from, which are -inf for excluded tokens."""
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    tempered = logits if sampling.temperature == 1 else logits / sampling.temperature
    log_probs = tempered.log_softmax(-1)
    codes = logits.shape[-1]
    if sampling.min_p > 0:
        least = log_probs.amax(-1, keepdim=True) + math.log(sampling.min_p)
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf).log_softmax(-1)
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
    """Keep the `count` largest of log_probs [..., K]; set the rest to -inf.

    `least` [..., 1] is the smallest value that is kept. If there are more tokens with this value
    than can be kept, those with lower indices are kept.
    """
    tied = log_probs == least
    left = count - (log_probs > least).sum(-1, keepdim=True)
    surplus = tied & (tied.cumsum(-1, dtype=torch.int32) > left)
    return log_probs.masked_fill(surplus | (log_probs < least), -torch.inf)


def uniforms(seed: int, samples: Tensor, frames: Tensor, rows: int, cols: int) -> Tensor:
    """Return uniform random numbers in [0, 1), float32 [F, rows, cols].

    `samples` int64 [F] are the futures' sample numbers, and `frames` int64 [F] the numbers of the
    frames. Each random number depends only on (seed, sample, frame, row, column). A chain of
    SplitMix64 steps hashes these five integers, and the upper 24 bits of the hash give the number.
    All numbers are computed on the CPU.
    """
    hashed = mixed(np.array([seed % 2**64], np.uint64))
    for coordinate in (
        samples.cpu().numpy()[:, None, None],
        frames.cpu().numpy()[:, None, None],
        np.arange(rows)[:, None],
        np.arange(cols),
    ):
        step = (coordinate + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        hashed = mixed(hashed + step)
    return torch.from_numpy((hashed >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens [...] from log_probs [..., K], given random numbers `uniform` [...] in [0, 1).

    Evaluates the inverse CDF at `uniform`; the CDF sums probabilities in the order of the tokens'
    indices. A small error in the logits therefore changes the token only if `uniform` is very close
    to the boundary between two tokens. Tokens with probability 0 are never drawn.
    """
    total = log_probs.exp().cumsum(-1)
    # `at` must stay below the last sum, because otherwise the search would go past the last code.
    # It does so even when rounded to float32, because `uniform` is below 1 and has only 24 bits.
    at = (uniform * total[..., -1]).unsqueeze(-1)
    tokens = torch.searchsorted(total, at, right=True).squeeze(-1)
    # If a log-probability is NaN, the token is arbitrary; clamp it to a valid index.
    return tokens.clamp_(max=log_probs.shape[-1] - 1)
