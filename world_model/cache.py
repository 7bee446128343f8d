"""Keys and values of the last frames: a preallocated ring of whole frames, batched.

Axes: L layers, B batch, H query heads, G key heads, S slots per frame, W frames of context,
E channels of a head, n slots of a pass.
"""

from typing import Protocol, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.world_model.order import Wave
from driving_sim.world_model.transformer import Attention, Tables, Transformer


class RingCache:
    """What frames t-W+1..t left behind; frame t overwrites frame t-W, nothing is recomputed.

    Memory is constant. Keys are stored rotated by their absolute frame number. Use: `begin_frame`,
    then `logits` for each pass over consecutive slots. Device and number format are those of
    `tables.output`.
    """

    exact = False

    def __init__(self, model: Transformer, tables: Tables, batch: int) -> None:
        config = model.config
        self.model, self.tables = model, tables
        device, dtype = self.device, self.dtype = tables.output.device, tables.output.dtype
        self.slots, self.frames = model.order.slots, config.context_frames
        channels = config.width // config.heads
        shape = (config.layers, batch, config.kv_heads, self.frames * self.slots, channels)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        hidden = torch.full((self.slots, self.slots), -torch.inf, device=device, dtype=dtype)
        self._causal = hidden.triu(1)
        self._mask = torch.zeros(self.slots, self.frames * self.slots, device=device, dtype=dtype)
        self.frame = -1
        """Number of the frame being written, from 0; -1 before the first."""

    def begin_frame(self) -> None:
        """Make the next frame the current one; what its place held is out of sight at once."""
        self._mask[:, self._place()] = 0
        self.frame += 1
        self._mask[:, self._place()] = self._causal

    def _place(self) -> slice:
        begin = self.frame % self.frames * self.slots
        return slice(begin, begin + self.slots)

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave, x [B, n, D]; return logits float32 [B, n', K].

        `rotary` are the slots' cosines and sines; n' of the slots predict something.
        """
        self.begin_pass(wave.start, wave.stop)
        hidden = self.model.hidden(x, rotary, self.attend)[:, wave.first - wave.start :]
        return F.linear(hidden, self.tables.output).float()

    def begin_pass(self, start: int, stop: int) -> None:
        """The next `attend` of each layer brings slots `start` to `stop` of the current frame."""
        begin = self._place().start
        self._write = slice(begin + start, begin + stop)
        # Until the ring is full, what follows the pass was never written.
        full = self.frame >= self.frames
        self._read = slice(0, self.frames * self.slots if full else begin + stop)
        group = self.model.config.heads // self.model.config.kv_heads
        self._pass_mask = self._mask[start:stop, self._read].repeat(group, 1)

    def attend(
        self, layer: int, attention: Attention, qkv: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Store the keys and values of a pass; return what its slots see of the ring [B, n, D]."""
        q, k, v = attention.heads(qkv, rotary)
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
        rows = rows.to(self.keys.device)
        copy.keys[:, :, :, :filled] = self.keys[:, rows, :, :filled]
        copy.values[:, :, :, :filled] = self.values[:, rows, :, :filled]
        copy._mask.copy_(self._mask)
        copy.frame = self.frame
        return copy


class Cache(Protocol):
    """What passes need of a cache; see `RingCache`."""

    model: Transformer
    tables: Tables
    device: torch.device
    dtype: torch.dtype
    """The number format that torch computes in: passes too, unless they are compiled."""
    exact: bool
    """Whether passes give a sequence the same bits whatever other sequences are with it."""
    frame: int

    def begin_frame(self) -> None:
        """Make the next frame the current one."""
        ...

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave; return the logits of those that predict something."""
        ...

    def branch(self, rows: Tensor) -> "Cache":
        """Return a cache whose sequence i goes on from this one's sequence `rows[i]`."""
        ...


def cached_frame_base(cache: Cache, previous: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
    """Return what a frame's slots know before its own tokens, [B, S, D]: see `Transformer`.

    Where the passes are `exact`, torch computes this one sequence at a time, for it rounds a batch
    of them differently than one: so that a future is the same, to the last bit, alone and among
    others.
    """
    given = [each[:, None] for each in (previous, actions, valid)]
    if not cache.exact:
        return cache.model.frame_base(cache.tables, *given)[:, 0]
    sequences = zip(*(torch.split(each, 1) for each in given), strict=True)
    return torch.cat([cache.model.frame_base(cache.tables, *one) for one in sequences])[:, 0]


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
    cache.begin_frame()
    model, tables = cache.model, cache.tables
    base = cached_frame_base(cache, previous, actions, valid)
    padded = F.pad(tokens, (0, 1), value=model.grid.codebook_size)
    x = base + F.embedding(padded[:, model.source], tables.token)
    rotary = model.rotary(torch.tensor([cache.frame], device=x.device))
    slots = model.order.slots
    logits = cache.logits(x, rotary, Wave(0, slots, 0 if judge else slots))
    return logits[:, model.slot_of_token] if judge else logits
