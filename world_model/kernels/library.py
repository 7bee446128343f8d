"""`decode.cpp` and `attention.cpp`, compiled on this machine.

The machine's C++ compiler makes a library of them, in a few seconds, once: it is kept in the user's
cache folder. Without a compiler, or with DRIVESIM_NATIVE=0, torch does the same.
"""

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
from typing import Any

import torch
from torch import Tensor

from driving_sim.engine.device import processor_features
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import say

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("decode.cpp", "attention.cpp"))
_HEADER = _FOLDER / "products.h"
_FLAGS = "-std=c++17 -O3 -fopenmp -shared -fPIC -Wno-psabi -march=native"
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-bf16 -mno-amx-int8"
LANES = 16
"""Columns of a matrix that lie together."""
PAIRS = 32
"""What a head's channels must be a multiple of."""
EPSILON = 1e-6
"""Of the norms, here and in `products.h`."""
LARGEST_SCORE = 70.0
"""e to this, times any number of keys, is a float32."""


def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be had, after a line that says why."""
    return None if os.environ.get("DRIVESIM_NATIVE") == "0" else _library()


def function(name: str, dtype: torch.dtype) -> Any:
    """The compiled function of that name, in one of its number formats; see `library` before."""
    compiled = _library()
    assert compiled is not None
    found = getattr(compiled, f"drivesim_{name}_{name_of(dtype)}")
    found.restype = None
    return found


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    if not shutil.which(compiler[0]):
        say("no C++ compiler (g++ or CXX): rollouts and training take longer on this CPU")
        return None
    try:
        for flags in (_FLAGS, f"{_FLAGS} {_WITHOUT_AMX}"):
            found = ctypes.CDLL(str(_compiled(compiler, flags.split())))
            if found.drivesim_ready():
                return found
    except (OSError, DriveSimError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        say(f"decode.cpp and attention.cpp were not compiled, all takes longer: {reason}")
    return None


def _compiled(compiler: list[str], flags: list[str]) -> Path:
    """The shared library made by this compiler on a processor like this one."""
    command = [*compiler, *flags]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    texts = [path.read_text("utf-8") for path in (*_SOURCES, _HEADER)]
    identity = [*texts, *command, version.stdout, platform.machine(), *processor_features()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]
    path = _cache_folder() / f"drivesim-{name}.so"
    if not path.exists():
        with atomic_file(path) as temporary:
            subprocess.run(
                [*command, *map(str, _SOURCES), "-o", str(temporary)],
                capture_output=True,
                text=True,
                check=True,
            )
    return path


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "drivesim"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def is_bounded(q_gain: Tensor, k_gain: Tensor) -> bool:
    """Whether no score of queries and keys with these gains [E] can overflow; else says so."""
    if largest_score(q_gain, k_gain) < LARGEST_SCORE:
        return True
    _say_unbounded()
    return False


@cache
def _say_unbounded() -> None:
    say("a gain of the attention's queries or keys has become large: torch takes over, slower")


@torch.no_grad()
def largest_score(q_gain: Tensor, k_gain: Tensor) -> float:
    """What no score exceeds: queries and keys are normed, so |q| <= sqrt(E) max |gain|, as is |k|.

    `q_gain` and `k_gain` [E].
    """
    largest = q_gain.abs().max() * k_gain.abs().max()
    return float(largest) * math.sqrt(len(q_gain))
