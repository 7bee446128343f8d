"""Type aliases for NumPy arrays. The axes are documented where an alias is used."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""8-bit pixel values. Pictures are RGB; the last axis is the channel unless stated otherwise."""
Ints = NDArray[np.int64]
"""64-bit integers: indices, tokens, counts."""
Floats = NDArray[np.float64]
"""64-bit floats: times, measurements, probabilities."""
Floats32 = NDArray[np.float32]
"""32-bit floats: actions, unfinished pictures, outputs of models."""
Reals = NDArray[np.floating[Any]]
"""Floats of any precision."""
Mask = NDArray[np.bool_]
"""Booleans that mark the elements that are known, chosen or true."""


def digest(*arrays: NDArray[Any]) -> str:
    """Return the SHA-256 of the bytes of all arrays, in hexadecimal."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()
