"""The passes on a CPU, compiled: `decode.cpp` with its weights and its ring.

torch starts some 400 operations for a pass, most of which take longer to start than to run. Here
they are one call.

Axes: as in `decode.cpp`; L layers, A x B matrices.
"""

import copy
import ctypes
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.world_model.kernels.library import (
    LANES,
    PAIRS,
    function,
    is_bounded,
    library,
)
from driving_sim.world_model.order import Wave
from driving_sim.world_model.transformer import (
    Block,
    Tables,
    Transformer,
)


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "heads", "kv_heads", "hidden")),
        *((name, ctypes.c_int64) for name in ("codes", "places", "keys")),
        ("input_gain", ctypes.c_void_p),
        ("gains", ctypes.c_void_p),
        ("matrices", ctypes.c_void_p),
        ("output_gain", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "n", "begin", "frame_end", "full", "first")),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("ring_keys", "ring_values")),
        ("trunks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("trunk_keys", "trunk_values", "trunk")),
        *((name, ctypes.c_int64) for name in ("own_from", "own_to")),
        ("logits", ctypes.c_void_p),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("waves", "slots", "tokens", "streams")),
        *((name, ctypes.c_void_p) for name in ("spans", "source", "target")),
        *((name, ctypes.c_void_p) for name in ("base", "embedding", "uniform")),
        ("temperature", ctypes.c_double),
        ("guidance", ctypes.c_double),
        ("drawn", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
    )


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
        self.gains = [model.input_norm.weight.float(), model.output_norm.weight.float()]
        self.matrices = [
            _laid_out(F.pad(tables.output.T, (0, -len(tables.output) % LANES)), self.dtype)
        ]
        gains, matrices = [], []
        for block in _blocks(model):
            attention = block.attention
            norms = (block.attention_norm, attention.q_norm, attention.k_norm, block.mlp_norm)
            gains += [norm.weight.float().contiguous() for norm in norms]
            maps = (attention.qkv, attention.out, block.up, block.down)
            matrices += [_laid_out(each.weight.T, self.dtype) for each in maps]
        self.places = config.context_frames * model.order.slots
        self.keys = -(-self.places // PAIRS) * PAIRS
        waves = model.order.waves
        self.spans = torch.tensor([(wave.start, wave.stop, wave.first) for wave in waves])
        self._gain_pointers = _pointers(gains)
        self._matrix_pointers = _pointers(matrices)
        self._kept = gains + matrices
        self.structure = _Model(
            config.layers, config.width, config.heads, config.kv_heads,
            config.mlp_ratio * config.width, len(tables.output), self.places, self.keys,
            self.gains[0].data_ptr(), ctypes.addressof(self._gain_pointers),
            ctypes.addressof(self._matrix_pointers), self.gains[1].data_ptr(),
            self.matrices[0].data_ptr(),
        )  # fmt: skip


def _pointers(tensors: list[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))


@dataclass(frozen=True, slots=True)
class _Trunk:
    """What some sequences branched off, and how much of the ring is their own by now."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    """The sequence that each goes on from, int64 [B]."""
    first: int = 0
    """The first block of 32 places that is the branches' own."""
    count: int = 0
    """How many are from there on, round the ring's end."""


class NativeCache:
    """What `RingCache` is to torch's passes: the ring of the compiled ones, and their logits.

    Branches share what they branched off until their own frames have taken its place: a pass reads
    it once for all of them. The passes' number format is `native`'s; what goes into them torch
    computes in that of the tables.
    """

    device = torch.device("cpu")
    exact = True

    def __init__(self, model: Transformer, tables: Tables, batch: int, native: NativeModel) -> None:
        self.model, self.tables, self.native = model, tables, native
        self.dtype = tables.output.dtype
        self.slots, self.frames = model.order.slots, model.config.context_frames
        self.keys, self.values = self._rings(batch), self._rings(batch)
        self._trunk: _Trunk | None = None
        self._has_branches = False
        self.frame = -1
        """Number of the frame being written, from 0; -1 before the first."""

    def _rings(self, batch: int) -> Tensor:
        config = self.model.config
        channels = config.width // config.heads
        size = (config.layers, batch, config.kv_heads, self.native.keys * channels)
        return torch.zeros(size, dtype=self.native.dtype)

    def begin_frame(self) -> None:
        """Make the next frame the current one; what its place held is out of sight at once."""
        if self._has_branches:  # what they share must not change
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self._has_branches = False
        self.frame += 1
        if self._trunk is not None:
            self._trunk = self._grown(self._trunk)

    def _grown(self, trunk: _Trunk) -> _Trunk | None:
        """Bring the current frame's blocks into the own rings; no trunk when they hold them all."""
        blocks = self.native.keys // PAIRS
        begin = self.frame % self.frames * self.slots
        start, stop = begin // PAIRS, -(-(begin + self.slots) // PAIRS)
        first = trunk.first if trunk.count else start
        new = [block for block in range(start, stop) if (block - first) % blocks >= trunk.count]
        # A block of keys is in one piece, one of values in a piece for each 16 channels.
        pieces = self.model.config.width // self.model.config.heads // LANES
        for own, shared, parts in (
            (self.keys, trunk.keys, 1),
            (self.values, trunk.values, pieces),
        ):
            to, source = (
                rearrange(each, "l b g (p n e) -> l b g p n e", p=parts, n=blocks)
                for each in (own, shared)
            )
            to[..., new, :] = source[..., new, :][:, trunk.rows]
        count = trunk.count + len(new)
        return None if count >= blocks else replace(trunk, first=first, count=count)

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave, x [B, n, D]; return logits float32 [B, n', K]."""
        x, cos, sin = (each.float().contiguous() for each in (x, *rotary))
        logits = torch.empty(len(x), wave.stop - wave.first, len(self.tables.output))
        now = self._pass(len(x), wave, cos, sin)
        now.x, now.logits = x.data_ptr(), logits.data_ptr()
        self._call("pass", ctypes.byref(now))
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
        order, none = self.model.order, self.model.grid.codebook_size
        base, cos, sin = (each.float().contiguous() for each in (base, *rotary))
        uniform, embedding = uniform.contiguous(), self.tables.token.float().contiguous()
        spans, source, target = self.native.spans, order.source, order.target
        drawn = torch.full((len(base), order.tokens + 1), none)
        log_probs = torch.empty(2, *uniform.shape)
        frame = _Frame(
            len(spans), order.slots, order.tokens, streams, spans.data_ptr(), source.data_ptr(),
            target.data_ptr(), base.data_ptr(), embedding.data_ptr(), uniform.data_ptr(),
            temperature, guidance, drawn.data_ptr(), log_probs.data_ptr(),
        )  # fmt: skip
        first = self._pass(len(base), order.waves[0], cos, sin)
        self._call("frame", ctypes.byref(first), ctypes.byref(frame))
        return drawn[:, :-1], log_probs

    def _pass(self, batch: int, wave: Wave, cos: Tensor, sin: Tensor) -> _Pass:
        """A pass over a wave, without what goes in and comes out."""
        begin = self.frame % self.frames * self.slots
        return _Pass(
            batch, wave.stop - wave.start, begin + wave.start, begin + self.slots,
            self.frame >= self.frames, wave.first - wave.start, None, cos.data_ptr(),
            sin.data_ptr(), self.keys.data_ptr(), self.values.data_ptr(), *self._trunk_fields(),
        )  # fmt: skip

    def _call(self, name: str, *given: object) -> None:
        function(name, self.native.dtype)(ctypes.byref(self.native.structure), *given)

    def _trunk_fields(self) -> tuple[int | None, ...]:
        trunk = self._trunk
        if trunk is None:
            return 0, None, None, None, 0, 0
        stop = (trunk.first + trunk.count) % (self.native.keys // PAIRS)
        pointers = (each.data_ptr() for each in (trunk.keys, trunk.values, trunk.rows))
        return trunk.keys.shape[1], *pointers, trunk.first * PAIRS, stop * PAIRS

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
        branch._trunk = _Trunk(self.keys, self.values, rows)
        branch.keys, branch.values = branch._rings(len(rows)), branch._rings(len(rows))
        return branch
