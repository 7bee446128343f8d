"""A model's weights in a safetensors file: written whole, checked before they are read, hashed.

The file and the config beside it may be damaged, or made to do harm: a header of gigabytes, a
config of a billion layers. So memory is taken only for as many weights as the file can hold.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.parsing import one_line, shown

M = TypeVar("M", bound=nn.Module)
Form = tuple[str, tuple[int, ...]]
"""A tensor's number format, by safetensors' names, and its shape."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8  # of the first tensor
_VALUE_BYTES = 4  # what is kept is float32
_MOST_HEADER_BYTES = 2**20  # about ten thousand tensors
# In the order of the file: the library's, by which it is aligned.
_FORMATS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NUMBER_BYTES = {code: dtype.itemsize for dtype, code in _FORMATS.items()}


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a module's state and `metadata` to `path`, in one move."""
    with atomic_file(path) as temporary:
        write_tensors(temporary, module.state_dict(), metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; its bytes are a function of tensors and metadata alone.

    Only one tensor at a time is copied, if it is not contiguous on the CPU: the library's `save`
    holds the whole file in memory, its `save_file` makes files that only their owner can read, and
    both write metadata in another order in each process.
    """
    order = [*_FORMATS]
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    contiguous = (tensors[name].detach().cpu().contiguous() for name in names)
    write_safetensors(
        path,
        {name: _form(tensors[name]) for name in names},
        (value.reshape(-1).view(torch.uint8).numpy() for value in contiguous),
        metadata,
    )


def write_safetensors(
    path: Path,
    forms: Mapping[str, Form],
    data: Iterable[NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of tensors of these forms, in this order.

    `data` yields their numbers, in pieces of any size. Tensors in order of falling size of their
    numbers are aligned in the file.
    """
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name, (code, shape) in forms.items():
        begin, end = end, end + math.prod(shape) * _NUMBER_BYTES[code]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for piece in data:
            file.write(piece.data)


def fingerprint(identity: Mapping[str, Any], module: nn.Module) -> str:
    """Return the SHA-256, in hexadecimal, of `identity` as JSON and of a module's state."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_with_weights(
    build: Callable[[], M], path: Path, *, of: str, least_values: int
) -> tuple[M, dict[str, str]]:
    """Build a module and load the weights in `path`; return it and the file's metadata.

    `least_values` is how many numbers the config asks for at the least, and not far from all: a
    module that is too large for the file is not even built. (Torch's meta device would tell the
    same in a second, which it takes to be imported.) Raises `DriveSimError`, which says that the
    file is not `of`'s weights and why, where it is damaged or the weights are other ones than the
    module's.
    """
    held = path.stat().st_size // _VALUE_BYTES if path.is_file() else 0
    if least_values > held:
        reason = f"it holds {held} numbers at most, its config asks for {shown(least_values)}"
        raise _not_weights(path, of, reason)
    module = build()
    return module, load_weights(module, path, of=of)


@torch.no_grad()
def load_weights(module: nn.Module, path: Path, *, of: str) -> dict[str, str]:
    """Load the weights in `path` into a module; return the file's metadata.

    Raises `DriveSimError` as `build_with_weights` does, before the module changes.
    """
    try:
        own = module.state_dict()
        forms, metadata = _read_header(path)
        _check_forms({name: _form(value) for name, value in own.items()}, forms)
        with safe_open(path, "pt") as file:
            for name, value in own.items():
                value.copy_(file.get_tensor(name))
    except (ValueError, OSError, SafetensorError) as error:
        raise _not_weights(path, of, error) from error
    return metadata


def _read_header(path: Path) -> tuple[dict[str, Form], dict[str, str]]:
    """Forms of a file's tensors, and its metadata; `ValueError` where it is damaged."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"its header says that it is {length} bytes long")
        # The library checks the rest: the JSON, and that the tensors fill the file without a gap.
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            forms = {k: (str(v.get_dtype()), tuple(v.get_shape())) for k, v in slices.items()}
            return forms, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(one_line(error)) from error


def _form(value: Tensor) -> Form:
    return _FORMATS.get(value.dtype, str(value.dtype)), tuple(value.shape)


def _check_forms(expected: Mapping[str, Form], found: Mapping[str, Form]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise ValueError(f"it has {shown(name)}, which the model has not")
        if name not in found:
            raise ValueError(f"it has no {name}")
        if expected[name] != found[name]:
            (own, own_shape), (other, shape) = expected[name], found[name]
            raise ValueError(
                f"{name} is {other} {shown(list(shape))}, expected {own} {shown(list(own_shape))}"
            )


def _not_weights(path: Path, of: str, reason: object) -> DriveSimError:
    return DriveSimError(f"{path}: not {of}'s weights ({one_line(reason)}); copy it again")
