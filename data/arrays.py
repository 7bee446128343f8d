"""NumPy arrays by the numbers in them; their axes stand where they are used."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""Levels of 8 bits, of pictures in RGB: the channels are the last axis unless said otherwise."""
Ints = NDArray[np.int64]
"""Whole numbers of 64 bits: indices, tokens, counts."""
Floats = NDArray[np.float64]
"""Numbers of 64 bits: times, measurements, probabilities."""
Floats32 = NDArray[np.float32]
"""Numbers of 32 bits: actions, pictures that are being drawn, what models return."""
Reals = NDArray[np.floating[Any]]
"""Numbers of any precision."""
Mask = NDArray[np.bool_]
"""What is known, chosen or true."""


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256, in hexadecimal, of the arrays' bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
