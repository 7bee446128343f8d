"""One token shard: a safetensors file, written piece by piece and read by memory map.

Its columns, for N frames of D drives (drive d is frames offsets[d] : offsets[d + 1]):

    offsets       I64   [D + 1]
    timestamps    F64   [N]               seconds from the drive's first frame
    actions       F32   [N, 2]            speed in m/s, steering in rad, left positive
    tokens        U16   [N, rows, cols]
    action_valid  BOOL  [N, 2]

Equal content is equal bytes.
"""

import hashlib
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.tokens.safetensors_header import DTYPES, LENGTH_BYTES, safetensors_header
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.parsing import one_line, parse_json, shown

Array = NDArray[Any]

# In order of falling alignment, so that every column is aligned in the file.
COLUMNS = {
    "offsets": "I64",
    "timestamps": "F64",
    "actions": "F32",
    "tokens": "U16",
    "action_valid": "BOOL",
}
FRAME_COLUMNS = tuple(name for name in COLUMNS if name != "offsets")

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def frame_bytes(rows: int, cols: int) -> int:
    """Bytes that one frame takes in a shard."""
    shapes = _shapes(1, 0, rows, cols)
    return sum(prod(shapes[name]) * DTYPES[COLUMNS[name]].itemsize for name in FRAME_COLUMNS)


def _shapes(frames: int, drives: int, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
    return {
        "offsets": (drives + 1,),
        "timestamps": (frames,),
        "actions": (frames, 2),
        "tokens": (frames, rows, cols),
        "action_valid": (frames, 2),
    }


def write_shard(
    path: Path,
    *,
    metadata: Mapping[str, str],
    lengths: Sequence[int],
    rows: int,
    cols: int,
    column: Callable[[str], Iterable[Array]],
) -> str:
    """Write a shard of drives with `lengths` frames, whole or not at all; returns its SHA-256.

    `column(name)` yields the drives' arrays of that column in order, so that only one needs to be
    in memory at a time.
    """
    shapes = _shapes(sum(lengths), len(lengths), rows, cols)
    digest = hashlib.sha256()
    with atomic_file(path) as temporary, temporary.open("wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        columns = {name: (code, shapes[name]) for name, code in COLUMNS.items()}
        write(safetensors_header(columns, metadata))
        write(np.cumsum([0, *lengths], dtype="<i8"))
        for name in FRAME_COLUMNS:
            written = 0
            for array in column(name):
                write(np.ascontiguousarray(array, DTYPES[COLUMNS[name]]))
                written += array.size
            if written != prod(shapes[name]):
                raise ValueError(f"{name}: {written} values given for a shape of {shapes[name]}")
    return digest.hexdigest()


class TokenShard:
    """A shard file, memory-mapped and read-only; its header is checked before anything is read.

    Attributes: `metadata`, `drives`, `frames`, `offsets` int64 [D + 1] and `columns`, which holds
    the other columns by name as read-only arrays over the map.

    Raises:
        DriveSimError: the file is missing, cut short or not a token shard of `rows` x `cols`.
    """

    def __init__(self, path: Path, *, rows: int, cols: int) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DriveSimError(
                f"{path}: cannot read the token shard: {one_line(error)}"
            ) from error
        header, data = self._read_header()
        self.metadata = self._read_metadata(header)
        arrays = {name: self._read_column(header, data, name) for name in COLUMNS}
        if header or sum(array.nbytes for array in arrays.values()) != len(data):
            raise self._bad("it holds other data than a token shard's columns")
        self.offsets: NDArray[np.int64] = arrays.pop("offsets")
        self.columns = arrays
        self.drives, self.frames = self._check_shapes(rows, cols)

    def _bad(self, reason: str) -> DriveSimError:
        return DriveSimError(f"{self._path}: damaged token shard: {reason}; tokenize again")

    def _read_header(self) -> tuple[dict[str, Any], memoryview]:
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        start = LENGTH_BYTES + length
        if len(self._map) < start or length > _MAX_HEADER_BYTES:
            raise self._bad(f"its header says {length} bytes, the file has {len(self._map)}")
        try:
            header = parse_json(self._map[LENGTH_BYTES:start])
        except ValueError as error:
            raise self._bad("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a table")
        return header, memoryview(self._map)[start:]

    def _read_metadata(self, header: dict[str, Any]) -> dict[str, str]:
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._bad("its header has no metadata")
        return metadata

    def _read_column(self, header: dict[str, Any], data: memoryview, name: str) -> Array:
        code = COLUMNS[name]
        dtype = DTYPES[code]
        try:
            entry = header.pop(name)
            shape = tuple(_count(n) for n in entry["shape"])
            begin, end = (_count(n) for n in entry["data_offsets"])
            found = entry["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(f"its header does not describe {name!r}") from error
        if found != code:
            raise self._bad(f"{name!r} is {shown(found)}, expected {code}")
        if end > len(data) or end - begin != prod(shape) * dtype.itemsize:
            raise self._bad(f"{name!r} {shown(list(shape))} does not fit bytes {begin} to {end}")
        return np.frombuffer(data[begin:end], dtype).reshape(shape)

    def _check_shapes(self, rows: int, cols: int) -> tuple[int, int]:
        drives, frames = self.offsets.size - 1, self.columns["timestamps"].size
        found = {"offsets": self.offsets.shape} | {n: a.shape for n, a in self.columns.items()}
        expected = _shapes(frames, drives, rows, cols)
        for name, shape in expected.items():
            if found[name] != shape:
                raise self._bad(f"{name!r} is {shown(list(found[name]))}, expected {list(shape)}")
        rises = drives >= 0 and bool((np.diff(self.offsets) >= 0).all())
        if not rises or (int(self.offsets[0]), int(self.offsets[-1])) != (0, frames):
            raise self._bad("its drive offsets do not rise from 0 to its number of frames")
        return drives, frames


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("not a count")
    return value
