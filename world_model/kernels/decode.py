"""Cached passes with frozen weights, compiled for this CPU if possible, and otherwise in torch.

In torch, a pass launches some 400 operations, most of which take longer to launch than to run. A
compiled pass is a single call to a function in `decode.cpp`.

Axes: as in `decode.cpp`, and F futures, P tokens of a frame.
"""

import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from driving_sim.engine.precision import resolve_precision
from driving_sim.world_model.cache import Cache, RingCache
from driving_sim.world_model.kernels.library import LANES, PAIRS, Structure, call, library
from driving_sim.world_model.kernels.operators import is_bounded
from driving_sim.world_model.order import Wave
from driving_sim.world_model.transformer import Block, Tables, Transformer


def is_supported(model: Transformer) -> bool:
    """Return whether this machine can run a model with compiled passes."""
    attentions = [block.attention for block in _blocks(model)]
    return (
        model.config.width // model.config.heads % PAIRS == 0
        and all(is_bounded(layer.q_norm.weight, layer.k_norm.weight) for layer in attentions)
        and library() is not None
    )


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _reordered(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a matrix [k, columns] in the layout that `product` in `products.h` reads.

    The layout is [columns / 16][k / I][16][I], where I is 2 in bf16 and 1 in float32.
    """
    return rearrange(
        matrix.to(dtype), "(k i) (c lane) -> c k lane i", i=4 // dtype.itemsize, lane=LANES
    ).contiguous()


class NativeModel:
    """A transformer's weights in the layout that compiled passes read, in number format `dtype`."""

    @torch.no_grad()
    def __init__(self, model: Transformer, tables: Tables, dtype: torch.dtype) -> None:
        config = model.config
        self.dtype = dtype
        gains, matrices = [], []
        for block in _blocks(model):
            attention = block.attention
            norms = (block.attention_norm, attention.q_norm, attention.k_norm, block.mlp_norm)
            gains += [norm.weight.float().contiguous() for norm in norms]
            maps = (attention.qkv, attention.out, block.up, block.down)
            matrices += [_reordered(linear.weight.T, dtype) for linear in maps]
        self.keys = -(-config.context_frames * model.order.slots // PAIRS) * PAIRS
        """Number of keys in a sequence's ring: one per slot, rounded up to a multiple of 32."""
        waves = model.order.waves
        self.spans = torch.tensor([(wave.start, wave.stop, wave.first) for wave in waves])
        self.structure = Structure(
            "Model",
            dtype,
            layers=config.layers,
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            hidden=config.mlp_ratio * config.width,
            codes=len(tables.output),
            slots=model.order.slots,
            frames=config.context_frames,
            input_gain=model.input_norm.weight.float(),
            gains=gains,
            matrices=matrices,
            output_gain=model.output_norm.weight.float(),
            output=_reordered(F.pad(tables.output.T, (0, -len(tables.output) % LANES)), dtype),
        )


@dataclass(frozen=True)
class _Trunk:
    """The rings of a cache that was branched. Its branches share them to save memory.

    A ring consists of blocks of 32 places (groups in `decode.cpp`). A place holds the key and the
    value of one slot. A frame may fill only a part of its first and last block. Before the branches
    write a frame, they therefore copy the frame's blocks from the trunk to their own rings. When
    all blocks have been copied, the trunk is dropped.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    """The trunk's sequence that each branch continues, int64 [B]."""
    own: Tensor
    """Bool [N / 32]: true for blocks that branches read from their own rings, not the trunk."""


class NativeCache(Cache):
    """The cache that computes its passes with compiled code.

    Branches share the ring of the cache that they continue, until their own frames have replaced
    all of it. A pass reads the shared ring once for all branches. Passes compute in the number
    format of `native`. torch computes the inputs of the passes, in the number format of `tables`.
    """

    exact = True

    def __init__(
        self, model: Transformer, tables: Tables, batch: int, native: NativeModel, first: int = 0
    ) -> None:
        super().__init__(model, tables, first)
        self.native = native
        self.keys, self.values = self._rings(batch).zero_(), self._rings(batch).zero_()
        self._trunk: _Trunk | None = None
        self._is_shared = False
        """Whether branches or copies read these rings, so that they must not be written."""

    def _rings(self, batch: int) -> Tensor:
        config = self.model.config
        channels = config.width // config.heads
        size = (config.layers, batch, config.kv_heads, self.native.keys * channels)
        return torch.empty(size, dtype=self.native.dtype)

    def advance(self) -> None:
        """Begin the next frame, and hide the old frame that it overwrites."""
        self._own_rings()
        self.frame += 1
        if self._trunk is not None:
            self._trunk = self._copy_from_trunk(self._trunk)
        trunk, dtype = self._trunk, self.native.dtype
        self._ring = Structure(
            "Ring",
            dtype,
            model=self.native.structure,
            trunk=trunk and Structure("Trunk", dtype, sequences=trunk.keys.shape[1], **vars(trunk)),
            sequences=self.keys.shape[1],
            frame=self.frame - self.first,
            keys=self.keys,
            values=self.values,
        )

    def _own_rings(self) -> None:
        """Copy the rings if others read them, because they will be written."""
        if self._is_shared:
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self._is_shared = False

    def _copy_from_trunk(self, trunk: _Trunk) -> _Trunk | None:
        """Copy the blocks that contain the current frame from the trunk to the branches' own rings.

        Returns the trunk with these blocks marked in `own`, or None if all blocks are marked now.
        """
        begin = self.frame % self.frames * self.slots
        span = range(begin // PAIRS, -(-(begin + self.slots) // PAIRS))
        new = [block for block in span if not trunk.own[block]]
        # A block of keys is contiguous. A block of values has one contiguous piece for every 16
        # channels.
        pieces = self.model.config.width // self.model.config.heads // LANES
        for own, shared, parts in (
            (self.keys, trunk.keys, 1),
            (self.values, trunk.values, pieces),
        ):
            to, source = (
                rearrange(ring, "l b g (p n e) -> l b g p n e", p=parts, n=len(trunk.own))
                for ring in (own, shared)
            )
            to[..., new, :] = source[..., new, :][:, trunk.rows]
        own = trunk.own.index_fill(0, torch.tensor(new, dtype=torch.int64), True)
        return None if own.all() else replace(trunk, own=own)

    def replace(self, rows: Tensor, other: Self) -> None:
        """Replace the sequences `rows` with those of `other`, which is at the same frame.

        They join the trunk, if there is one, so that the other sequences round as before.
        """
        self._own_rings()
        self.keys[:, rows], self.values[:, rows] = other.keys, other.values
        if trunk := self._trunk:
            added = trunk.keys.shape[1] + torch.arange(len(rows))
            self._trunk = replace(
                trunk,
                keys=torch.cat([trunk.keys, other.keys], dim=1),
                values=torch.cat([trunk.values, other.values], dim=1),
                rows=trunk.rows.index_copy(0, rows, added),
            )

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Add a wave's slots to the cache; return the logits of the slots that predict a token."""
        x, cos, sin = (tensor.float().contiguous() for tensor in (x, *rotary))
        logits = torch.empty(len(x), wave.stop - wave.first, len(self.tables.output))
        call(
            "pass",
            self.native.dtype,
            ring=self._ring,
            start=wave.start,
            stop=wave.stop,
            first=wave.first,
            x=x,
            cos=cos,
            sin=sin,
            logits=logits,
        )
        return logits

    def draw_frame(
        self,
        base: Tensor,
        rotary: tuple[Tensor, Tensor],
        uniform: Tensor,
        *,
        streams: int,
        temperature: float,
        min_p: float,
        guidance: float,
    ) -> tuple[Tensor, Tensor]:
        """Draw the current frame; return its tokens [B, P] and their scores [3, F, P].

        `base` [B, S, D] and `rotary` are the inputs and the cosines and sines that `begin_frame`
        returns. `uniform` [F, P] are random numbers in [0, 1). With guidance, there are 2
        `streams`, and each of the F futures is in the batch twice: first with its actions, then
        with unknown actions. So B is `streams` * F. The scores, in nats, are a token's
        log-probability under the plain model (index 0) and under the distribution that tokens are
        drawn from (index 1), and the entropy of the plain model's distribution (index 2).
        """
        order = self.model.order
        base, cos, sin = (tensor.float().contiguous() for tensor in (base, *rotary))
        drawn = torch.full((len(base), order.tokens + 1), self.model.grid.codebook_size)
        scores = torch.empty(3, *uniform.shape)
        call(
            "frame",
            self.native.dtype,
            ring=self._ring,
            waves=len(order.waves),
            tokens=order.tokens,
            streams=streams,
            spans=self.native.spans,
            source=order.source,
            target=order.target,
            base=base,
            cos=cos,
            sin=sin,
            embedding=self.tables.token.float().contiguous(),
            uniform=uniform.contiguous(),
            temperature=temperature,
            min_p=min_p,
            guidance=guidance,
            drawn=drawn,
            scores=scores,
        )
        return drawn[:, :-1], scores

    def copy(self) -> Self:
        """Return a copy that shares the rings until either writes a frame.

        Unlike a branch, it has the same trunk. Passes add up the parts of the trunk and of the own
        rings in a certain order, so only a copy rounds as the original does.
        """
        self._is_shared = True
        return copy.copy(self)

    def branch(self, rows: Tensor) -> Self:
        """Return a cache whose sequence i continues this cache's sequence `rows[i]`."""
        branch = copy.copy(self)
        branch._is_shared = False
        rows = rows.cpu().contiguous()
        if self._trunk is not None:
            branch._trunk = replace(self._trunk, rows=self._trunk.rows[rows])
            branch.keys, branch.values = self.keys[:, rows], self.values[:, rows]
            return branch
        self._is_shared = True
        own = torch.zeros(self.native.keys // PAIRS, dtype=torch.bool)
        branch._trunk = _Trunk(self.keys, self.values, rows, own)
        # These take no memory until a frame is written: every block is first copied from the trunk.
        branch.keys, branch.values = branch._rings(len(rows)), branch._rings(len(rows))
        return branch


class FrozenPasses:
    """Makes caches whose passes use a transformer's current weights in the number format `dtype`.

    `precision` is fp32, bf16 or auto. auto chooses bf16 if bf16 is faster. On a CPU, bf16 is faster
    whenever the passes are compiled. Passes can be compiled only for float32 weights.
    """

    def __init__(self, model: Transformer, precision: str) -> None:
        device = model.source.device
        self._model, self.dtype = model, resolve_precision(precision, device)
        with torch.inference_mode():
            self._tables = model.tables()
        self._native: NativeModel | None = None
        exact = self._tables.output.dtype is torch.float32
        if device.type == "cpu" and exact and is_supported(model):
            if precision == "auto":
                self.dtype = torch.bfloat16
            self._native = NativeModel(model, self._tables, self.dtype)
        elif self.dtype is not torch.float32:
            self._cast_once()

    def _cast_once(self) -> None:
        """Copy the model, and cast the matrices in the copy to the number format of the passes.

        Otherwise autocast would cast them in every pass, because it caches only the casts of
        weights that require gradients.
        """
        self._model = copy.deepcopy(self._model)
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                module.to(self.dtype)
        self._tables = replace(self._tables, output=self._tables.output.to(self.dtype))

    def new_cache(self, sequences: int, first: int = 0) -> Cache:
        """Return an empty cache for this many sequences, whose first frame has number `first`."""
        if self._native is not None:
            return NativeCache(self._model, self._tables, sequences, self._native, first)
        return RingCache(self._model, self._tables, sequences, first)
