"""Write a model's weights to a safetensors file atomically, read them with checks, and hash them.

The file and its config may be damaged or malicious. For example, the file may claim that its header
is gigabytes long, or the config may ask for a billion layers. So memory is allocated only for as
many weights as fit into the file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.parsing import one_line, shown

M = TypeVar("M", bound=nn.Module)
Form = tuple[str, tuple[int, ...]]
"""Number format (its name in safetensors) and shape of a tensor."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8  # in bytes; the first tensor starts at a multiple of this
_MOST_HEADER_BYTES = 2**20  # enough for about ten thousand tensors
# Tensors are written in this order. The widest formats come first, which keeps all tensors aligned.
# The safetensors library uses the same order.
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


def save_weights(
    module: nn.Module,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the state dict of a module, and `metadata`, to `path` atomically.

    With `dtype=torch.bfloat16`, float32 weights take half the space. Raises ValueError if this
    would change a weight, so call `round_to_bf16` first.
    """
    tensors = {name: _stored_as(dtype, name, value) for name, value in module.state_dict().items()}
    with atomic_file(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def _stored_as(dtype: torch.dtype, name: str, value: Tensor) -> Tensor:
    if value.dtype != torch.float32 or dtype == torch.float32:
        return value
    stored = value.to(dtype)
    if not torch.equal(stored.float(), value):
        raise ValueError(
            f"{name} has values that {dtype} cannot represent; round the weights before saving them"
        )
    return stored


@torch.no_grad()
def round_to_bf16(module: nn.Module) -> None:
    """Round the float32 weights of a module to the nearest bfloat16 values, in place.

    They stay float32 tensors. Saving them as bfloat16 and loading them again changes nothing, so
    the `fingerprint` stays the same.
    """
    for value in module.state_dict().values():
        if value.dtype == torch.float32:
            value.copy_(value.bfloat16())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose bytes depend only on the tensors and the metadata.

    Tensors are copied one at a time, and only if they are not contiguous on the CPU. The functions
    of the safetensors library have disadvantages. `save` keeps the whole file in memory.
    `save_file` creates files that only their owner can read. Both write the metadata in an order
    that differs between processes.
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
    """Write a safetensors file of tensors with the given formats and shapes, in the given order.

    `data` yields the numbers of all tensors, in pieces of any size. `forms` should start with the
    widest formats, such as float64, to keep the tensors aligned.
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
            file.write(np.ascontiguousarray(piece).data)


def fingerprint(identity: Mapping[str, Any], module: nn.Module) -> str:
    """Return the SHA-256, in hexadecimal, of `identity` (as JSON) and a module's state dict."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_with_weights(build: Callable[[], M], path: Path, *, of: str) -> tuple[M, dict[str, str]]:
    """Build a module and load the weights in `path`. Return the module and the file's metadata.

    The build stops if the module has more weights than fit into the file. (A build on torch's meta
    device would also show this, but its imports take a second or two.) Float32 weights may be saved
    as bfloat16. Raises `DriveSimError` if the file is damaged, or if its tensors do not match the
    module. `of` names the owner of the weights in messages, for example "this tokenizer".
    """
    with _opened(path, of) as file:
        formats = {code for code, _ in _saved_forms(file).values()}
        value_bytes = _NUMBER_BYTES["BF16" if "BF16" in formats else "F32"]
        with _Allowance(path.stat().st_size // value_bytes):
            module = build()
        return module, _copy_weights(file, module)


def load_weights(module: nn.Module, path: Path, *, of: str) -> dict[str, str]:
    """Load the weights in `path` into a module. Return the file's metadata.

    Raises the same errors as `build_with_weights`, and then leaves the module unchanged.
    """
    with _opened(path, of) as file:
        return _copy_weights(file, module)


class _Allowance(TorchFunctionMode):
    """Context in which new tensors may have at most `numbers` elements in total."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._numbers = self._left = numbers

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.empty, torch.zeros, torch.ones, torch.randn):
            self._left -= math.prod(args[0] if isinstance(args[0], Sequence) else args)
            if self._left < 0:
                raise ValueError(
                    f"the file has at most {self._numbers} numbers, but the model's config "
                    "asks for more"
                )
        return function(*args, **(kwargs or {}))


@contextmanager
def _opened(path: Path, of: str) -> Iterator[Any]:
    """Open a file of weights. Convert errors here and in the context to `DriveSimError`."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"its header claims to be {length} bytes long")
        # Check nothing more here: safe_open checks that the header is valid JSON, and that the
        # tensors fill the file.
        with safe_open(path, "pt") as opened:
            yield opened
    except (ValueError, OSError, SafetensorError) as error:
        raise DriveSimError(
            f"{path}: not {of}'s weights ({one_line(error)}); copy it again"
        ) from error


@torch.no_grad()
def _copy_weights(file: Any, module: nn.Module) -> dict[str, str]:
    """Check that a file's tensors match the module, and copy them. Return the file's metadata."""
    state = module.state_dict()
    expected = {name: _form(value) for name, value in state.items()}
    saved = _saved_forms(file)
    for name in sorted(expected.keys() | saved.keys()):
        if name not in expected:
            raise ValueError(f"it has {shown(name)}, which the model does not have")
        if name not in saved:
            raise ValueError(f"it has no {name}")
        (dtype, shape), (saved_dtype, saved_shape) = expected[name], saved[name]
        is_rounded = (dtype, saved_dtype) == ("F32", "BF16")
        if shape != saved_shape or not (dtype == saved_dtype or is_rounded):
            raise ValueError(
                f"{name} is {saved_dtype} {shown(list(saved_shape))}, "
                f"expected {dtype} {shown(list(shape))}"
            )
    for name, value in state.items():
        value.copy_(file.get_tensor(name))
    return dict(file.metadata() or {})


def _saved_forms(file: Any) -> dict[str, Form]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _form(value: Tensor) -> Form:
    return _FORMATS.get(value.dtype, str(value.dtype)), tuple(value.shape)
