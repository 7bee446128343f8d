"""`decode.cpp` and `attention.cpp`, compiled on this machine, and how their functions are called.

The machine's C++ compiler makes a library of them, in a few seconds, once: it is kept in the user's
cache folder. Without a compiler, or with DRIVESIM_NATIVE=0, torch does the same.
"""

import ctypes
import hashlib
import os
import platform
import re
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
_HEADERS = tuple(_FOLDER / name for name in ("interface.h", "products.h"))
_FLAGS = "-std=c++17 -O3 -fopenmp -shared -fPIC -Wno-psabi -march=native"
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-bf16 -mno-amx-int8"
_NUMBERS = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
_FORMATS = {"int64_t": torch.int64, "float": torch.float32, "bool": torch.bool}
LANES = 16
"""Columns of a matrix that lie together."""
PAIRS = 32
"""What a head's channels must be a multiple of."""
EPSILON = 1e-6
"""Of the norms, here and in `products.h`."""


def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be had, after a line that says why."""
    return None if os.environ.get("DRIVESIM_NATIVE") == "0" else _library()


class Structure:
    """What compiled functions take, in a number format: fields by name, as the library has them.

    A number is given as it is; a pointer as a contiguous tensor of the format that it points to, a
    list of such tensors, another structure, or None. Raises `TypeError` for anything else.
    """

    def __init__(self, name: str, dtype: torch.dtype, **values: Any) -> None:
        self.name, self.dtype = name, dtype
        layout, fields = _layout(name)
        if values.keys() != fields.keys():
            raise TypeError(f"{name} has the fields {[*fields]}, but was given {[*values]}")
        self._kept: list[Any] = [values]  # what is pointed to
        self.memory = layout(*(self._word(*fields[field], values[field]) for field in fields))

    def _word(self, kind: str, pointers: int, value: Any) -> Any:
        """A number, or the address behind one pointer or two."""
        if pointers == 0 or value is None:
            return value
        if pointers == 2:
            array = (ctypes.c_void_p * len(value))(*(self._word(kind, 1, each) for each in value))
            self._kept.append(array)
            return ctypes.addressof(array)
        if isinstance(value, Tensor):
            dtype = self.dtype if kind == "Number" else _FORMATS.get(kind)
            if value.dtype is dtype and value.is_contiguous():
                return value.data_ptr()
        elif isinstance(value, Structure) and (value.name, value.dtype) == (kind, self.dtype):
            return ctypes.addressof(value.memory)
        raise TypeError(f"a pointer of {self.name} is to a contiguous {kind}, not to {value!r}")


def call(name: str, dtype: torch.dtype, **values: Any) -> None:
    """Call a compiled function, on its structure's fields, in a format; see `library` before."""
    given = Structure(_exported(f"takes_{name}"), dtype, **values)
    getattr(_library(), f"drivesim_{name}_{name_of(dtype)}")(ctypes.byref(given.memory))


@cache
def _layout(name: str) -> tuple[type[ctypes.Structure], dict[str, tuple[str, int]]]:
    """A structure, and its fields' types: what they are, and behind how many pointers.

    It is read from what `STRUCTURE` of `interface.h` exports.
    """
    fields: dict[str, tuple[str, int]] = {}
    for declared in _exported(f"fields_{name}").replace("<Number>", "").split(";")[:-1]:
        kind, *names = (word for word in re.findall(r"\w+", declared) if word != "const")
        fields |= dict.fromkeys(names, (kind, declared.count("*") // len(names)))
    words = [
        (field, ctypes.c_void_p if pointers else _NUMBERS[kind])
        for field, (kind, pointers) in fields.items()
    ]
    layout = type(name, (ctypes.Structure,), {"_fields_": words})
    size = getattr(_library(), f"drivesim_size_{name}")()
    if ctypes.sizeof(layout) != size:
        raise TypeError(f"{name} has {ctypes.sizeof(layout)} bytes here, {size} in C++")
    return layout, fields


@cache
def _exported(name: str) -> str:
    """What the library says of its structures and functions."""
    tell = getattr(_library(), f"drivesim_{name}")
    tell.restype = ctypes.c_char_p
    text: bytes = tell()
    return text.decode()


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
        say(
            "decode.cpp and attention.cpp could not be compiled, so rollouts and training are "
            f"slower: {reason}"
        )
    return None


def _compiled(compiler: list[str], flags: list[str]) -> Path:
    """The shared library made by this compiler on a processor like this one."""
    command = [*compiler, *flags]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    texts = [path.read_text("utf-8") for path in (*_SOURCES, *_HEADERS)]
    identity = [*texts, *command, version.stdout, platform.machine(), *processor_features()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "drivesim"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"drivesim-{name}.so"
    if not path.exists():
        with atomic_file(path) as temporary:
            subprocess.run(
                [*command, *map(str, _SOURCES), "-o", str(temporary)],
                capture_output=True,
                text=True,
                check=True,
            )
    return path
