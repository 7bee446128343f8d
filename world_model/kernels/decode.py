"""Cached passes with frozen weights: compiled for this CPU if possible, otherwise torch's.

torch launches some 400 operations for a pass, most of which take longer to launch than to run. A
compiled pass is a single call of `decode.cpp`.

Axes: as in `decode.cpp`, and L layers.
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
    """Return whether compiled passes can compute a model on this machine."""
    attentions = [block.attention for block in _blocks(model)]
    return (
        model.config.width // model.config.heads % PAIRS == 0
        and all(is_bounded(layer.q_norm.weight, layer.k_norm.weight) for layer in attentions)
        and library() is not None
    )


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _reordered(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a matrix [k, columns] to the layout of `product` in `products.h`.

    The layout is [columns / 16][k / I][16][I], where I is 2 in bf16 and 1 in float32.
    """
    return rearrange(
        matrix.to(dtype), "(k i) (c lane) -> c k lane i", i=4 // dtype.itemsize, lane=LANES
    ).contiguous()


class NativeModel:
    """A transformer's weights in the layout of compiled passes and the number format `dtype`."""

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
        """Number of places in a ring, padded to a multiple of 32."""
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
    """A ring that branches share, until their own rings have replaced all of its blocks."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    """The trunk's sequence that each branch continues, int64 [B]."""
    own: Tensor
    """Whether the branches' own rings hold each block of 32 places, bool [N / 32]."""


class NativeCache(Cache):
    """The cache of compiled passes, as `RingCache` is that of torch's passes.

    Branches share the ring of the cache that they branched off, until their own frames have
    replaced it. A pass reads the shared ring once for all branches. Passes compute in the number
    format of `native`; torch computes their inputs in the format of `tables`.
    """

    exact = True

    def __init__(self, model: Transformer, tables: Tables, batch: int, native: NativeModel) -> None:
        super().__init__(model, tables)
        self.native = native
        self.keys, self.values = self._rings(batch), self._rings(batch)
        self._trunk: _Trunk | None = None
        self._has_branches = False

    def _rings(self, batch: int) -> Tensor:
        config = self.model.config
        channels = config.width // config.heads
        size = (config.layers, batch, config.kv_heads, self.native.keys * channels)
        return torch.zeros(size, dtype=self.native.dtype)

    def advance(self) -> None:
        """Begin the next frame, and hide the old frame whose place it takes."""
        if self._has_branches:  # they still use the old tensors, which must not change
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self._has_branches = False
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
            frame=self.frame,
            keys=self.keys,
            values=self.values,
        )

    def _copy_from_trunk(self, trunk: _Trunk) -> _Trunk | None:
        """Copy the current frame's blocks from the trunk into the branches' own rings.

        Returns the trunk with the blocks marked as own, or None if all blocks are own now.
        """
        begin = self.frame % self.frames * self.slots
        span = range(begin // PAIRS, -(-(begin + self.slots) // PAIRS))
        new = [block for block in span if not trunk.own[block]]
        # A block of keys is contiguous; a block of values has a piece for every 16 channels.
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

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Add the slots of a wave to the cache; return the logits of those that predict a token."""
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
        guidance: float,
    ) -> tuple[Tensor, Tensor]:
        """Draw the current frame; return its tokens [B, P] and log-probabilities [2, F, P] (nats).

        `base` [B, S, D] are the slots' inputs without the frame's own tokens. `rotary` are the
        slots' cosines and sines, and `uniform` [F, P] random numbers in [0, 1). B is `streams` * F:
        guidance adds a second stream, in which the F futures have unknown actions. The first
        log-probabilities are the plain model's, the second the sampling distribution's.
        """
        order = self.model.order
        base, cos, sin = (tensor.float().contiguous() for tensor in (base, *rotary))
        drawn = torch.full((len(base), order.tokens + 1), self.model.grid.codebook_size)
        log_probs = torch.empty(2, *uniform.shape)
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
            guidance=guidance,
            drawn=drawn,
            log_probs=log_probs,
        )
        return drawn[:, :-1], log_probs

    def branch(self, rows: Tensor) -> Self:
        """Return a cache whose sequence i continues this cache's sequence `rows[i]`."""
        branch = copy.copy(self)
        branch._has_branches = False
        rows = rows.cpu().contiguous()
        if self._trunk is not None:
            branch._trunk = replace(self._trunk, rows=self._trunk.rows[rows])
            branch.keys, branch.values = self.keys[:, rows], self.values[:, rows]
            return branch
        self._has_branches = True
        own = torch.zeros(self.native.keys // PAIRS, dtype=torch.bool)
        branch._trunk = _Trunk(self.keys, self.values, rows, own)
        branch.keys, branch.values = branch._rings(len(rows)), branch._rings(len(rows))
        return branch


class FrozenPasses:
    """Makes caches whose passes use a transformer's current weights in the number format `dtype`.

    `precision` is fp32, bf16 or auto, which chooses bf16 if it is faster. On a CPU it is faster
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
        """Cast the matrices of torch's passes to their number format, in a copy of the model.

        Autocast would cast them in every pass, because it caches only weights that get gradients.
        """
        self._model = copy.deepcopy(self._model)
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                module.to(self.dtype)
        self._tables = replace(self._tables, output=self._tables.output.to(self.dtype))

    def new_cache(self, sequences: int) -> Cache:
        """Return an empty cache for this many sequences."""
        if self._native is not None:
            return NativeCache(self._model, self._tables, sequences, self._native)
        return RingCache(self._model, self._tables, sequences)
