"""Sampling frames wave by wave: temperature, top-k, top-p, guidance, reproducible draws.

Axes: B futures, P = rows * cols tokens, S slots, K codes, n tokens of a wave, A = 2 channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from driving_sim.engine.config import Count, Int64, NonNegative, config
from driving_sim.engine.precision import autocast
from driving_sim.world_model.cache import Cache
from driving_sim.world_model.kernels.decode import NativeCache

Choose = Callable[[Tensor, Tensor], Tensor]
"""(logits float32 [B, n, K] of a wave, raster numbers [n] of its tokens) -> tokens [B, n]."""


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


@dataclass(frozen=True, slots=True)
class FrameSample:
    """One sampled frame of each future."""

    tokens: Tensor
    """int64 [B, rows, cols]."""
    log_probs: Tensor
    """float32 [B, rows, cols], nats: under the plain model (temperature 1, no guidance)."""
    sampling_log_probs: Tensor
    """float32 [B, rows, cols], nats: under the distribution that was drawn from."""


def _signed(value: int) -> int:
    """The int64 with the bits of `value`: tensors have no unsigned arithmetic, but they wrap."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right filling with zeros, as unsigned integers do."""
    return torch.bitwise_and(x >> by, 2 ** (64 - by) - 1)


def uniforms(seed: int, samples: Tensor, frame: int, rows: int, cols: int) -> Tensor:
    """Return float32 numbers in [0, 1) for `samples` int64 [B], shaped [B, rows, cols].

    Each is a function of (seed, sample, frame, row, column) only: a chain of SplitMix64 steps, one
    per coordinate, the upper 24 bits of which are the number. Computed on the CPU.
    """
    hashed = _mixed(torch.tensor(_signed(seed)))
    for coordinate in (
        samples.cpu()[:, None, None],
        torch.tensor(frame),
        torch.arange(rows)[:, None],
        torch.arange(cols),
    ):
        hashed = _mixed(hashed + (coordinate + 1) * _signed(0x9E3779B97F4A7C15))
    numbers: Tensor = _shifted(hashed, 40).float() / 2**24
    return numbers


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


class WavePasses:
    """Continues B sequences frame by frame: one cached pass per wave, whoever chooses its tokens.

    The same passes serve whoever draws tokens, knows them or reads them: the logits are the same to
    the last bit.
    """

    def __init__(self, cache: Cache, tokens: Tensor) -> None:
        """Start after the frames `tokens` [B, P] that the B sequences of `cache` end with."""
        self.cache, self.tokens = cache, tokens
        model = self.model = cache.model
        self._sources = [model.source[wave.start : wave.stop] for wave in model.order.waves]
        self._targets = [model.target[wave.first : wave.stop] for wave in model.order.waves]

    @torch.inference_mode()
    def step(self, actions: Tensor, valid: Tensor, choose: Choose) -> Tensor:
        """Return the tokens [B, P] of the frame that `actions` and `valid` [B, 2] lead to.

        `choose` is called for one wave after the other.
        """
        with autocast(self.cache.device, self.cache.dtype):
            return self._step(*self.cache.begin_frame(self.tokens, actions, valid), choose)

    @torch.inference_mode()
    def draw(
        self, actions: Tensor, valid: Tensor, uniform: Tensor, streams: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor] | None:
        """As `step`, with log-probabilities [2, F, P], where compiled passes can draw; else None.

        `uniform` [F, P] are the draws' numbers; B = streams * F: see `NativeCache.draw_frame`.
        """
        if not isinstance(self.cache, NativeCache) or sampling.truncates:
            return None
        with autocast(self.cache.device, self.cache.dtype):
            self.tokens, log_probs = self.cache.draw_frame(
                *self.cache.begin_frame(self.tokens, actions, valid),
                uniform,
                streams=streams,
                temperature=sampling.temperature,
                guidance=sampling.guidance,
            )
        return self.tokens, log_probs

    def _step(self, base: Tensor, rotary: tuple[Tensor, Tensor], choose: Choose) -> Tensor:
        cos, sin = rotary
        none = self.model.grid.codebook_size
        tokens = F.pad(torch.full_like(self.tokens, none), (0, 1), value=none)
        waves = self.model.order.waves
        for wave, source, target in zip(waves, self._sources, self._targets, strict=True):
            span = slice(wave.start, wave.stop)
            x = base[:, span] + F.embedding(tokens[:, source], self.cache.tables.token)
            logits = self.cache.logits(x, (cos[span], sin[span]), wave)
            if wave.first < wave.stop:
                tokens[:, target] = choose(logits, target)
        self.tokens = tokens[:, :-1]
        return self.tokens


