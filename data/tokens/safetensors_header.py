"""The head of a safetensors file, for files that are written piece by piece.

The safetensors library wants every tensor in memory and gives no promise on the order of the
metadata: equal content must be equal bytes. It reads these files all the same.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

LENGTH_BYTES = 8
"""The length of the header comes first, little-endian."""

DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U16": np.dtype("<u2"),
    "BOOL": np.dtype("?"),
}
"""How numbers are stored, by the format's names."""


def safetensors_header(
    columns: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return all that precedes the data of `columns`: (name in `DTYPES`, shape) by column.

    The data follows in the same order, without gaps. Columns in order of falling size of their
    numbers are aligned in the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))}
    begin = 0
    for name, (code, shape) in columns.items():
        end = begin + prod(shape) * DTYPES[code].itemsize
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
