"""How tokens are drawn from what the model says: temperature, top-k, top-p, guidance, a seed."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

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