class FrameSampler:
    """Continues B futures frame by frame, drawing the tokens of one wave after the other."""

    def __init__(
        self,
        cache: Cache,
        last: Tensor,
        *,
        samples: Tensor,
        sampling: Sampling,
        contexts: Tensor | None = None,
    ) -> None:
        """Start after the frames `last` [C, P] that the C sequences of `cache` end with.

        `samples` int64 [B] numbers the draws: futures with the same number share theirs.
        `contexts` int64 [B] says which sequence each future goes on from: the first by default.
        """
        self.model, self.sampling, self.samples = cache.model, sampling, samples
        self.streams = 1 if sampling.guidance == 1 else 2
        contexts = torch.zeros_like(samples) if contexts is None else contexts
        rows = contexts.repeat(self.streams)
        self.passes = WavePasses(cache.branch(rows), last[rows.to(last.device)])
        self.frame = 0

    @torch.inference_mode()
    def step(self, actions: Tensor, valid: Tensor) -> FrameSample:
        """Sample the frame that `actions` [B, 2] (m/s, rad; `valid` [B, 2]) lead to."""
        batch, device = len(self.samples), actions.device
        uniform = self._uniforms(device)
        if self.streams == 2:
            # The second stream knows no action.
            actions = actions.repeat(2, 1)
            valid = torch.cat([valid, torch.zeros_like(valid)])
        drawn = self.passes.draw(actions, valid, uniform, self.streams, self.sampling)
        tokens, scores = drawn or self._step(actions, valid, uniform)
        self.frame += 1
        shape = {"r": self.model.grid.rows, "c": self.model.grid.cols}
        return FrameSample(
            rearrange(tokens[:batch], "b (r c) -> b r c", **shape),
            *rearrange(scores, "two b (r c) -> two b r c", **shape),
        )

    def _step(self, actions: Tensor, valid: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.zeros(2, *uniform.shape, device=uniform.device)

        def choose(logits: Tensor, target: Tensor) -> Tensor:
            tokens, scores[:, :, target] = self._choose(logits, uniform[:, target])
            return tokens if self.streams == 1 else tokens.repeat(self.streams, 1)

        return self.passes.step(actions, valid, choose), scores

    def _uniforms(self, device: torch.device) -> Tensor:
        grid = self.model.grid
        numbers = uniforms(self.sampling.seed, self.samples, self.frame, grid.rows, grid.cols)
        return rearrange(numbers, "b r c -> b (r c)").to(device)

    def _choose(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B, n] and log-probabilities [2, B, n] of logits [streams * B, n, K]."""
        plain = logits[: len(self.samples)]
        mixed = plain
        if self.streams == 2:
            null = logits[len(self.samples) :]
            mixed = null + self.sampling.guidance * (plain - null)
        drawn_from = truncated_log_probs(mixed, self.sampling)
        tokens = draw(drawn_from, uniform)
        exact = drawn_from if self.sampling.is_plain else plain.log_softmax(-1)
        index = tokens.unsqueeze(-1)
        both = [each.gather(-1, index).squeeze(-1) for each in (exact, drawn_from)]
        return tokens, torch.stack(both)
