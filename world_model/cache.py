"""A cache of the last frames' keys and values, in a ring buffer of fixed size.

Axes: L layers, B batch, H query heads, G key heads, S slots per frame, W frames of context,
E channels of a head, n slots of a pass.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.world_model.order import Wave
from driving_sim.world_model.transformer import Tables, Transformer


class Cache(ABC):
    """The keys and values of frames t-W+1..t of B sequences.

    Frame t is the current frame. It overwrites frame t-W, so memory is constant, and nothing is
    recomputed. Keys are stored rotated by their absolute frame number. torch's operations run on
    the device of `tables.output` and in its number format.

    For every frame, call `begin_frame` once. Then call `logits` for each pass. A pass computes
    either the slots of one wave, which are sampled together (see `order`), or the whole frame.
    """

    exact = False
    """Whether results are independent, to the last bit, of the other sequences in the batch."""

    def __init__(self, model: Transformer, tables: Tables, first: int = 0) -> None:
        """Begin with an empty ring; the first frame gets the number `first`, a multiple of W."""
        self.model, self.tables = model, tables
        self.device, self.dtype = tables.output.device, tables.output.dtype
        self.slots, self.frames = model.order.slots, model.config.context_frames
        self.first = first
        self.frame = first - 1
        """Number of the frame that is being written; `first` - 1 before the first frame."""

    @abstractmethod
    def advance(self) -> None:
        """Begin the next frame, and hide the old frame that it overwrites."""

    @abstractmethod
    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Add a wave's slots to the cache; return the logits of the slots that predict a token.

        Takes the summed inputs `x` [B, n, D] of the wave's n slots, and the cosines and sines
        [n, E / 2] of their rotary angles. Returns float32 logits [B, n', K] of the n' slots from
        `wave.first` on.
        """

    @abstractmethod
    def branch(self, rows: Tensor) -> Self:
        """Return a cache whose sequence i continues this cache's sequence `rows[i]`."""

    @abstractmethod
    def copy(self) -> Self:
        """Return a copy that goes on independently, and computes the same to the last bit."""

    @abstractmethod
    def replace(self, rows: Tensor, other: Self) -> None:
        """Replace the sequences `rows` with those of `other`, which is at the same frame.

        `other` must be new, not a branch, and contain at least W - 1 frames.
        """

    def begin_frame(
        self, previous: Tensor, actions: Tensor, valid: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Begin a frame; return the inputs and the rotary cosines and sines of its slots.

        The inputs [B, S, D] do not yet include the frame's own tokens; `Transformer.frame_base`
        computes them. Cosines and sines are [S, E / 2]. If the cache is `exact`, the inputs are
        computed for one sequence at a time, because in torch the rounding depends on the batch
        size.
        """
        self.advance()
        inputs = [tensor[:, None] for tensor in (previous, actions, valid)]
        sequences = (
            zip(*(torch.split(tensor, 1) for tensor in inputs), strict=True)
            if self.exact
            else [inputs]
        )
        bases = [self.model.frame_base(self.tables, *sequence)[:, 0] for sequence in sequences]
        frame = torch.tensor([self.frame], device=bases[0].device)
        return torch.cat(bases), self.model.rotary(frame)


class RingCache(Cache):
    """The cache that computes its passes with torch."""

    def __init__(self, model: Transformer, tables: Tables, batch: int, first: int = 0) -> None:
        super().__init__(model, tables, first)
        config, zeros = model.config, tables.output.new_zeros
        channels = config.width // config.heads
        shape = (config.layers, batch, config.kv_heads, self.frames * self.slots, channels)
        self.keys, self.values = zeros(shape), zeros(shape)
        self._causal = tables.output.new_full((self.slots, self.slots), -torch.inf).triu(1)
        self._mask = zeros(self.slots, self.frames * self.slots)

    def advance(self) -> None:
        """Begin the next frame, and hide the old frame that it overwrites."""
        self._mask[:, self._place()] = 0
        self.frame += 1
        self._mask[:, self._place()] = self._causal

    def _place(self) -> slice:
        begin = self.frame % self.frames * self.slots
        return slice(begin, begin + self.slots)

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Add a wave's slots to the cache; return the logits of the slots that predict a token."""
        begin = self._place().start
        self._write = slice(begin + wave.start, begin + wave.stop)
        # Until the ring is full, read only up to this pass: the rest has never been written.
        full = self.frame - self.first >= self.frames
        self._read = slice(0, self.frames * self.slots if full else begin + wave.stop)
        group = self.model.config.heads // self.model.config.kv_heads
        self._pass_mask = self._mask[wave.start : wave.stop, self._read].repeat(group, 1)
        hidden = self.model.hidden(x, rotary, past=self)[:, wave.first - wave.start :]
        return F.linear(hidden, self.tables.output).float()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a pass's keys and values; return the attention of its slots to the ring, [B, n, D].

        The queries `q` are [B, H, n, E]. The keys `k` and values `v` are [B, G, n, E].
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self._write] = k
        values[:, :, self._write] = v
        # Query heads that share a key head become additional rows of one head, because not every
        # attention kernel supports grouped queries.
        groups = keys.shape[1]
        attended = F.scaled_dot_product_attention(
            rearrange(q, "b (g m) n e -> b g (m n) e", g=groups).to(keys.dtype),
            keys[:, :, self._read],
            values[:, :, self._read],
            attn_mask=self._pass_mask,
        )
        return rearrange(attended, "b g (m n) e -> b n (g m e)", n=q.shape[2]).to(q.dtype)

    def branch(self, rows: Tensor) -> Self:
        """Return a copy whose sequence i continues this cache's sequence `rows[i]`."""
        copy = type(self)(self.model, self.tables, len(rows), self.first)
        filled = min(self.frame - self.first + 1, self.frames) * self.slots
        rows = rows.to(self.device)
        copy.keys[:, :, :, :filled] = self.keys[:, rows, :, :filled]
        copy.values[:, :, :, :filled] = self.values[:, rows, :, :filled]
        copy._mask.copy_(self._mask)
        copy.frame = self.frame
        return copy

    def copy(self) -> Self:
        """Return a copy that goes on independently."""
        return self.branch(torch.arange(self.keys.shape[1]))

    def replace(self, rows: Tensor, other: Self) -> None:
        """Replace the sequences `rows` with those of `other`, which is at the same frame."""
        self.keys[:, rows], self.values[:, rows] = other.keys, other.values


def encode_frame(
    cache: Cache,
    tokens: Tensor,
    previous: Tensor,
    actions: Tensor,
    valid: Tensor,
    *,
    judge: bool = True,
) -> Tensor:
    """Add a whole frame of known tokens to the cache in one pass; return the tokens' logits.

    Takes the frame's `tokens` [B, P], the tokens of the `previous` frame [B, P] (K if there is no
    previous frame), the `actions` [B, 2] that lead to the frame, and whether they are `valid`
    [B, 2]. Returns logits [B, P, K]. If `judge` is false, it computes no logits and returns an
    empty tensor.
    """
    model, slots = cache.model, cache.slots
    base, rotary = cache.begin_frame(previous, actions, valid)
    padded = F.pad(tokens, (0, 1), value=model.grid.codebook_size)
    x = base + F.embedding(padded[:, model.source], cache.tables.token)
    logits = cache.logits(x, rotary, Wave(0, slots, 0 if judge else slots))
    return logits[:, model.slot_of_token] if judge else logits
