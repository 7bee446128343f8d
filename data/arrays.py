"""NumPy arrays by the numbers in them; their axes stand where they are used."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""Frames in RGB: [height, width, 3] of one, [T, height, width, 3] of several."""
Ints = NDArray[np.int64]
"""Whole numbers of 64 bits: indices, tokens, counts."""
Floats = NDArray[np.float64]
"""Times and whatever else is measured."""
Floats32 = NDArray[np.float32]
"""Actions, and what models compute with."""
Reals = NDArray[np.floating[Any]]
"""Numbers of either precision."""
Mask = NDArray[np.bool_]
"""What is known, chosen or true."""


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256, in hexadecimal, of the arrays' bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
