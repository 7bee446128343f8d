"""Draw a frame's tokens wave by wave: one cached pass gives the logits of a whole wave.

Axes: B sequences (streams * F), F futures, P = rows * cols tokens, S slots, K codes, n tokens of a
wave, A = 2 channels.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.engine.precision import autocast
from driving_sim.world_model.cache import Cache
from driving_sim.world_model.kernels.decode import NativeCache
from driving_sim.world_model.sampling.sampling import (
    Sampling,
    draw,
    truncated_log_probs,
    uniforms,
)

Choose = Callable[[Tensor, Tensor], Tensor]
"""Type of a function that chooses the n tokens of a wave.

The function takes their logits, float32 [B, n, K], and their raster indices [n]. It returns the
tokens [B, n].
"""


@dataclass(frozen=True, slots=True)
class FrameSample:
    """One sampled frame of each future."""

    tokens: Tensor
    """int64 [F, rows, cols]."""
    log_probs: Tensor
    """float32 [F, rows, cols], in nats, under the plain model (temperature 1, no guidance)."""
    sampling_log_probs: Tensor
    """float32 [F, rows, cols], in nats, under the distribution that tokens were drawn from."""
    entropy: Tensor
    """float32 [F, rows, cols], in nats: entropy of the plain model's distribution of each token."""


class WavePasses:
    """Continues B sequences frame by frame, with one cached pass per wave.

    The caller chooses the tokens from the logits: it may draw them, take known ones, or decode them
    from a compressed file. The same tokens give the same logits, to the last bit, in every case.
    """

    def __init__(self, cache: Cache, tokens: Tensor) -> None:
        """Continue the sequences in `cache`, whose last frames have the tokens `tokens` [B, P]."""
        self.cache, self.tokens = cache, tokens
        model = self.model = cache.model
        self._sources = [model.source[wave.start : wave.stop] for wave in model.order.waves]
        self._targets = [model.target[wave.first : wave.stop] for wave in model.order.waves]

    @torch.inference_mode()
    def step(self, actions: Tensor, valid: Tensor, choose: Choose) -> Tensor:
        """Add one frame to each sequence; return the frame's tokens [B, P].

        `actions` [B, 2] lead to the frame, and `valid` [B, 2] says which of them are known. Calls
        `choose` in order for each wave that predicts tokens.
        """
        none, waves = self.model.grid.codebook_size, self.model.order.waves
        tokens = F.pad(torch.full_like(self.tokens, none), (0, 1), value=none)
        with autocast(self.cache.device, self.cache.dtype):
            base, (cos, sin) = self.cache.begin_frame(self.tokens, actions, valid)
            for wave, source, target in zip(waves, self._sources, self._targets, strict=True):
                span = slice(wave.start, wave.stop)
                x = base[:, span] + F.embedding(tokens[:, source], self.cache.tables.token)
                logits = self.cache.logits(x, (cos[span], sin[span]), wave)
                if wave.first < wave.stop:
                    tokens[:, target] = choose(logits, target)
        self.tokens = tokens[:, :-1]
        return self.tokens


