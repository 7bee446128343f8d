"""Type aliases for NumPy arrays. The axes are documented where an alias is used."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""8-bit pixel values. Unless stated otherwise, the last axis has the channels R, G and B."""
Ints = NDArray[np.int64]
"""64-bit integers: indices, tokens, counts."""
Floats = NDArray[np.float64]
"""64-bit floats: times, measurements, probabilities."""
Floats32 = NDArray[np.float32]
"""32-bit floats: actions, pictures that are still being drawn, model outputs."""
Reals = NDArray[np.floating[Any]]
"""Floats of any precision."""
Mask = NDArray[np.bool_]
"""Booleans, such as whether each value is known or each frame is chosen."""


def digest(*arrays: NDArray[Any]) -> str:
    """Return one SHA-256 of the bytes of all arrays, in hexadecimal."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()
