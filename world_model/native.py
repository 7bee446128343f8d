"""The passes on a CPU in bf16, compiled: `passes.cpp` with its weights and its ring.

torch starts some 400 operations for a pass, most of which take longer to start than to run. Here
they are one call.

Axes: as in `passes.cpp`; L layers, A x B matrices.
"""

import copy
import ctypes
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.world_model.native_library import (
    LANES,
    LARGEST_SCORE,
    PAIRS,
    largest_score,
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
        *((name, ctypes.c_void_p) for name in ("ring_keys", "ring_values", "logits")),
    )


def is_supported(model: Transformer) -> bool:
    """Whether the compiled passes can compute a model."""
    attentions = [block.attention for block in _blocks(model)]
    return (
        model.config.width // model.config.heads % PAIRS == 0
        and all(
            largest_score(each.q_norm.weight, each.k_norm.weight) < LARGEST_SCORE
            for each in attentions
        )
        and library() is not None
    )


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _paired(matrix: Tensor) -> Tensor:
    """Lay [..., k, columns] out as [..., columns / 16][k / 2][16][2], in bf16."""
    return rearrange(
        matrix.to(torch.bfloat16), "... (k two) (c lane) -> ... c k lane two", two=2, lane=LANES
    ).contiguous()


class NativeModel:
    """A transformer's weights as the compiled passes take them."""

    @torch.no_grad()
    def __init__(self, model: Transformer, tables: Tables) -> None:
        config = model.config
        self.gains = [model.input_norm.weight.float(), model.output_norm.weight.float()]
        self.matrices = [_paired(F.pad(tables.output.T, (0, -len(tables.output) % LANES)))]
        gains, matrices = [], []
        for block in _blocks(model):
            attention = block.attention
            norms = (block.attention_norm, attention.q_norm, attention.k_norm, block.mlp_norm)
            gains += [norm.weight.float().contiguous() for norm in norms]
            maps = (attention.qkv, attention.out, block.up, block.down)
            matrices += [_paired(each.weight.T) for each in maps]
        self.places = config.context_frames * model.order.slots
        self.keys = -(-self.places // PAIRS) * PAIRS
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


class NativeCache:
    """What `RingCache` is to torch's passes: the ring of the compiled ones, and their logits."""

    device = torch.device("cpu")
    dtype = torch.bfloat16

    def __init__(
        self, model: Transformer, tables: Tables, batch: int, native: NativeModel | None = None
    ) -> None:
        self.model, self.tables = model, tables
        compiled = library()
        assert compiled is not None
        self._compiled, self.native = compiled, native or NativeModel(model, tables)
        self.slots, self.frames = model.order.slots, model.config.context_frames
        channels = model.config.width // model.config.heads
        lead = (model.config.layers, batch, model.config.kv_heads)
        size = (*lead, self.native.keys * channels)
        self.keys = torch.zeros(size, dtype=torch.bfloat16)
        self.values = torch.zeros(size, dtype=torch.bfloat16)
        self.frame = -1
        """Number of the frame being written, from 0; -1 before the first."""

    def begin_frame(self) -> None:
        """Make the next frame the current one; what its place held is out of sight at once."""
        self.frame += 1

    def logits(self, x: Tensor, rotary: tuple[Tensor, Tensor], wave: Wave) -> Tensor:
        """Bring in the slots of a wave, x [B, n, D]; return logits float32 [B, n', K]."""
        x, cos, sin = (each.float().contiguous() for each in (x, *rotary))
        logits = torch.empty(len(x), wave.stop - wave.first, len(self.tables.output))
        frame_begin = self.frame % self.frames * self.slots
        now = _Pass(
            len(x), wave.stop - wave.start, frame_begin + wave.start, frame_begin + self.slots,
            self.frame >= self.frames, wave.first - wave.start,
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            self.keys.data_ptr(), self.values.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        self._compiled.drivesim_pass(ctypes.byref(self.native.structure), ctypes.byref(now))
        return logits

    def branch(self, rows: Tensor) -> Self:
        """Return a copy whose sequence i goes on from this cache's sequence `rows[i]`."""
        branch = copy.copy(self)
        branch.keys, branch.values = self.keys[:, rows], self.values[:, rows]
        return branch
