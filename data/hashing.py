"""Random numbers that depend only on a seed and integer keys, without any stored state."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driving_sim.data.arrays import Floats

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix bits with the finaliser of SplitMix64.

    Source: Steele et al. 2014, https://doi.org/10.1145/2660193.2660195
    """
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def uniform(seed: int, *keys: ArrayLike) -> Floats:
    """Return a random number in [0, 1) for each combination of integer keys.

    The same seed and keys always give the same number. The keys broadcast against one another, and
    the result has their shape, with at least one axis.
    """
    bits = mixed(np.array([seed], dtype=np.int64).view(np.uint64) + _GOLDEN)
    for key in keys:
        # Convert to int64 first, because converting a negative key to uint64 raises OverflowError.
        value = np.atleast_1d(np.asarray(key, dtype=np.int64)).view(np.uint64)
        bits = mixed((bits ^ value) * _GOLDEN + _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
