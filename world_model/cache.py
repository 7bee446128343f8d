"""Keys and values of the last frames: a preallocated ring of whole frames, batched.

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
    """What frames t-W+1..t of B sequences left behind: passes read it and write into it.

    Frame t overwrites frame t-W, nothing is recomputed. Memory is constant. Keys are stored rotated
    by their absolute frame number. Use: `begin_frame`, then `logits` for each pass over consecutive
    slots. Device and number format, in which torch computes, are those of `tables.output`.
    """

    exact = False
    """Whether passes give a sequence the same bits whatever other sequences are with it."""

    def __init__(self, model: Transformer, tables: Tables) -> None:
        self.model, self.tables = model, tables
        self.device, self.dtype = tables.output.device, tables.output.dtype
        self.slots, self.frames = model.order.slots, model.config.context_frames
        self.frame = -1
        """Number of the frame being written, from 0; -1 before the first."""

    @abstractmethod
    def advance(self) -> None:
        """Make the next frame the current one; what its place held is out of sight at once."""

    @abstractmethod
    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave, x [B, n, D]; return logits float32 [B, n', K].

        `rotary` are the slots' cosines and sines; n' of the slots predict something.
        """

    @abstractmethod
    def branch(self, rows: Tensor) -> Self:
        """Return a cache whose sequence i goes on from this one's sequence `rows[i]`."""

    def begin_frame(
        self, previous: Tensor, actions: Tensor, valid: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Begin a frame; return what its slots know before its own tokens, and their rotary angles.

        The former is [B, S, D]: see `Transformer.frame_base`. Where passes are `exact`, torch
        computes it one sequence at a time, for it rounds a batch of them differently than one: so
        that a future is the same, to the last bit, alone and among others.
        """
        self.advance()
        given = [each[:, None] for each in (previous, actions, valid)]
        sequences = (
            zip(*(torch.split(each, 1) for each in given), strict=True) if self.exact else [given]
        )
        bases = [self.model.frame_base(self.tables, *one)[:, 0] for one in sequences]
        frame = torch.tensor([self.frame], device=bases[0].device)
        return torch.cat(bases), self.model.rotary(frame)


class RingCache(Cache):
    """A ring of keys and values for the passes of torch."""

    def __init__(self, model: Transformer, tables: Tables, batch: int) -> None:
        super().__init__(model, tables)
        config, zeros = model.config, tables.output.new_zeros
        channels = config.width // config.heads
        shape = (config.layers, batch, config.kv_heads, self.frames * self.slots, channels)
        self.keys, self.values = zeros(shape), zeros(shape)
        self._causal = tables.output.new_full((self.slots, self.slots), -torch.inf).triu(1)
        self._mask = zeros(self.slots, self.frames * self.slots)

    def advance(self) -> None:
        """Make the next frame the current one; what its place held is out of sight at once."""
        self._mask[:, self._place()] = 0
        self.frame += 1
        self._mask[:, self._place()] = self._causal

    def _place(self) -> slice:
        begin = self.frame % self.frames * self.slots
        return slice(begin, begin + self.slots)

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave, x [B, n, D]; return logits float32 [B, n', K]."""
        begin = self._place().start
        self._write = slice(begin + wave.start, begin + wave.stop)
        # Until the ring is full, what follows the pass was never written.
        full = self.frame >= self.frames
        self._read = slice(0, self.frames * self.slots if full else begin + wave.stop)
        group = self.model.config.heads // self.model.config.kv_heads
        self._pass_mask = self._mask[wave.start : wave.stop, self._read].repeat(group, 1)
        hidden = self.model.hidden(x, rotary, past=self)[:, wave.first - wave.start :]
        return F.linear(hidden, self.tables.output).float()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of a pass; return what its slots see of the ring [B, n, D].

        `q` [B, H, n, E], `k` and `v` [B, G, n, E].
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self._write] = k
        values[:, :, self._write] = v
        # The query heads of a group become rows of one query: no kernel needs to know of groups.
        groups = keys.shape[1]
        seen = F.scaled_dot_product_attention(
            rearrange(q, "b (g m) n e -> b g (m n) e", g=groups).to(keys.dtype),
            keys[:, :, self._read],
            values[:, :, self._read],
            attn_mask=self._pass_mask,
        )
        return rearrange(seen, "b g (m n) e -> b n (g m e)", n=q.shape[2]).to(q.dtype)

    def branch(self, rows: Tensor) -> Self:
        """Return a copy whose sequence i goes on from this cache's sequence `rows[i]`."""
        copy = type(self)(self.model, self.tables, len(rows))
        filled = min(self.frame + 1, self.frames) * self.slots
        rows = rows.to(self.device)
        copy.keys[:, :, :, :filled] = self.keys[:, rows, :, :filled]
        copy.values[:, :, :, :filled] = self.values[:, rows, :, :filled]
        copy._mask.copy_(self._mask)
        copy.frame = self.frame
        return copy


def encode_frame(
    cache: Cache,
    tokens: Tensor,
    previous: Tensor,
    actions: Tensor,
    valid: Tensor,
    *,
    judge: bool = True,
) -> Tensor:
    """Add one whole known frame to the cache, in one pass.

    `tokens` and `previous` [B, P] (K where there is no frame before), `actions` and `valid`
    [B, 2]. Returns the logits [B, P, K] of each token, or none of them without `judge`.
    """
    model, slots = cache.model, cache.slots
    base, rotary = cache.begin_frame(previous, actions, valid)
    padded = F.pad(tokens, (0, 1), value=model.grid.codebook_size)
    x = base + F.embedding(padded[:, model.source], cache.tables.token)
    logits = cache.logits(x, rotary, Wave(0, slots, 0 if judge else slots))
    return logits[:, model.slot_of_token] if judge else logits
