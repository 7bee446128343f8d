"""Compile `decode.cpp` and `attention.cpp` on this machine, and call their functions.

The first call to `library` compiles them with the machine's C++ compiler, which takes a few
seconds. The compiled library stays in the user's cache folder. Without a compiler, or with
DRIVESIM_NATIVE=0, there is no library, and the callers compute in torch instead.
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
"""Number of columns that are interleaved in memory; see the layout in `products.h`."""
PAIRS = 32
"""The number of channels of a head must be a multiple of this."""
EPSILON = 1e-6
"""Constant that RMSNorm adds to the mean square, here and in `products.h`."""


def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it is turned off or could not be compiled.

    If it could not be compiled, prints the reason once.
    """
    return None if os.environ.get("DRIVESIM_NATIVE") == "0" else _library()


class Structure:
    """An instance of one of the library's C++ structures, in one number format.

    Takes the values of all fields by name. For a number, pass the number. For a pointer, pass a
    contiguous tensor of the right number format, a list of such tensors, another structure, or
    None. Raises `TypeError` for anything else.
    """

    def __init__(self, name: str, dtype: torch.dtype, **values: Any) -> None:
        self.name, self.dtype = name, dtype
        layout, fields = _layout(name)
        if values.keys() != fields.keys():
            raise TypeError(f"{name} has the fields {[*fields]}, but was given {[*values]}")
        self._kept: list[Any] = [values]  # keep the tensors alive that the structure points to
        self.memory = layout(*(self._word(*fields[field], values[field]) for field in fields))

    def _word(self, kind: str, pointers: int, value: Any) -> Any:
        """Return the content of a field: a number, or an address if the field is a pointer."""
        if pointers == 0 or value is None:
            return value
        if pointers == 2:
            array = (ctypes.c_void_p * len(value))(*(self._word(kind, 1, item) for item in value))
            self._kept.append(array)
            return ctypes.addressof(array)
        if isinstance(value, Tensor):
            dtype = self.dtype if kind == "Number" else _FORMATS.get(kind)
            if value.dtype is dtype and value.is_contiguous():
                return value.data_ptr()
        elif isinstance(value, Structure) and (value.name, value.dtype) == (kind, self.dtype):
            return ctypes.addressof(value.memory)
        raise TypeError(f"{self.name}: a pointer needs a contiguous {kind}, found {value!r}")


def call(name: str, dtype: torch.dtype, **values: Any) -> None:
    """Call a compiled function with the fields of its structure; `library()` must not be None."""
    structure = Structure(_exported(f"takes_{name}"), dtype, **values)
    getattr(_library(), f"drivesim_{name}_{name_of(dtype)}")(ctypes.byref(structure.memory))


@cache
def _layout(name: str) -> tuple[type[ctypes.Structure], dict[str, tuple[str, int]]]:
    """Return the ctypes class of a structure, and its fields by name, each as (type, stars).

    The library exports the declarations of the fields as text (see the macro `STRUCTURE` in
    `interface.h`). This function parses them. The type `float**` becomes ("float", 2).
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
        raise TypeError(f"{name} has {ctypes.sizeof(layout)} bytes in Python, {size} in C++")
    return layout, fields


@cache
def _exported(name: str) -> str:
    """Return one of the texts with which the library describes its structures and functions."""
    tell = getattr(_library(), f"drivesim_{name}")
    tell.restype = ctypes.c_char_p
    text: bytes = tell()
    return text.decode()


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    if not shutil.which(compiler[0]):
        say("no C++ compiler, so rollouts and training are slower; install g++ or set CXX")
        return None
    try:
        for flags in (_FLAGS, f"{_FLAGS} {_WITHOUT_AMX}"):
            loaded = ctypes.CDLL(str(_compiled(compiler, flags.split())))
            if loaded.drivesim_ready():
                return loaded
    except (OSError, DriveSimError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        say(
            "decode.cpp and attention.cpp could not be compiled, so rollouts and training are "
            f"slower: {reason}"
        )
    return None


def _compiled(compiler: list[str], flags: list[str]) -> Path:
    """Return the path of the library; compile it first if none is cached for this compiler and CPU.

    If the C++ files or the flags have changed, it is compiled again.
    """
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
