"""The passes on a CPU in bf16, compiled: `passes.cpp` with its weights and its ring.

torch starts some 400 operations for a pass, most of which take longer to start than to run. The
machine's C++ compiler makes one call of them, in two seconds, once: the result is kept in the
user's cache folder. Without a compiler, or with DRIVESIM_NATIVE=0, torch does the passes.

Axes: as in `passes.cpp`; L layers, A x B matrices.
"""

import copy
import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.progress import say
from driving_sim.world_model.order import Wave
from driving_sim.world_model.transformer import (
    Block,
    Tables,
    Transformer,
)

_SOURCE = Path(__file__).with_name("passes.cpp")
_FLAGS = "-std=c++17 -O3 -fopenmp -shared -fPIC -Wno-psabi -march=native"
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-bf16 -mno-amx-int8"
_LANES = 16
_PAIRS = 32
_LARGEST_SCORE = 80.0
"""e to this, times any number of keys, is a float32."""


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


@cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where they cannot be had, after a line that says why."""
    if os.environ.get("DRIVESIM_NATIVE") == "0":
        return None
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    if not shutil.which(compiler[0]):
        say("no C++ compiler (g++ or CXX): rollouts take several times longer on this CPU")
        return None
    try:
        for flags in (_FLAGS, f"{_FLAGS} {_WITHOUT_AMX}"):
            found = ctypes.CDLL(str(_compiled(compiler, flags.split())))
            if found.drivesim_ready():
                found.drivesim_pass.restype = None
                return found
    except (OSError, DriveSimError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        say(f"passes.cpp was not compiled, so rollouts take several times longer: {reason}")
    return None


def _compiled(compiler: list[str], flags: list[str]) -> Path:
    """The shared library made by this compiler on a processor like this one."""
    command = [*compiler, *flags]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    identity = [_SOURCE.read_text("utf-8"), *command, version.stdout, platform.machine(), _cpu()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]
    path = _cache_folder() / f"passes-{name}.so"
    if not path.exists():
        with atomic_file(path) as temporary:
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(temporary)],
                capture_output=True,
                text=True,
                check=True,
            )
    return path


def _cpu() -> str:
    """What tells processors apart for which -march=native means different things."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "drivesim"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def is_supported(model: Transformer) -> bool:
    """Whether the compiled passes can compute a model."""
    return (
        model.config.width // model.config.heads % _PAIRS == 0
        and _largest_score(model) < _LARGEST_SCORE
        and library() is not None
    )


@torch.no_grad()
def _largest_score(model: Transformer) -> float:
    """No score is larger: queries and keys are normed, so |q| <= sqrt(E) max |gain|, as is |k|."""
    attentions = [block.attention for block in _blocks(model)]
    return max(
        float(each.q_norm.weight.abs().max() * each.k_norm.weight.abs().max())
        * math.sqrt(each.channels)
        for each in attentions
    )


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _paired(matrix: Tensor) -> Tensor:
    """Lay [..., k, columns] out as [..., columns / 16][k / 2][16][2], in bf16."""
    return rearrange(
        matrix.to(torch.bfloat16), "... (k two) (c lane) -> ... c k lane two", two=2, lane=_LANES
    ).contiguous()


class NativeModel:
    """A transformer's weights as the compiled passes take them."""

    @torch.no_grad()
    def __init__(self, model: Transformer, tables: Tables) -> None:
        config = model.config
        self.gains = [model.input_norm.weight.float(), model.output_norm.weight.float()]
        self.matrices = [_paired(F.pad(tables.output.T, (0, -len(tables.output) % _LANES)))]
        gains, matrices = [], []
        for block in _blocks(model):
            attention = block.attention
            norms = (block.attention_norm, attention.q_norm, attention.k_norm, block.mlp_norm)
            gains += [norm.weight.float().contiguous() for norm in norms]
            maps = (attention.qkv, attention.out, block.up, block.down)
            matrices += [_paired(each.weight.T) for each in maps]
        self.places = config.context_frames * model.order.slots
        self.keys = -(-self.places // _PAIRS) * _PAIRS
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
        self.native = native or NativeModel(model, tables)
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
        compiled = library()
        assert compiled is not None
        compiled.drivesim_pass(ctypes.byref(self.native.structure), ctypes.byref(now))
        return logits

    def branch(self, rows: Tensor) -> Self:
        """Return a copy whose sequence i goes on from this cache's sequence `rows[i]`."""
        branch = copy.copy(self)
        branch.keys, branch.values = self.keys[:, rows], self.values[:, rows]
        return branch