class FrameSampler:
    """Continues F futures frame by frame, and draws each frame's tokens wave by wave."""

    def __init__(
        self,
        cache: Cache,
        last: Tensor,
        *,
        samples: Tensor,
        sampling: Sampling,
        contexts: Tensor | None = None,
    ) -> None:
        """Start F futures from the C sequences in `cache`, whose last frames have tokens `last`.

        `last` is [C, P]. `samples` int64 [F] is the sample number of each future. Futures with the
        same sample number get the same random numbers. `contexts` int64 [F] says which sequence
        each future continues. By default, all futures continue the first sequence.
        """
        contexts = torch.zeros_like(samples) if contexts is None else contexts
        self.model, self.samples = cache.model, samples
        self.frames = torch.zeros_like(samples)
        """Number of frames that each future has so far, int64 [F]."""
        rows = contexts.repeat(_streams(sampling))
        self._set(sampling, WavePasses(cache.branch(rows), last[rows.to(last.device)]))

    def _set(self, sampling: Sampling, passes: WavePasses) -> None:
        self.sampling, self.streams, self.passes = sampling, _streams(sampling), passes

    def copy(self) -> Self:
        """Return a copy that goes on independently, and draws the same to the last bit."""
        return self._continued(self.sampling, self.passes.cache.copy(), self.passes.tokens)

    def branched(self, branches: int) -> Self:
        """Return a copy with `branches` * F futures: future b * F + f goes on from future f.

        The branches of a future get the same random numbers.
        """
        count = len(self.samples)
        rows = torch.arange(self.streams * count).view(self.streams, 1, count)
        rows = rows.expand(-1, branches, -1).flatten()
        tokens = self.passes.tokens[rows.to(self.passes.tokens.device)]
        other = self._continued(self.sampling, self.passes.cache.branch(rows), tokens)
        other.samples, other.frames = self.samples.repeat(branches), self.frames.repeat(branches)
        return other

    def resampled(self, sampling: Sampling) -> Self:
        """Return a copy with other sampling settings.

        If guidance begins, its second stream continues from the futures so far.
        """
        if _streams(sampling) == self.streams:
            return self._continued(sampling, self.passes.cache.copy(), self.passes.tokens)
        rows = torch.arange(len(self.samples)).repeat(_streams(sampling))
        tokens = self.passes.tokens[rows.to(self.passes.tokens.device)]
        return self._continued(sampling, self.passes.cache.branch(rows), tokens)

    def _continued(self, sampling: Sampling, cache: Cache, tokens: Tensor) -> Self:
        other = copy.copy(self)
        other.frames = self.frames.clone()
        other._set(sampling, WavePasses(cache, tokens))
        return other

    @torch.inference_mode()
    def restart(self, futures: Tensor, cache: Cache, last: Tensor, samples: Tensor) -> None:
        """Let `futures` int64 [C] continue the C sequences in `cache` instead of their own.

        `cache` is at the same frame as this sampler's, and `last` [C, P] are the tokens of its last
        frames. `samples` int64 [C] are the futures' new sample numbers.
        """
        count = len(self.samples)
        tokens = self.passes.tokens.clone()
        for stream in range(self.streams):
            rows = futures + stream * count
            self.passes.cache.replace(rows, cache)
            tokens[rows] = last
        self.passes.tokens = tokens
        self.samples, self.frames = self.samples.clone(), self.frames.clone()
        self.samples[futures], self.frames[futures] = samples, 0

    @torch.inference_mode()
    def step(self, actions: Tensor, valid: Tensor) -> FrameSample:
        """Sample the next frame of each future.

        `actions` [F, 2] (m/s, rad) lead to this frame, and `valid` [F, 2] says which are known.
        """
        grid, sampling, passes = self.model.grid, self.sampling, self.passes
        numbers = uniforms(sampling.seed, self.samples, self.frames, grid.rows, grid.cols)
        uniform = rearrange(numbers, "b r c -> b (r c)").to(actions.device)
        if self.streams == 2:
            # Guidance needs a second stream, in which all actions are unknown.
            actions = actions.repeat(2, 1)
            valid = torch.cat([valid, torch.zeros_like(valid)])
        if isinstance(passes.cache, NativeCache) and not sampling.truncates:
            with autocast(passes.cache.device, passes.cache.dtype):
                passes.tokens, scores = passes.cache.draw_frame(
                    *passes.cache.begin_frame(passes.tokens, actions, valid),
                    uniform,
                    streams=self.streams,
                    temperature=sampling.temperature,
                    min_p=sampling.min_p,
                    guidance=sampling.guidance,
                )
        else:
            scores = torch.zeros(3, *uniform.shape, device=uniform.device)

            def choose(logits: Tensor, target: Tensor) -> Tensor:
                tokens, scores[:, :, target] = self._choose(logits, uniform[:, target])
                return tokens if self.streams == 1 else tokens.repeat(self.streams, 1)

            passes.step(actions, valid, choose)
        self.frames = self.frames + 1
        shape = {"r": grid.rows, "c": grid.cols}
        return FrameSample(
            rearrange(passes.tokens[: len(uniform)], "f (r c) -> f r c", **shape).clone(),
            *rearrange(scores, "score f (r c) -> score f r c", **shape),
        )

    def _choose(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw tokens from logits [streams * F, n, K]; return tokens [F, n] and scores [3, F, n].

        The scores are the tokens' log-probabilities under the plain model (index 0) and under the
        distribution that they are drawn from (index 1), and the plain model's entropy (index 2).
        """
        plain = logits[: len(self.samples)]
        mixed = plain
        if self.streams == 2:
            null = logits[len(self.samples) :]
            mixed = null + self.sampling.guidance * (plain - null)
        drawn_from = truncated_log_probs(mixed, self.sampling)
        tokens = draw(drawn_from, uniform)
        exact = drawn_from if self.sampling.is_plain else plain.log_softmax(-1)
        index = tokens.unsqueeze(-1)
        scores = [log_probs.gather(-1, index).squeeze(-1) for log_probs in (exact, drawn_from)]
        return tokens, torch.stack([*scores, -(exact.exp() * exact).sum(-1)])


def _streams(sampling: Sampling) -> int:
    """Return the number of cached streams of a future: guidance needs a second one."""
    return 1 if sampling.guidance == 1 else 2
