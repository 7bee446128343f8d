"""Cached passes with fixed weights: compiled for this CPU, or else torch's.

The compiled ones are `decode.cpp` with its weights and its ring. torch starts some 400 operations
for a pass, most of which take longer to start than to run. Here they are one call.

Axes: as in `decode.cpp`; L layers, A x B matrices.
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
    """Whether the compiled passes can compute a model."""
    attentions = [block.attention for block in _blocks(model)]
    return (
        model.config.width // model.config.heads % PAIRS == 0
        and all(is_bounded(each.q_norm.weight, each.k_norm.weight) for each in attentions)
        and library() is not None
    )


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _laid_out(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay [k, columns] out as [columns / 16][k / I][16][I]: I is 2 in bf16, 1 in float32."""
    return rearrange(
        matrix.to(dtype), "(k i) (c lane) -> c k lane i", i=4 // dtype.itemsize, lane=LANES
    ).contiguous()


class NativeModel:
    """A transformer's weights as the compiled passes take them, in `dtype`."""

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
            matrices += [_laid_out(each.weight.T, dtype) for each in maps]
        self.keys = -(-config.context_frames * model.order.slots // PAIRS) * PAIRS
        """Places of a ring, padded."""
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
            output=_laid_out(F.pad(tables.output.T, (0, -len(tables.output) % LANES)), dtype),
        )


@dataclass(frozen=True)
class _Trunk:
    """What some sequences branched off, and how much of the ring is their own by now."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    """The sequence that each goes on from, int64 [B]."""
    own: Tensor
    """Which blocks of 32 places are the branches' own by now, bool [N / 32]."""


class NativeCache(Cache):
    """What `RingCache` is to torch's passes: the ring of the compiled ones, and their logits.

    Branches share what they branched off until their own frames have taken its place: a pass reads
    it once for all of them. The passes' number format is `native`'s; what goes into them torch
    computes in that of the tables.
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
        """Make the next frame the current one; what its place held is out of sight at once."""
        if self._has_branches:  # what they share must not change
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self._has_branches = False
        self.frame += 1
        if self._trunk is not None:
            self._trunk = self._grown(self._trunk)
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

    def _grown(self, trunk: _Trunk) -> _Trunk | None:
        """Bring the current frame's blocks into the own rings; no trunk when they hold them all."""
        begin = self.frame % self.frames * self.slots
        span = range(begin // PAIRS, -(-(begin + self.slots) // PAIRS))
        new = [block for block in span if not trunk.own[block]]
        # A block of keys is in one piece, one of values in a piece for each 16 channels.
        pieces = self.model.config.width // self.model.config.heads // LANES
        for own, shared, parts in (
            (self.keys, trunk.keys, 1),
            (self.values, trunk.values, pieces),
        ):
            to, source = (
                rearrange(each, "l b g (p n e) -> l b g p n e", p=parts, n=len(trunk.own))
                for each in (own, shared)
            )
            to[..., new, :] = source[..., new, :][:, trunk.rows]
        own = trunk.own.index_fill(0, torch.tensor(new, dtype=torch.int64), True)
        return None if own.all() else replace(trunk, own=own)

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave, x [B, n, D]; return logits float32 [B, n', K]."""
        x, cos, sin = (each.float().contiguous() for each in (x, *rotary))
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
        """Draw the current frame wave by wave; return its tokens [B, P] and [2, F, P] (nats).

        `base` [B, S, D] is what slots know before the frame's own tokens, `rotary` the slots'
        cosines and sines, `uniform` [F, P] the draws' numbers in [0, 1). B = `streams` * F: under
        guidance (2) the futures' sequences, then as many that know no action. The log-probabilities
        are those under the plain model and those that were drawn from.
        """
        order = self.model.order
        base, cos, sin = (each.float().contiguous() for each in (base, *rotary))
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
        """Return a cache whose sequence i goes on from this one's sequence `rows[i]`."""
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
    """Caches whose passes have a transformer's weights as they are now, in the format `dtype`.

    `precision` is auto, fp32 or bf16; auto: bf16 where it is faster, which on a CPU it is wherever
    passes are compiled. They are for weights in float32.
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
        """Make the matrices of torch's passes in their number format, beside the exact weights.

        Autocast would make them anew in every pass: it keeps only what gets gradients.
        """
        self._model = copy.deepcopy(self._model)
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                module.to(self.dtype)
        self._tables = replace(self._tables, output=self._tables.output.to(self.dtype))

    def new_cache(self, sequences: int) -> Cache:
        """Return a cache of so many sequences, without a frame yet."""
        if self._native is not None:
            return NativeCache(self._model, self._tables, sequences, self._native)
        return RingCache(self._model, self._tables, sequences)
